//! Files of cgroup v2 that the specification names itself.

use std::collections::BTreeMap;

use super::{CgroupError, Setting};

/// The controllers of cgroup v2 whose files may be named; the core's own files (cgroup.procs and
/// so on) are the agent's business.
const CONTROLLERS: [&str; 8] = [
    "cpu", "cpuset", "hugetlb", "io", "memory", "misc", "pids", "rdma",
];

pub(super) fn settings(unified: &BTreeMap<String, String>) -> Result<Vec<Setting>, CgroupError> {
    unified
        .iter()
        .map(|(file, value)| {
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
            let controller = file.split_once('.').map(|(controller, _)| controller);
            let known = controller.is_some_and(|name| CONTROLLERS.contains(&name));
            if !known || !file.chars().all(plain) {
                return Err(CgroupError::Invalid(format!(
                    "unified {file:?} is no file of a controller ({})",
                    CONTROLLERS.join(", ")
                )));
            }
            Ok(Setting::new(file, value))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_of_controllers_can_be_set() {
        let one = |file: &str| settings(&BTreeMap::from([(file.to_owned(), "1".to_owned())]));
        assert!(one("memory.oom.group").is_ok());
        for file in [
            "cgroup.procs",
            "../pod/cgroup.kill",
            "..",
            "memory/max",
            "memory./max",
            "fun.max",
            "",
        ] {
            assert!(one(file).is_err(), "{file}");
        }
    }
}

//! Files of cgroup v2 that the specification names itself.

use std::collections::BTreeMap;

use super::{CgroupError, Setting};

pub(super) fn settings(unified: &BTreeMap<String, String>) -> Result<Vec<Setting>, CgroupError> {
    unified
        .iter()
        .map(|(file, value)| {
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
            // The core's own files (cgroup.procs and so on) are the agent's business.
            let core = file.starts_with("cgroup.") || !file.contains('.');
            if core || file.starts_with('.') || !file.chars().all(plain) {
                return Err(CgroupError::Invalid(format!(
                    "unified {file:?} cannot be set"
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
        for file in ["cgroup.procs", "../pod/cgroup.kill", "..", "memory/max", ""] {
            assert!(one(file).is_err(), "{file}");
        }
    }
}

//! Which CPUs and memory nodes of the host a pod's processes use (cgroup-v2.rst, "Cpuset").

use std::path::Path;

use super::{CgroupError, PodCgroup, read, write};
use crate::numbers::Numbers;

const CONTROLLER: &[&str] = &["cpuset"];

/// Where a pod's processes may run and have their memory; without numbers: anywhere.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Places {
    /// CPUs of the host.
    pub cpus: Numbers,
    /// Memory nodes of the host.
    pub mems: Numbers,
}

impl PodCgroup {
    /// Confines the pod to `places`. After a failure it is where it was.
    pub fn confine(&self, places: &Places) -> Result<(), CgroupError> {
        let path = self.path();
        let anywhere = places.cpus.is_empty() && places.mems.is_empty();
        let handed_down = path.join("cpuset.cpus").exists();
        // Hosts without the controller run pods that do not ask for it.
        if anywhere && !handed_down {
            return Ok(());
        }
        if !handed_down {
            let (field, numbers) = match places.cpus.is_empty() {
                true => ("cpuset_mems", &places.mems),
                false => ("cpuset_cpus", &places.cpus),
            };
            self.hand_down_cpuset()
                .map_err(|error| CgroupError::Places {
                    field,
                    numbers: numbers.to_string(),
                    reason: error.to_string(),
                })?;
        }
        let wanted = [
            ("cpuset_cpus", "cpuset.cpus", &places.cpus),
            ("cpuset_mems", "cpuset.mems", &places.mems),
        ];
        let mut before = Vec::new();
        for (field, file, numbers) in wanted {
            let refused = |reason: String| CgroupError::Places {
                field,
                numbers: numbers.to_string(),
                reason,
            };
            let old = present(&path, file).map_err(refused)?;
            before.push((file, old));
            if let Err(reason) = set(&path, file, numbers) {
                for (file, old) in before {
                    // What the kernel took once it takes again.
                    let _ = set(&path, file, &old);
                }
                return Err(refused(reason));
            }
        }
        Ok(())
    }

    fn hand_down_cpuset(&self) -> Result<(), CgroupError> {
        let mut path = self.hierarchy.root.clone();
        for name in &self.names {
            self.hand_down(&path, CONTROLLER)?;
            path.push(name);
        }
        Ok(())
    }
}

/// Sets `file` of the cgroup at `path`; the error says what stands against it.
fn set(path: &Path, file: &'static str, numbers: &Numbers) -> Result<(), String> {
    let effective = format!("{file}.effective");
    let parent = present(path.parent().unwrap_or(path), &effective)?;
    // A group with processes cannot be given back "whatever the parent has", an empty list: the
    // kernel has no space left on an empty set of CPUs (kernel/cgroup/cpuset.c, validate_change).
    let written = match numbers.is_empty() {
        true if present(path, file)?.is_empty() => return Ok(()),
        true => &parent,
        false => numbers,
    };
    write(&path.join(file), "be set", &written.to_string())
        .map_err(|error| format!("{error}; its parent has {parent}"))?;
    // Of numbers that its parent has not the kernel leaves out some, and instead of none it takes
    // all the parent has.
    let now = present(path, &effective)?;
    if now.within(written) {
        return Ok(());
    }
    Err(format!(
        "its parent {} has only {now}",
        path.parent().unwrap_or(path).display()
    ))
}

/// The numbers in a file of the cgroup at `path`.
fn present(path: &Path, file: &str) -> Result<Numbers, String> {
    let text = read(&path.join(file)).map_err(|error| error.to_string())?;
    Numbers::parse(&text)
}

//! A group for each exec, below its container's: what the exec has started can be ended with it,
//! wherever it has moved in the process tree. No controller is offered to it, so that its processes
//! count as the container's own.

use std::fs;
use std::io::{self, ErrorKind};

use super::{Cgroup, CgroupError};

/// How the name of an exec's group begins.
const EXEC: &str = "exec-";
/// The most groups below a container's that are looked into for processes.
const MOST_GROUPS: usize = 1024;
/// How often processes are moved out of a group that is to go: they may fork meanwhile.
const ATTEMPTS: usize = 16;

impl Cgroup {
    /// The group of exec `id` of this container, which may not be there.
    pub fn exec(&self, id: &str) -> Self {
        let path = self.path.join(format!("{EXEC}{id}"));
        Self { path }
    }

    /// Makes the group of exec `id` of this container.
    pub fn make_exec(&self, id: &str) -> Result<Self, CgroupError> {
        let group = self.exec(id);
        fs::create_dir(&group.path).map_err(|source| CgroupError::Directory {
            what: "make",
            path: group.path.clone(),
            source,
        })?;
        Ok(group)
    }

    /// The numbers of the container's processes, a line each: also those of its execs and of groups
    /// it has made itself, of which [`MOST_GROUPS`] are looked into.
    pub(super) fn processes(&self) -> io::Result<String> {
        let mut all = fs::read_to_string(self.path.join("cgroup.procs"))?;
        let mut left = vec![self.path.clone()];
        let mut seen = 0;
        while let Some(group) = left.pop() {
            // One that is over is gone, and its processes with it.
            for entry in fs::read_dir(&group).into_iter().flatten().flatten() {
                if seen < MOST_GROUPS && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    let group = entry.path();
                    all += &fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
                    left.push(group);
                    seen += 1;
                }
            }
        }
        Ok(all)
    }

    /// Removes the group of an exec that is over. What it left running becomes the container's.
    /// Where that fails the group stays until the container is removed.
    pub fn dissolve(&self) {
        let Some(container) = self.path.parent() else {
            return;
        };
        for _ in 0..ATTEMPTS {
            match fs::remove_dir(&self.path) {
                Err(error) if error.kind() == ErrorKind::ResourceBusy => {}
                _ => return,
            }
            let left = fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default();
            for process in left.lines() {
                let _ = fs::write(container.join("cgroup.procs"), process);
            }
        }
    }
}

//! A container's control group, cgroup v2 (Documentation/admin-guide/cgroup-v2.rst).

mod cpu;
mod cpuset;
mod exec;
mod hugetlb;
mod io;
mod memory;
mod pids;
mod unified;

use std::fs::{self, File};
use std::io::{Error as IoError, ErrorKind, Write};
use std::path::{Path, PathBuf};

use crate::container::spec::Resources;
use crate::container::tree;

/// The group of all containers of the pod.
pub const POD: &str = "/sys/fs/cgroup/pod";

/// A value for one file of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Setting {
    file: String,
    value: String,
    /// A kernel without this file keeps the promise anyway.
    optional: bool,
}

impl Setting {
    fn new(file: &str, value: impl ToString) -> Self {
        Self {
            file: file.to_owned(),
            value: value.to_string(),
            optional: false,
        }
    }
}

/// What a group has, where a new value depends on it.
#[derive(Debug, Default)]
struct Present {
    /// The first word of cpu.max.
    quota: Option<String>,
    /// memory.max in bytes, unless there is none.
    memory: Option<i64>,
}

/// Why a control group is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A value of the specification makes no sense.
    #[error("linux.resources: {0}")]
    Invalid(String),
    /// The guest's kernel has no such file.
    #[error("linux.resources: the guest has no {0}")]
    Unknown(String),
    /// The kernel does not take the value.
    #[error("linux.resources: {file} does not take {value:?}: {source}")]
    Value {
        /// The file.
        file: String,
        /// The value.
        value: String,
        /// The kernel's answer.
        source: IoError,
    },
    /// The kernel refused.
    #[error("cannot write {value:?} to {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The value.
        value: String,
        /// The kernel's answer.
        source: IoError,
    },
    /// The group cannot be made or removed.
    #[error("cannot {what} the cgroup {path}: {source}")]
    Directory {
        /// The step.
        what: &'static str,
        /// The group.
        path: PathBuf,
        /// The kernel's answer.
        source: IoError,
    },
}

/// A container's group. Not removed by being dropped: it can outlive a failed start.
#[derive(Debug, Clone)]
pub struct Cgroup {
    path: PathBuf,
}

/// Bounds the tasks of all containers together, so that the agent can always start a process.
pub fn bound_pod() -> Result<(), CgroupError> {
    let (most, _) = pids::shares(most_tasks());
    Cgroup::pod().write(&Setting::new("pids.max", most))
}

/// How many tasks the guest can have, by the size of its memory.
fn most_tasks() -> u64 {
    let file = fs::read_to_string("/proc/sys/kernel/threads-max").unwrap_or_default();
    file.trim().parse().unwrap_or(1024)
}

impl Cgroup {
    /// The group of all containers.
    pub fn pod() -> Self {
        Self { path: POD.into() }
    }

    /// The group of container `id`, whether it is there or not.
    pub fn of(id: &str) -> Self {
        Self {
            path: Path::new(POD).join(id),
        }
    }

    /// How many processes are in it and below.
    pub fn process_count(&self) -> usize {
        self.processes().unwrap_or_default().lines().count()
    }

    /// Makes the group of container `id` below [`POD`] with its limits.
    pub fn create(id: &str, resources: Option<&Resources>) -> Result<Self, CgroupError> {
        let (_, tasks) = pids::shares(most_tasks());
        let mut all = vec![Setting::new("pids.max", tasks)];
        if let Some(resources) = resources {
            all.extend(settings(resources, &Present::default())?);
        }
        let group = Self::of(id);
        fs::create_dir(&group.path).map_err(|source| CgroupError::Directory {
            what: "make",
            path: group.path.clone(),
            source,
        })?;
        if let Err(error) = all.iter().try_for_each(|setting| group.write(setting)) {
            let _ = fs::remove_dir(&group.path);
            return Err(error);
        }
        Ok(group)
    }

    /// Changes limits; those that `resources` leaves out stay. After a failure all are as they
    /// were, as far as the kernel allows. Blocks: a lower memory limit is kept by reclaiming.
    pub fn update(&self, resources: &Resources) -> Result<(), CgroupError> {
        let quota = self.read("cpu.max");
        let present = Present {
            quota: quota.and_then(|text| Some(text.split_whitespace().next()?.to_owned())),
            memory: self.read("memory.max").and_then(|text| text.parse().ok()),
        };
        let mut before = Vec::new();
        for setting in settings(resources, &present)? {
            let old = self.read(&setting.file);
            if let Err(error) = self.write(&setting) {
                for old in before.iter().rev() {
                    let _ = self.write(old);
                }
                return Err(error);
            }
            // The lines of io.max are the devices', and what is written is one of them.
            let old = old.filter(|_| setting.file != "io.max");
            before.extend(old.map(|value| Setting { value, ..setting }));
        }
        Ok(())
    }

    /// Sets how readily the OOM killer takes each process of the group.
    pub fn adjust_oom_score(&self, score: i32) -> Result<(), CgroupError> {
        for pid in self.processes().unwrap_or_default().lines() {
            let path = PathBuf::from(format!("/proc/{pid}/oom_score_adj"));
            match fs::write(&path, score.to_string()) {
                // It has ended meanwhile: without a file, or without memory to be killed for.
                Err(error)
                    if error.kind() != ErrorKind::NotFound
                        && error.raw_os_error() != Some(libc::ESRCH) =>
                {
                    return Err(CgroupError::Write {
                        path,
                        value: score.to_string(),
                        source: error,
                    });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Its directory.
    pub fn path(&self) -> String {
        self.path.to_string_lossy().into_owned()
    }

    /// Kills every process in it. One that is removed has none.
    pub fn kill(&self) -> Result<(), CgroupError> {
        match self.write(&Setting::new("cgroup.kill", 1)) {
            Err(CgroupError::Unknown(_)) => Ok(()),
            done => done,
        }
    }

    /// Sends a signal to every process in it. One that forks meanwhile may be missed.
    pub fn signal(&self, signal: i32) -> Result<(), IoError> {
        let processes = self.processes()?;
        for pid in processes.lines().filter_map(|line| line.parse().ok()) {
            match crate::sys::kill(pid, signal) {
                Err(error) if error.raw_os_error() != Some(libc::ESRCH) => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether no process is left in it.
    pub fn is_empty(&self) -> bool {
        match fs::read_to_string(self.path.join("cgroup.events")) {
            Ok(events) => field(&events, "populated") == Some(0),
            Err(error) => error.kind() == ErrorKind::NotFound,
        }
    }

    /// How many of its processes the OOM killer took.
    pub fn oom_kills(&self) -> u64 {
        let events = fs::read_to_string(self.path.join("memory.events")).unwrap_or_default();
        field(&events, "oom_kill").unwrap_or(0)
    }

    /// Removes it with the groups a process made in it.
    pub fn remove(&self) -> Result<(), CgroupError> {
        tree::remove_groups(&self.path).map_err(|source| CgroupError::Directory {
            what: "remove",
            path: self.path.clone(),
            source,
        })
    }

    fn read(&self, file: &str) -> Option<String> {
        let text = fs::read_to_string(self.path.join(file)).ok()?;
        Some(text.trim_end().to_owned())
    }

    fn write(&self, setting: &Setting) -> Result<(), CgroupError> {
        let path = self.path.join(&setting.file);
        // Not made when missing: in a cgroup no file can be made, and the error would be another.
        let written = File::options()
            .write(true)
            .open(&path)
            .and_then(|mut file| file.write_all(setting.value.as_bytes()));
        let Err(source) = written else {
            return Ok(());
        };
        let (file, value) = (setting.file.clone(), setting.value.clone());
        Err(match source.raw_os_error() {
            Some(libc::ENOENT) if setting.optional => return Ok(()),
            Some(libc::ENOENT) => CgroupError::Unknown(file),
            // EACCES: it can only be read. ENODEV: io.max of a disk that is not there.
            Some(libc::EINVAL | libc::ERANGE | libc::EACCES | libc::ENODEV | libc::EOPNOTSUPP) => {
                CgroupError::Value {
                    file,
                    value,
                    source,
                }
            }
            _ => CgroupError::Write {
                path,
                value,
                source,
            },
        })
    }
}

fn settings(resources: &Resources, present: &Present) -> Result<Vec<Setting>, CgroupError> {
    let mut all = Vec::new();
    // The processors first: nothing else depends on the order.
    if let Some(cpu) = &resources.cpu {
        all.extend(cpuset::settings(cpu));
        all.extend(cpu::settings(cpu, present));
    }
    if let Some(memory) = &resources.memory {
        all.extend(memory::settings(memory, present)?);
    }
    if let Some(pids) = &resources.pids {
        all.extend(pids::settings(pids));
    }
    if let Some(block) = &resources.block_io {
        all.extend(io::settings(block));
    }
    all.extend(hugetlb::settings(&resources.hugepage_limits)?);
    all.extend(unified::settings(&resources.unified)?);
    Ok(all)
}

/// The value of `name` in a file of "name value" lines.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(key, _)| *key == name)
        .and_then(|(_, value)| value.trim().parse().ok())
}

/// "max" for no limit.
fn limit(value: Option<u64>) -> String {
    value.map_or_else(|| "max".into(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_that_is_gone_is_killed_and_removed_again() {
        let home = tempfile::tempdir().unwrap();
        let gone = Cgroup {
            path: home.path().join("gone"),
        };
        gone.kill().unwrap();
        gone.remove().unwrap();
    }

    #[test]
    fn processes_are_found_in_groups_at_any_depth() {
        let home = tempfile::tempdir().unwrap();
        for (group, process) in [("", "1"), ("exec-a", "2"), ("own/deeper", "3")] {
            let group = home.path().join(group);
            fs::create_dir_all(&group).unwrap();
            fs::write(group.join("cgroup.procs"), format!("{process}\n")).unwrap();
        }
        let group = Cgroup {
            path: home.path().into(),
        };
        assert_eq!(group.process_count(), 3);
    }

    #[test]
    fn a_kubelets_container_becomes_these_files() {
        let resources: Resources = serde_json::from_str(
            r#"{"cpu":{"shares":1024,"quota":50000,"period":100000,"cpus":"0-1"},
                "memory":{"limit":134217728,"swap":134217728},"pids":{"limit":100},
                "hugepageLimits":[{"pageSize":"2MB","limit":0}],
                "unified":{"memory.oom.group":"1"}}"#,
        )
        .unwrap();
        let files: Vec<String> = settings(&resources, &Present::default())
            .unwrap()
            .iter()
            .map(|setting| format!("{}={}", setting.file, setting.value))
            .collect();
        assert_eq!(
            files,
            [
                "cpuset.cpus=0-1",
                "cpu.weight=39",
                "cpu.max=50000 100000",
                "memory.max=134217728",
                "memory.swap.max=0",
                "pids.max=100",
                "hugetlb.2MB.max=0",
                "memory.oom.group=1",
            ]
        );
    }

    #[test]
    fn events_are_read_by_name() {
        let events = "low 0\noom 2\noom_kill 1\noom_group_kill 0\n";
        assert_eq!(field(events, "oom_kill"), Some(1));
        assert_eq!(field(events, "oom_"), None);
    }
}

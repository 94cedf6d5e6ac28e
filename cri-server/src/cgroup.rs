//! The pod's cgroup on the host: cgroup v2, made under the kubelet's parent.
//!
//! Everything of a pod on the host (VMM, its threads, its file server) lives in this one cgroup,
//! so its limits are the pod's and ending it ends the pod. Kernel: admin-guide/cgroup-v2.rst.

mod cpuset;
mod error;

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

pub use cpuset::Places;
pub use error::CgroupError;

/// Where the host has its cgroups.
const MOUNT: &str = "/sys/fs/cgroup";
/// `CGROUP2_SUPER_MAGIC` of include/uapi/linux/magic.h.
const CGROUP2_MAGIC: u64 = 0x6367_7270;
/// What a pod's cgroup needs.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// For pods whose configuration names no parent.
const DEFAULT_PARENT: &str = "/bulkhead";
/// Between attempts to remove a cgroup that is busy.
const PAUSE: Duration = Duration::from_millis(10);
/// Deeper parents than this are a mistake or an attack.
const DEPTH: usize = 32;

/// The host's cgroup v2 hierarchy.
#[derive(Debug, Clone)]
pub struct Hierarchy {
    root: PathBuf,
    controllers: &'static [&'static str],
}

impl Hierarchy {
    /// The host's, if it is of the kind pods need.
    pub fn detect() -> Result<Self, CgroupError> {
        Self::at(Path::new(MOUNT), &CONTROLLERS)
    }

    fn at(root: &Path, controllers: &'static [&'static str]) -> Result<Self, CgroupError> {
        let kind = rustix::fs::statfs(root).map_err(|errno| CgroupError::Step {
            path: root.to_owned(),
            step: "be looked at",
            source: errno.into(),
        })?;
        if u64::try_from(kind.f_type).ok() != Some(CGROUP2_MAGIC) {
            let found = if root.join("unified").exists() {
                "cgroup v1 with v2 beside it (hybrid)"
            } else if root.join("memory").exists() {
                "cgroup v1"
            } else {
                "not mounted"
            };
            return Err(CgroupError::NotUnified { found });
        }
        let hierarchy = Self {
            root: root.to_owned(),
            controllers,
        };
        hierarchy.offered(root, controllers)?;
        Ok(hierarchy)
    }

    /// The cgroup of the pod `id` under `parent`, which has the form of either cgroup driver:
    /// `/kubepods/burstable/pod1` or `kubepods-burstable-pod1.slice`. Empty: a parent of ours.
    /// Nothing is made yet.
    pub fn pod(&self, parent: &str, id: &str) -> Result<PodCgroup, CgroupError> {
        let own_parent = parent.is_empty();
        let parent = if own_parent { DEFAULT_PARENT } else { parent };
        let slice = parent.ends_with(".slice");
        let mut ancestors = if slice {
            slices(parent)?
        } else {
            components(parent)?
        };
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if id.is_empty() || id.len() > 128 || !id.bytes().all(plain) {
            let reason = "the pod's id below it is not made of letters, digits, `-` and `_`";
            return Err(CgroupError::Parent {
                parent: parent.to_owned(),
                reason,
            });
        }
        let leaf = if slice {
            format!("bulkhead-{id}.scope")
        } else {
            format!("bulkhead-{id}")
        };
        ancestors.push(leaf);
        Ok(PodCgroup {
            hierarchy: self.clone(),
            names: ancestors,
            own_parent,
        })
    }

    /// Checks that the cgroup at `path` could hand its children what they need.
    fn offered(&self, path: &Path, controllers: &[&'static str]) -> Result<(), CgroupError> {
        let offered = read(&path.join("cgroup.controllers"))?;
        let missing: Vec<&str> = controllers
            .iter()
            .copied()
            .filter(|controller| !offered.split_whitespace().any(|word| word == *controller))
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        Err(CgroupError::Controllers {
            missing,
            path: path.to_owned(),
        })
    }
}

/// A pod's limits on the host. What is `None` stays as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// `memory.max` in bytes: guest memory, VMM and file server together.
    pub memory_bytes: Option<u64>,
    /// `cpu.max`: microseconds of CPU time, or as much as there is, in each period of so many
    /// microseconds.
    pub cpu: Option<(Option<u64>, u64)>,
    /// `cpu.weight`, 1 to 10000.
    pub cpu_weight: Option<u64>,
    /// `pids.max`: threads of the VMM and its helpers.
    pub pids: Option<u64>,
}

/// The `cpu.weight` (1 to 10000) for so many CPU shares of cgroup v1 (2 to 262144), in the linear
/// form the OCI runtimes use.
pub fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

/// One pod's cgroup, which may or may not exist yet. All calls block.
#[derive(Debug, Clone)]
pub struct PodCgroup {
    hierarchy: Hierarchy,
    /// From below the root down to the pod's own.
    names: Vec<String>,
    own_parent: bool,
}

impl PodCgroup {
    /// The cgroup's directory.
    pub fn path(&self) -> PathBuf {
        self.hierarchy
            .root
            .join(self.names.iter().collect::<PathBuf>())
    }

    /// Makes the cgroup, with the controllers handed down to it. One that is there is kept.
    pub fn create(&self) -> Result<(), CgroupError> {
        let mut attempts = 0;
        loop {
            match self.descend() {
                // Our own parent goes when it is empty, which may be now.
                Err(CgroupError::Step { source, .. })
                    if self.own_parent && source.kind() == ErrorKind::NotFound && attempts < 8 =>
                {
                    attempts += 1;
                }
                other => break other?,
            }
        }
        let path = self.path();
        // Half a pod is no pod: when the kernel must kill, it takes all. Absent without memory.
        let group = path.join("memory.oom.group");
        if group.exists() {
            write(&group, "be set", "1")?;
        }
        Ok(())
    }

    fn descend(&self) -> Result<(), CgroupError> {
        let mut path = self.hierarchy.root.clone();
        for name in &self.names {
            self.hand_down(&path, self.hierarchy.controllers)?;
            path.push(name);
            match fs::DirBuilder::new().mode(0o755).create(&path) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                    return Err(CgroupError::Step {
                        path,
                        step: "be made",
                        source: error,
                    });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Lets the children of the cgroup at `path` have `controllers`.
    fn hand_down(&self, path: &Path, controllers: &[&'static str]) -> Result<(), CgroupError> {
        let file = path.join("cgroup.subtree_control");
        let enabled = read(&file)?;
        let wanted: Vec<String> = controllers
            .iter()
            .filter(|controller| !enabled.split_whitespace().any(|word| word == **controller))
            .map(|controller| format!("+{controller}"))
            .collect();
        if wanted.is_empty() {
            return Ok(());
        }
        self.hierarchy.offered(path, controllers)?;
        let step = "hand controllers down (a cgroup with processes of its own cannot)";
        write(&file, step, &wanted.join(" "))
    }

    /// Sets limits.
    pub fn limit(&self, limits: &Limits) -> Result<(), CgroupError> {
        let values = [
            (
                "memory.max",
                limits.memory_bytes.map(|bytes| bytes.to_string()),
            ),
            (
                "cpu.max",
                limits.cpu.map(|(quota, period)| match quota {
                    Some(quota) => format!("{quota} {period}"),
                    None => format!("max {period}"),
                }),
            ),
            (
                "cpu.weight",
                limits.cpu_weight.map(|weight| weight.to_string()),
            ),
            ("pids.max", limits.pids.map(|count| count.to_string())),
        ];
        for (file, value) in values {
            if let Some(value) = value {
                write(&self.path().join(file), "be set", &value)?;
            }
        }
        Ok(())
    }

    /// The open `cgroup.procs`: a process that writes `0` to it moves in.
    pub fn procs(&self) -> Result<OwnedFd, CgroupError> {
        let path = self.path().join("cgroup.procs");
        match OpenOptions::new().write(true).open(&path) {
            Ok(file) => Ok(file.into()),
            Err(source) => Err(CgroupError::Step {
                path,
                step: "be opened",
                source,
            }),
        }
    }

    /// Kills every process in it and below; nothing when it does not exist.
    pub fn kill(&self) -> Result<(), CgroupError> {
        match write(&self.path().join("cgroup.kill"), "kill its processes", "1") {
            Err(CgroupError::Step { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// Kills what is in it, waits for its end, removes it; nothing when it does not exist.
    pub fn remove(&self, limit: Duration) -> Result<(), CgroupError> {
        let start = Instant::now();
        let path = self.path();
        self.kill()?;
        loop {
            await_empty(&path, start, limit)?;
            match remove_tree(&path, DEPTH) {
                Ok(()) => break,
                // A process that forked while it was killed; the kernel ends it, too.
                Err(error) if error.kind() == ErrorKind::ResourceBusy => {
                    if start.elapsed() >= limit {
                        return Err(CgroupError::Busy {
                            path,
                            waited: limit,
                        });
                    }
                    self.kill()?;
                    std::thread::sleep(PAUSE);
                }
                Err(source) => {
                    return Err(CgroupError::Step {
                        path,
                        step: "be removed",
                        source,
                    });
                }
            }
        }
        if self.own_parent
            && let Some(parent) = path.parent()
        {
            // Other pods may be in it.
            let _ = fs::remove_dir(parent);
        }
        Ok(())
    }
}

/// Waits until `cgroup.events` says that nothing runs in the cgroup or below.
fn await_empty(path: &Path, start: Instant, limit: Duration) -> Result<(), CgroupError> {
    let events = path.join("cgroup.events");
    let fail = |source| CgroupError::Step {
        path: events.clone(),
        step: "be read",
        source,
    };
    let mut file = match File::open(&events) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        other => other.map_err(fail)?,
    };
    loop {
        let mut text = String::new();
        file.rewind().map_err(fail)?;
        match file.read_to_string(&mut text) {
            // Removed under our hands.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error()) => {
                return Ok(());
            }
            other => other.map_err(fail)?,
        };
        if !text.lines().any(|line| line == "populated 1") {
            return Ok(());
        }
        let left = limit.saturating_sub(start.elapsed());
        let Ok(left) = Timespec::try_from(left) else {
            return Ok(());
        };
        // The file's change is an exceptional condition, as poll(2) calls it.
        let mut changed = [PollFd::new(&file, PollFlags::PRI)];
        match poll(&mut changed, Some(&left)) {
            Ok(0) => {
                return Err(CgroupError::Busy {
                    path: path.to_owned(),
                    waited: limit,
                });
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(fail(errno.into())),
        }
    }
}

/// Removes a cgroup with those below it. Their files go by themselves.
fn remove_tree(path: &Path, depth: usize) -> io::Result<()> {
    let absent = |result: io::Result<()>| match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    };
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            let depth = depth.checked_sub(1).ok_or(ErrorKind::InvalidInput)?;
            remove_tree(&entry.path(), depth)?;
        }
    }
    absent(fs::remove_dir(path))
}

/// The cgroups of a path, relative or absolute.
fn components(parent: &str) -> Result<Vec<String>, CgroupError> {
    let refuse = |reason| {
        Err(CgroupError::Parent {
            parent: shortened(parent),
            reason,
        })
    };
    let mut names = Vec::new();
    for component in Path::new(parent).components() {
        match component {
            Component::RootDir => {}
            Component::Normal(name) => match name.to_str() {
                Some(name) if name.len() <= 255 && !name.contains(char::is_control) => {
                    names.push(name.to_owned());
                }
                _ => return refuse("a part of it is too long or has control characters"),
            },
            _ => return refuse("it has `.` or `..` in it"),
        }
    }
    if names.len() >= DEPTH {
        refuse("it is too deep")
    } else {
        Ok(names)
    }
}

/// The cgroups of a slice, as systemd nests them: `a-b.slice` is `a.slice/a-b.slice`
/// (systemd.slice(5)). A path before the name says the same again.
fn slices(parent: &str) -> Result<Vec<String>, CgroupError> {
    let name = parent.rsplit('/').next().unwrap_or(parent);
    let stem = name.strip_suffix(".slice").unwrap_or(name);
    if stem == "-" {
        return Ok(Vec::new());
    }
    let refuse = |reason| {
        Err(CgroupError::Parent {
            parent: shortened(parent),
            reason,
        })
    };
    if name.len() > 255 || name.contains(char::is_control) {
        return refuse("it is too long or has control characters");
    }
    let mut names = Vec::new();
    let mut prefix = String::new();
    for part in stem.split('-') {
        if part.is_empty() {
            return refuse("a slice's name has a part between every two dashes");
        }
        if !prefix.is_empty() {
            prefix.push('-');
        }
        prefix.push_str(part);
        names.push(format!("{prefix}.slice"));
    }
    if names.len() >= DEPTH {
        refuse("it is too deep")
    } else {
        Ok(names)
    }
}

fn shortened(text: &str) -> String {
    text.chars().take(300).collect()
}

fn read(path: &Path) -> Result<String, CgroupError> {
    fs::read_to_string(path).map_err(|source| CgroupError::Step {
        path: path.to_owned(),
        step: "be read",
        source,
    })
}

fn write(path: &Path, step: &'static str, value: &str) -> Result<(), CgroupError> {
    let fail = |source| CgroupError::Step {
        path: path.to_owned(),
        step,
        source,
    };
    // Opened without creating: in a cgroup no file can be made, elsewhere none should.
    let mut file = OpenOptions::new().write(true).open(path).map_err(fail)?;
    io::Write::write_all(&mut file, value.as_bytes()).map_err(fail)
}

#[cfg(test)]
mod tests;

//! Why a cgroup cannot be had.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::MOUNT;

/// Why a cgroup cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The host runs cgroup v1, or both.
    #[error(
        "this host's cgroups are {found}, not cgroup v2 alone; boot with \
         systemd.unified_cgroup_hierarchy=1, or mount cgroup2 on {MOUNT}"
    )]
    NotUnified {
        /// What is there.
        found: &'static str,
    },
    /// The host lacks controllers.
    #[error(
        "the cgroup controllers {} are missing at {}; enable them in the kernel \
         (a cgroup_disable= on its command line switches them off)",
        .missing.join(", "), .path.display()
    )]
    Controllers {
        /// Those that are needed and not there.
        missing: Vec<&'static str>,
        /// The cgroup that should have them.
        path: PathBuf,
    },
    /// The request's parent is not a cgroup's name.
    #[error("cgroup parent `{parent}` is not usable: {reason}")]
    Parent {
        /// As asked for.
        parent: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The pod cannot be on the CPUs or memory nodes asked for.
    #[error("{field} {numbers} cannot be had for the pod's VM: {reason}")]
    Places {
        /// The CRI's field.
        field: &'static str,
        /// The list in effect for the pod as a whole.
        numbers: String,
        /// What stands against it.
        reason: String,
    },
    /// The kernel refused a step.
    #[error("cgroup {}: cannot {step}: {source}", .path.display())]
    Step {
        /// The cgroup or its file.
        path: PathBuf,
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Processes survived their end.
    #[error("cgroup {} still has processes {:?} s after they were killed", .path.display(), .waited.as_secs())]
    Busy {
        /// The cgroup.
        path: PathBuf,
        /// How long its end was awaited.
        waited: Duration,
    },
}

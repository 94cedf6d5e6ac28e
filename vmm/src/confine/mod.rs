//! The jail: what a guest that has taken this process over finds in its hands.
//!
//! Nothing but the descriptors of its own VM: no file system, no network, no other process's IPC,
//! no capability, and no way to gain any. The process keeps the user id it was started with.
//!
//! The PID namespace stays the host's: a process that would leave it could not make threads any
//! more. Without capabilities it can signal only processes of its own user.

use std::io::Write;
use std::os::fd::OwnedFd;

use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags,
};
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};

use crate::sys;

/// Descriptors for a thousand streams, the disks' files and ourselves.
const MAX_DESCRIPTORS: u64 = 4096;

/// Why the process could not be confined.
#[derive(Debug, thiserror::Error)]
#[error("the VMM could not confine itself while {step}: {source}; it has to be started as root")]
pub struct ConfineError {
    step: &'static str,
    source: std::io::Error,
}

/// Confines the process, which has one thread: to `cgroup`, given as its `cgroup.procs`, and in all
/// other respects to nothing.
pub fn enter(cgroup: Option<OwnedFd>) -> Result<(), ConfineError> {
    if let Some(procs) = cgroup {
        let entered = std::fs::File::from(procs).write_all(b"0");
        entered.map_err(failed("entering its cgroup"))?;
    }
    let namespaces =
        UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    sys::unshare(namespaces).map_err(failed("leaving the host's namespaces"))?;
    empty_root().map_err(|error| failed("emptying its root directory")(error.into()))?;
    limit().map_err(|error| failed("setting its limits")(error.into()))?;
    drop_privileges().map_err(|error| failed("giving up its privileges")(error.into()))
}

fn failed(step: &'static str) -> impl Fn(std::io::Error) -> ConfineError {
    move |source| ConfineError { step, source }
}

/// Makes a new, read-only, empty directory the root, and lets the host's tree go.
fn empty_root() -> rustix::io::Result<()> {
    // Nothing done here shall show on the host, nor the reverse.
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private)?;
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&context, "size", "0")?;
    rustix::mount::fsconfig_set_string(&context, "mode", "555")?;
    rustix::mount::fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOEXEC
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOSUID;
    let root = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    rustix::mount::move_mount(&root, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    rustix::process::fchdir(&root)?;
    drop(root);
    // The new root goes over the old one, and the old one over it, from where it is taken away
    // (pivot_root(2), "pivot_root(".", ".")").
    rustix::process::pivot_root(".", ".")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")
}

fn limit() -> rustix::io::Result<()> {
    let fixed = |value| Rlimit {
        current: Some(value),
        maximum: Some(value),
    };
    rustix::process::setrlimit(Resource::Core, fixed(0))?;
    rustix::process::setrlimit(Resource::Nofile, fixed(MAX_DESCRIPTORS))?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
}

fn drop_privileges() -> rustix::io::Result<()> {
    // The bounding set first, which takes a capability. Its end differs between kernels.
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Err(rustix::io::Errno::INVAL) => break,
            result => result?,
        }
    }
    rustix::thread::clear_ambient_capability_set()?;
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: none,
            permitted: none,
            inheritable: none,
        },
    )?;
    rustix::thread::set_no_new_privs(true)
}

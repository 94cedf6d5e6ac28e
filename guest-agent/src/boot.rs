//! From the kernel's initramfs to a root that containers can be started from.

use std::fs;
use std::io;
use std::path::Path;

use rustix::fs::Mode;
use rustix::mount::MountFlags;
use rustix::process::{Resource, Rlimit};

use crate::console;
use crate::network;
use crate::sys;

/// What booting leaves behind for the rest of the agent.
#[derive(Debug)]
pub struct Boot {
    /// 32 hexadecimal digits, drawn anew at each boot.
    pub id: String,
    /// Readable when a child has ended.
    pub children: std::os::fd::OwnedFd,
}

/// Why the guest cannot start.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file system is missing from the kernel, or memory is short.
    #[error("cannot mount {kind} at {place}: {source}")]
    Mount {
        /// The file system's name.
        kind: &'static str,
        /// Where it belongs.
        place: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Another step failed.
    #[error("cannot {what}: {source}")]
    Step {
        /// The step, as the rest of a sentence.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The control loop could not begin.
    #[error(transparent)]
    Control(#[from] crate::control::ControlError),
}

fn step<T, E: Into<io::Error>>(what: &'static str, done: Result<T, E>) -> Result<T, BootError> {
    done.map_err(|source| BootError::Step {
        what,
        source: source.into(),
    })
}

/// Most descriptors of the agent: a container takes about five, and so does an exec.
const DESCRIPTORS: u64 = 1 << 16;

/// Where the new root is put together.
const NEW_ROOT: &str = "/new";

/// (place, kind, flags, options). The order is that of nesting.
const MOUNTS: [(&str, &str, MountFlags, &str); 9] = {
    let none = MountFlags::NOSUID.union(MountFlags::NODEV);
    let strict = none.union(MountFlags::NOEXEC);
    [
        ("/proc", "proc", strict, ""),
        ("/sys", "sysfs", strict, ""),
        ("/sys/fs/cgroup", "cgroup2", strict, "nsdelegate"),
        ("/dev", "devtmpfs", MountFlags::NOSUID, "mode=0755"),
        (
            "/dev/pts",
            "devpts",
            MountFlags::NOSUID,
            "mode=0620,ptmxmode=0666,gid=5",
        ),
        ("/dev/shm", "tmpfs", none, "mode=1777,size=64m"),
        ("/dev/mqueue", "mqueue", strict, ""),
        ("/run", "tmpfs", none, "mode=0755"),
        ("/tmp", "tmpfs", none, "mode=1777"),
    ]
};

/// Makes the guest's root, brings loopback up and opens the cgroup tree.
pub fn boot() -> Result<Boot, BootError> {
    let children = step("watch for ended children", sys::watch_children())?;
    make_root()?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    // The agent outlives every container; the stage resets this for what it starts.
    step(
        "protect the agent from the OOM killer",
        fs::write("/proc/self/oom_score_adj", "-1000"),
    )?;
    let limit = Rlimit {
        current: Some(DESCRIPTORS),
        maximum: Some(DESCRIPTORS),
    };
    step(
        "allow the agent its descriptors",
        rustix::process::setrlimit(Resource::Nofile, limit),
    )?;
    open_cgroups()?;
    if let Err(error) = network::raise_loopback() {
        console::say(&format!("loopback stays down: {error}"));
    }
    Ok(Boot {
        id: draw_id()?,
        children,
    })
}

/// Leaves the initramfs: pivot_root(2), which containers need, refuses to work on it. The agent's
/// program stays there, so it takes its memory once, behind a mount that nobody can write to.
fn make_root() -> Result<(), BootError> {
    step("make a directory for the root", make_directory(NEW_ROOT))?;
    mount(NEW_ROOT, "tmpfs", MountFlags::NODEV, "mode=0755")?;
    for name in ["etc", "dev"] {
        step(
            "fill the root",
            make_directory(&format!("{NEW_ROOT}/{name}")),
        )?;
    }
    for (place, kind, flags, options) in MOUNTS {
        let place = format!("{NEW_ROOT}{place}");
        step("make a mount point", make_directory(&place))?;
        mount(&place, kind, flags, options)?;
    }
    step(
        "make the initramfs read-only",
        rustix::mount::mount_remount("/", MountFlags::BIND | MountFlags::RDONLY, c""),
    )?;
    step("enter the new root", rustix::process::chdir(NEW_ROOT))?;
    step("move the new root", rustix::mount::mount_move(".", "/"))?;
    step("change the root", rustix::process::chroot("."))?;
    step("change directory", rustix::process::chdir("/"))
}

fn make_directory(path: &str) -> io::Result<()> {
    if Path::new(path).is_dir() {
        return Ok(());
    }
    fs::create_dir_all(path)
}

fn mount(
    place: &str,
    kind: &'static str,
    flags: MountFlags,
    options: &str,
) -> Result<(), BootError> {
    let failed = |source: io::Error| BootError::Mount {
        kind,
        place: place.to_owned(),
        source,
    };
    let options = std::ffi::CString::new(options).map_err(|error| failed(error.into()))?;
    rustix::mount::mount(kind, place, kind, flags, options.as_c_str())
        .map_err(|error| failed(error.into()))
}

/// Offers every controller of the kernel to the containers' cgroups.
fn open_cgroups() -> Result<(), BootError> {
    const TREE: &str = "/sys/fs/cgroup";
    let known = step(
        "read cgroup.controllers",
        fs::read_to_string(format!("{TREE}/cgroup.controllers")),
    )?;
    step(
        "make the pod's cgroup",
        make_directory(crate::container::cgroup::POD),
    )?;
    for controller in known.split_whitespace() {
        for place in [TREE, crate::container::cgroup::POD] {
            // One by one: a controller that cannot be had must not take the others with it.
            if let Err(error) = fs::write(
                format!("{place}/cgroup.subtree_control"),
                format!("+{controller}"),
            ) {
                console::say(&format!(
                    "no cgroup controller {controller} in {place}: {error}"
                ));
            }
        }
    }
    if let Err(error) = crate::container::cgroup::bound_pod() {
        console::say(&error.to_string());
    }
    Ok(())
}

/// It names this boot to the server; it need not be secret, so it does not wait for the random
/// generator to be seeded.
fn draw_id() -> Result<String, BootError> {
    let mut bytes = [0_u8; 16];
    step(
        "draw the boot id",
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::INSECURE),
    )?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

//! The first process of a PID namespace that a pod's containers share. It only lives, and takes
//! the orphans.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;

use crate::container::launch::{self, LaunchError};
use crate::container::message::{self, Message};
use crate::container::rootfs;
use crate::sys;

/// Makes the namespace and its process; answers the namespace. Blocks.
pub fn start() -> Result<OwnedFd, LaunchError> {
    let failed = |source| LaunchError::Step {
        what: "make the pod's PID namespace",
        source,
    };
    let socket = launch::start(crate::PAUSE).map_err(failed)?;
    let pid = launch::process(socket.as_fd())?;
    let namespace = File::open(format!("/proc/{pid}/ns/pid")).map_err(failed)?;
    match message::receive(socket.as_fd()).map_err(failed)? {
        Some((Message::Ready, _)) => Ok(namespace.into()),
        Some((Message::Failed(words), _)) => Err(LaunchError::Stage(words)),
        _ => Err(LaunchError::Ended),
    }
}

/// The pause process's `main`. Standard input is the socket to the agent.
pub fn main() -> ExitCode {
    let Ok(socket) = std::io::stdin().as_fd().try_clone_to_owned() else {
        return ExitCode::FAILURE;
    };
    match run(socket.as_fd()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let failed = Message::Failed(error.to_string());
            let _ = message::send(socket.as_fd(), &failed, &[]);
            ExitCode::FAILURE
        }
    }
}

fn run(socket: BorrowedFd<'_>) -> std::io::Result<()> {
    use rustix::process::{DumpableBehavior, set_dumpable_behavior, setsid};
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    sys::unshare(libc::CLONE_NEWPID)?;
    if !message::fork_and_tell(socket)? {
        return Ok(());
    }
    setsid()?;
    // Every container of the pod sees this process: it must lead nowhere.
    sys::unshare(libc::CLONE_NEWNS | libc::CLONE_NEWCGROUP)?;
    rootfs::leave().map_err(std::io::Error::other)?;
    sys::ignore_children();
    message::send(socket, &Message::Ready, &[])?;
    let nothing = rustix::fs::memfd_create("stdio", rustix::fs::MemfdFlags::CLOEXEC)?;
    rustix::stdio::dup2_stdin(&nothing)?;
    rustix::stdio::dup2_stdout(&nothing)?;
    rustix::stdio::dup2_stderr(&nothing)?;
    sys::close_from(3)?;
    loop {
        sys::sleep_for_ever();
    }
}

//! A pod with a user namespace: its network, IPC and host name belong to that namespace, so that
//! its containers' capabilities hold for them and for nothing else of the guest.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;

use crate::container::launch::{self, LaunchError};
use crate::container::mapping::Mapping;
use crate::container::message::{self, Message};
use crate::sys;

/// A pod's own namespaces.
#[derive(Debug)]
pub struct Apart {
    /// Which ids its containers have.
    pub mapping: Mapping,
    /// The user namespace, which owns the others.
    pub user: OwnedFd,
    /// Of the network.
    pub network: OwnedFd,
    /// Of System V IPC and POSIX message queues.
    pub ipc: OwnedFd,
    /// Of the host name.
    pub uts: OwnedFd,
}

impl Apart {
    /// Makes the namespaces. They live as long as this. Blocks.
    pub fn make(mapping: Mapping) -> Result<Self, LaunchError> {
        let failed = |source| LaunchError::Step {
            what: "make the pod's user namespace",
            source,
        };
        let socket = launch::start(crate::APART).map_err(failed)?;
        let pid = launch::process(socket.as_fd())?;
        let [users, groups] = mapping.files();
        for (file, ranges) in [("uid_map", users), ("gid_map", groups)] {
            fs::write(format!("/proc/{pid}/{file}"), &ranges).map_err(|error| {
                LaunchError::Stage(format!(
                    "user namespace: the kernel does not take the ranges {:?}: {error}",
                    ranges.trim_end()
                ))
            })?;
        }
        message::send(socket.as_fd(), &Message::Go, &[]).map_err(failed)?;
        match message::receive(socket.as_fd()).map_err(failed)? {
            Some((Message::Ready, _)) => {}
            Some((Message::Failed(words), _)) => return Err(LaunchError::Stage(words)),
            _ => return Err(LaunchError::Ended),
        }
        // The process waits until the socket closes.
        let open = |name| {
            let file = File::open(format!("/proc/{pid}/ns/{name}"));
            file.map(OwnedFd::from).map_err(failed)
        };
        Ok(Self {
            mapping,
            user: open("user")?,
            network: open("net")?,
            ipc: open("ipc")?,
            uts: open("uts")?,
        })
    }

    /// Runs something on a thread inside the pod's network, IPC and host name, as the guest's root.
    pub fn inside<T: Send, E: From<LaunchError> + Send>(
        &self,
        work: impl FnOnce() -> Result<T, E> + Send,
    ) -> Result<T, E> {
        let failed = |source| LaunchError::Step {
            what: "work inside the pod's namespaces",
            source,
        };
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                sys::enter(self.network.as_fd(), libc::CLONE_NEWNET).map_err(failed)?;
                sys::enter(self.ipc.as_fd(), libc::CLONE_NEWIPC).map_err(failed)?;
                sys::enter(self.uts.as_fd(), libc::CLONE_NEWUTS).map_err(failed)?;
                work()
            });
            let died = |_| Err(failed(io::Error::other("it died")).into());
            inside.join().unwrap_or_else(died)
        })
    }

    /// In the order of [`enter`].
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 4] {
        [&self.user, &self.network, &self.ipc, &self.uts].map(AsFd::as_fd)
    }
}

/// The `main` of the process that makes the namespaces. Standard input is the socket to the agent.
pub fn main() -> ExitCode {
    let Ok(socket) = io::stdin().as_fd().try_clone_to_owned() else {
        return ExitCode::FAILURE;
    };
    match run(socket.as_fd()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let failed = Message::Failed(format!("cannot make a user namespace: {error}"));
            let _ = message::send(socket.as_fd(), &failed, &[]);
            ExitCode::FAILURE
        }
    }
}

fn run(socket: BorrowedFd<'_>) -> io::Result<()> {
    sys::unshare(libc::CLONE_NEWUSER)?;
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    message::send(socket, &Message::Process(pid), &[])?;
    if !matches!(message::receive(socket)?, Some((Message::Go, _))) {
        return Ok(());
    }
    sys::unshare(libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS)?;
    message::send(socket, &Message::Ready, &[])?;
    message::receive(socket).map(drop)
}

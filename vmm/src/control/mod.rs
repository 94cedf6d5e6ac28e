//! The VMM's end of `control.sock`: one server at a time, the newest.

mod answered;
mod peer;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use bulkhead_vmm_api::control::{Action, FromVmm, Reply, ToVmm};
use bulkhead_vmm_api::wire;
use rustix::fs::OFlags;
use rustix::net::SocketFlags;

use crate::device::virtio::vsock::Answers;
use crate::files::Files;
use crate::journal;
use answered::Answered;
pub use peer::{Announcer, Peer};

/// The longest id of an operation, in bytes.
const MAX_OPERATION_BYTES: usize = 128;

/// Performs the actions that are asked for.
pub trait Perform {
    /// Performs one; the error is a sentence for the operator.
    fn perform(&mut self, action: Action, files: Files) -> Result<Reply, String>;
}

/// The listening socket and the connection.
pub struct Control {
    listener: OwnedFd,
    peer: Arc<Peer>,
    answers: Answers,
    answered: Answered,
    /// The user that started this process: beside root, the only one who may be the server.
    owner: u32,
}

impl Control {
    /// Serves those who connect to `listener`. Dials are announced through `peer`, and what the
    /// server answers to them goes to `answers`.
    pub fn new(listener: OwnedFd, peer: Arc<Peer>, answers: Answers) -> std::io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&listener)?;
        rustix::fs::fcntl_setfl(&listener, flags | OFlags::NONBLOCK)?;
        let owner = rustix::process::getuid().as_raw();
        Ok(Self {
            listener,
            peer,
            answers,
            answered: Answered::default(),
            owner,
        })
    }

    /// Readable when [`Control::accept`] has something to do.
    pub fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// The connection, readable when [`Control::serve`] has something to do.
    pub fn connection(&self) -> Option<Arc<OwnedFd>> {
        self.peer.connection()
    }

    /// Takes a new connection in place of the one before.
    pub fn accept(&mut self) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let Ok(socket) = rustix::net::accept_with(&self.listener, flags) else {
            return; // it went away again
        };
        match rustix::net::sockopt::socket_peercred(&socket) {
            Ok(peer) if [0, self.owner].contains(&peer.uid.as_raw()) => {
                if self.peer.replace(Some(socket)) {
                    self.answers.server_gone();
                }
            }
            _ => journal::write(format_args!(
                "A connection to the control socket by another user was refused."
            )),
        }
    }

    /// Serves one packet of the connection.
    pub fn serve(&mut self, performer: &mut impl Perform) {
        let Some(socket) = self.peer.connection() else {
            return;
        };
        match wire::accept(&socket) {
            Ok(Some((ToVmm::Stream { stream }, descriptors))) => {
                self.answers.answer(stream, descriptors.into_iter().next());
            }
            Ok(Some((ToVmm::Request { operation, action }, descriptors))) => {
                let result = self.result(&operation, || {
                    performer.perform(action, Files::received(descriptors))
                });
                let reply = FromVmm::Reply { operation, result };
                if let Err(error) = wire::announce(&socket, &reply) {
                    self.end(&error);
                }
            }
            Ok(None) => {
                self.peer.replace(None);
                self.answers.server_gone();
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => self.end(&error),
        }
    }

    /// What came of an operation, which is performed unless it was before.
    fn result(
        &mut self,
        operation: &str,
        perform: impl FnOnce() -> Result<Reply, String>,
    ) -> Result<Reply, String> {
        if operation.len() > MAX_OPERATION_BYTES {
            return Err(format!(
                "An operation's id is longer than {MAX_OPERATION_BYTES} bytes."
            ));
        }
        if let Some(result) = self.answered.result(operation) {
            return result;
        }
        let result = perform();
        self.answered.keep(operation, &result);
        result
    }

    fn end(&mut self, error: &std::io::Error) {
        journal::write(format_args!("The control connection ended: {error}."));
        self.peer.replace(None);
        self.answers.server_gone();
    }
}

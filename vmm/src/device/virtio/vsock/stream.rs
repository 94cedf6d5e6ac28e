//! A connection joined with the host's socket.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use super::connection::Connection;
use super::packet::Header;

/// What the kernel has said about a socket since it was last tried (edge triggered).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Readiness {
    /// There may be bytes, the end or an error to read.
    pub readable: bool,
    /// There may be room to write.
    pub writable: bool,
    /// The other end is closed in both directions.
    pub hung_up: bool,
}

/// A connection with its socket and its time limit.
pub struct Stream {
    /// The state machine.
    pub connection: Connection,
    /// Whether the stream stands in the queue of those that have something for the guest.
    pub queued: bool,
    socket: Option<OwnedFd>,
    readable: bool,
    writable: bool,
    timer: Option<(Duration, Instant)>,
}

impl Stream {
    /// A connection without a socket yet.
    pub fn new(connection: Connection) -> Self {
        Self {
            connection,
            queued: false,
            socket: None,
            readable: false,
            writable: false,
            timer: None,
        }
    }

    /// Gives the stream its socket, which is tried at once.
    pub fn join(&mut self, socket: OwnedFd) {
        self.connection.accept();
        self.socket = Some(socket);
        self.readable = true;
        self.writable = true;
    }

    /// When the connection expires.
    pub fn deadline(&self) -> Option<Instant> {
        self.timer.map(|(_, deadline)| deadline)
    }

    /// Takes news of the socket.
    pub fn wake(&mut self, news: Readiness) {
        self.readable |= news.readable;
        self.writable |= news.writable;
        if news.hung_up {
            self.connection.host_goes_deaf();
        }
    }

    /// Does everything that needs no buffer of the guest: expires, writes to the socket, shuts it
    /// down, closes it.
    pub fn settle(&mut self, now: Instant) {
        if self.deadline().is_some_and(|deadline| deadline <= now) {
            self.connection.expire();
        }
        self.flush();
        if let Some(socket) = &self.socket {
            let due = self.connection.socket_shutdown();
            // A socket that is closed already cannot be shut down; it says so when read.
            if due.read {
                let _ = shutdown(socket, Shutdown::Read);
            }
            if due.write {
                let _ = shutdown(socket, Shutdown::Write);
            }
        }
        if !self.connection.has_host() {
            self.socket = None;
        }
        if self.readable && self.connection.room() == 0 {
            self.connection.starve();
        }
        let limit = self.connection.limit();
        if limit != self.timer.map(|(limit, _)| limit) {
            // No limit comes near the end of the clock.
            self.timer = limit.and_then(|limit| Some((limit, now.checked_add(limit)?)));
        }
    }

    /// Whether [`Self::packet`] may have something.
    pub fn wants_turn(&self) -> bool {
        self.connection.has_control()
            || (self.readable && self.socket.is_some() && self.connection.room() > 0)
    }

    /// The next packet for the guest, with its payload, if any, in the first bytes of `payload`.
    pub fn packet(&mut self, payload: &mut [u8]) -> Option<Header> {
        loop {
            if let Some(header) = self.connection.control() {
                return Some(header);
            }
            let room = self.connection.room().min(payload.len());
            let target = payload.get_mut(..room)?;
            let socket = self.socket.as_ref()?;
            if !self.readable || target.is_empty() {
                return None;
            }
            match recv(socket, target, RecvFlags::DONTWAIT) {
                Ok((0, _)) => {
                    self.readable = false;
                    // The guest tells an end from a host that is gone by hearing of both at once.
                    if is_closed(socket) {
                        self.connection.host_goes_deaf();
                    }
                    self.connection.host_ends();
                }
                Ok((count, _)) => return Some(self.connection.data(count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.readable = false;
                    return None;
                }
                // Linux reports ECONNRESET when the other end was closed with unread bytes.
                Err(_) => {
                    self.readable = false;
                    self.connection.host_goes_deaf();
                    self.connection.host_ends();
                }
            }
        }
    }

    fn flush(&mut self) {
        let Some(socket) = &self.socket else { return };
        while self.writable {
            let (bytes, _) = self.connection.outgoing();
            if bytes.is_empty() {
                return;
            }
            match send(socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => self.connection.forward(count),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.writable = false,
                Err(_) => self.connection.host_goes_deaf(),
            }
        }
    }
}

/// Whether the other end is closed in both directions.
fn is_closed(socket: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(socket, PollFlags::empty())];
    let at_once = Timespec::default();
    poll(&mut polled, Some(&at_once)).is_ok() && polled[0].revents().contains(PollFlags::HUP)
}

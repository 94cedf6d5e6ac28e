//! The server's end of `control.sock`.

use std::collections::VecDeque;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::control::{Action, FromVmm, Reply, ToVmm};
use crate::{OpenDevice, wire};

/// A connection to a VMM. Its socket does not block: an async server waits for [`Control::as_fd`]
/// to become readable or writable and calls [`Control::send`] and [`Control::receive`]; a plain
/// program calls [`Control::request`].
#[derive(Debug)]
pub struct Control {
    socket: OwnedFd,
    /// Dials that came while a reply was waited for.
    waiting: VecDeque<FromVmm>,
}

impl Control {
    /// Makes the socket at `path` on which a VMM shall listen, for [`crate::Launch::control`].
    /// A socket left there is replaced. `path` may be longer than a socket's address.
    pub fn listen(path: &Path) -> Result<OwnedFd> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let socket = socket()?;
        let (_directory, address) = address(path)?;
        rustix::net::bind(&socket, &address)?;
        rustix::net::listen(&socket, 4)?;
        Ok(socket)
    }

    /// Connects to the VMM that listens at `path`; an older connection ends by that.
    pub fn connect(path: &Path) -> Result<Self> {
        let socket = socket()?;
        let (_directory, address) = address(path)?;
        rustix::net::connect(&socket, &address)?;
        Ok(Self {
            socket,
            waiting: VecDeque::new(),
        })
    }

    /// Sends one message; the descriptors are those that it names by index.
    pub fn send(&self, message: &ToVmm, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        wire::send(&self.socket, message, descriptors)
    }

    /// Receives one message; `None` when the VMM has ended or taken a newer connection.
    pub fn receive(&mut self) -> Result<Option<FromVmm>> {
        match self.waiting.pop_front() {
            Some(message) => Ok(Some(message)),
            None => wire::receive(&self.socket),
        }
    }

    /// Asks for `action` and waits for the reply. Dials that come meanwhile are kept for
    /// [`Control::receive`]. The VMM's refusal is [`ErrorKind::Other`] with its sentence.
    pub fn request(&mut self, operation: &str, action: Action) -> Result<Reply> {
        self.ask(operation, action, &[])
    }

    /// Attaches `device` and waits for its window.
    pub fn attach(&mut self, operation: &str, device: &OpenDevice) -> Result<u8> {
        let files: Vec<BorrowedFd<'_>> = device.files().iter().map(AsFd::as_fd).collect();
        let action = Action::Attach {
            device: device.device().clone(),
        };
        match self.ask(operation, action, &files)? {
            Reply::Attached { window } => Ok(window),
            other => Err(Error::other(format!(
                "The VMM answered an attach with {other:?}"
            ))),
        }
    }

    fn ask(
        &mut self,
        operation: &str,
        action: Action,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Reply> {
        let request = ToVmm::Request {
            operation: operation.to_owned(),
            action,
        };
        while let Err(error) = wire::send(&self.socket, &request, descriptors) {
            self.wait(error, PollFlags::OUT)?;
        }
        loop {
            match wire::receive(&self.socket) {
                Ok(Some(FromVmm::Reply {
                    operation: answered,
                    result,
                })) if answered == operation => {
                    return result.map_err(Error::other);
                }
                Ok(Some(message)) => self.waiting.push_back(message),
                Ok(None) => return Err(ErrorKind::UnexpectedEof.into()),
                Err(error) => self.wait(error, PollFlags::IN)?,
            }
        }
    }

    fn wait(&self, error: Error, event: PollFlags) -> Result<()> {
        if error.kind() != ErrorKind::WouldBlock {
            return Err(error);
        }
        rustix::event::poll(&mut [PollFd::new(&self.socket, event)], None)?;
        Ok(())
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl From<OwnedFd> for Control {
    /// Takes a connected, non-blocking `SOCK_SEQPACKET` socket.
    fn from(socket: OwnedFd) -> Self {
        Self {
            socket,
            waiting: VecDeque::new(),
        }
    }
}

fn socket() -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        flags,
        None,
    )?)
}

/// A socket's address holds 107 bytes, which a path of a pod exceeds: its directory is named by a
/// descriptor, which has to stay open while the address is used.
fn address(path: &Path) -> Result<(OwnedFd, SocketAddrUnix)> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "A control socket's path names a file",
        ));
    };
    let directory = if directory.as_os_str().is_empty() {
        Path::new(".")
    } else {
        directory
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(directory, flags, Mode::empty())?;
    let number = std::os::fd::AsRawFd::as_raw_fd(&directory);
    let short = Path::new("/proc/self/fd")
        .join(number.to_string())
        .join(name);
    Ok((directory, SocketAddrUnix::new(short)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_path_can_be_listened_on_and_connected_to() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("d".repeat(150));
        std::fs::create_dir(&directory).unwrap();
        let path = directory.join("control.sock");
        drop(Control::listen(&path).unwrap());
        let listener = Control::listen(&path).unwrap();
        let mut control = Control::connect(&path).unwrap();
        let vmm = rustix::net::accept(&listener).unwrap();
        let dial = FromVmm::Dial {
            stream: 1,
            port: 1024,
        };
        let answer = FromVmm::Reply {
            operation: "1".into(),
            result: Err("no".into()),
        };
        wire::announce(&vmm, &dial).unwrap();
        wire::announce(&vmm, &answer).unwrap();
        let refusal = control.request("1", Action::Pause).unwrap_err();
        assert_eq!(refusal.to_string(), "no");
        assert_eq!(control.receive().unwrap(), Some(dial));
    }
}

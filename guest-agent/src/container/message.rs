//! What the agent and a stage say to each other, over a SEQPACKET socket pair.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

/// Most descriptors of a message.
const DESCRIPTORS: usize = 12;
/// Longest text of a failure, in bytes.
const LONGEST: usize = 4096;

/// A message.
#[derive(Debug, PartialEq, Eq)]
pub enum Message {
    /// To the stage, with descriptors: the plan; stdin, stdout, stderr unless the plan calls for
    /// a terminal; the pod's namespaces of user, network, IPC and host name when the plan has a
    /// mapping of ids; and that of a namespace or process when the plan calls for one.
    Plan,
    /// From the stage: the process that will be the container's.
    Process(i32),
    /// From that process: all is ready but its exec. With the master of its terminal, if it has
    /// one.
    Ready,
    /// To it: exec; to the process that makes a user namespace: its ids are there.
    Go,
    /// From either, before it ends. The text is a whole sentence.
    Failed(String),
    /// From the stage, before it ends: there may be no more processes. The text is a whole sentence.
    Full(String),
}

impl Message {
    fn encode(&self) -> Vec<u8> {
        match self {
            Self::Plan => vec![b'P'],
            Self::Process(pid) => [b"N".as_slice(), &pid.to_le_bytes()].concat(),
            Self::Ready => vec![b'R'],
            Self::Go => vec![b'G'],
            Self::Failed(text) => tagged(b'F', text),
            Self::Full(text) => tagged(b'E', text),
        }
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (tag, rest) = bytes.split_first()?;
        Some(match (tag, rest) {
            (b'P', []) => Self::Plan,
            (b'N', pid) => Self::Process(i32::from_le_bytes(pid.try_into().ok()?)),
            (b'R', []) => Self::Ready,
            (b'G', []) => Self::Go,
            (b'F', text) => Self::Failed(String::from_utf8_lossy(text).into_owned()),
            (b'E', text) => Self::Full(String::from_utf8_lossy(text).into_owned()),
            _ => return None,
        })
    }
}

fn tagged(tag: u8, text: &str) -> Vec<u8> {
    let text = text.bytes().take(LONGEST);
    std::iter::once(tag).chain(text).collect()
}

/// Sends a message with descriptors.
pub fn send(socket: BorrowedFd<'_>, message: &Message, with: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !with.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(with)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let bytes = message.encode();
    rustix::net::sendmsg(
        socket,
        &[IoSlice::new(&bytes)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

/// Receives a message with its descriptors; `None` when the other end is closed.
pub fn receive(socket: BorrowedFd<'_>) -> io::Result<Option<(Message, Vec<OwnedFd>)>> {
    let mut bytes = [0; LONGEST + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        match rustix::net::recvmsg(
            socket.as_fd(),
            &mut parts,
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Err(rustix::io::Errno::INTR) => {}
            done => break done?,
        }
    };
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    let cut = received
        .flags
        .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
    bytes
        .get(..received.bytes)
        .filter(|_| !cut)
        .and_then(Message::decode)
        .map(|message| Some((message, descriptors)))
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Splits the process, see [`crate::sys::fork`], and tells the agent the child's number, before
/// the child can say a word itself. `true` in the child.
pub fn fork_and_tell(socket: BorrowedFd<'_>) -> io::Result<bool> {
    let (told, telling) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    match crate::sys::fork()? {
        Some(pid) => {
            send(socket, &Message::Process(pid), &[])?;
            Ok(false)
        }
        None => {
            drop(telling);
            // The end of the pipe: the parent has closed its side, by ending.
            rustix::io::retry_on_intr(|| rustix::io::read(&told, &mut [0]))?;
            Ok(true)
        }
    }
}

/// A pair of sockets for one stage.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_and_descriptors_cross() {
        let (here, there) = pair().unwrap();
        let with = [here.as_fd(), there.as_fd()];
        send(here.as_fd(), &Message::Plan, &with).unwrap();
        let (message, descriptors) = receive(there.as_fd()).unwrap().unwrap();
        assert_eq!((message, descriptors.len()), (Message::Plan, 2));
        for message in [
            Message::Process(4711),
            Message::Ready,
            Message::Go,
            Message::Failed("cannot".into()),
            Message::Full("too many".into()),
        ] {
            send(there.as_fd(), &message, &[]).unwrap();
            assert_eq!(receive(here.as_fd()).unwrap().unwrap().0, message);
        }
        drop((descriptors, there));
        assert!(receive(here.as_fd()).unwrap().is_none());
    }

    #[test]
    fn a_long_failure_is_cut_not_lost() {
        let (here, there) = pair().unwrap();
        send(here.as_fd(), &Message::Failed("x".repeat(10_000)), &[]).unwrap();
        let (message, _) = receive(there.as_fd()).unwrap().unwrap();
        assert_eq!(message, Message::Failed("x".repeat(LONGEST)));
    }
}

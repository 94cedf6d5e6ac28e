//! Packets of `control.sock`, on sockets in either blocking mode.
//!
//! Every function fails with the socket's error; on a non-blocking socket that may be
//! [`std::io::ErrorKind::WouldBlock`], after which the same call can be made again. A packet that
//! is not a message is [`std::io::ErrorKind::InvalidData`].

use std::io::{Error, ErrorKind, IoSlice, IoSliceMut, Result};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::control::{FromVmm, MAX_PACKET_BYTES, MAX_PACKET_FDS, ToVmm};

/// Room for the descriptors of one packet.
const ANCILLARY_BYTES: usize = rustix::cmsg_space!(ScmRights(MAX_PACKET_FDS));

/// Server to VMM. The descriptors are those that the message names by index.
pub fn send(socket: impl AsFd, message: &ToVmm, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
    write(socket.as_fd(), message, descriptors)
}

/// Server from VMM; `None` when the VMM has closed. Descriptors never come this way: the kernel
/// drops any that are sent.
pub fn receive(socket: impl AsFd) -> Result<Option<FromVmm>> {
    Ok(read(socket.as_fd(), &mut RecvAncillaryBuffer::default())?.map(|(message, _)| message))
}

/// VMM to server.
pub fn announce(socket: impl AsFd, message: &FromVmm) -> Result<()> {
    write(socket.as_fd(), message, &[])
}

/// VMM from server, with the descriptors that came along; `None` when the server has closed.
pub fn accept(socket: impl AsFd) -> Result<Option<(ToVmm, Vec<OwnedFd>)>> {
    let mut space = [MaybeUninit::uninit(); ANCILLARY_BYTES];
    read(socket.as_fd(), &mut RecvAncillaryBuffer::new(&mut space))
}

fn write(
    socket: BorrowedFd<'_>,
    message: &impl Serialize,
    descriptors: &[BorrowedFd<'_>],
) -> Result<()> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MAX_PACKET_BYTES || descriptors.len() > MAX_PACKET_FDS {
        let why = format!(
            "The control message of {} bytes and {} descriptors is larger than the allowed \
             {MAX_PACKET_BYTES} and {MAX_PACKET_FDS}",
            bytes.len(),
            descriptors.len()
        );
        return Err(Error::new(ErrorKind::InvalidInput, why));
    }
    let mut space = [MaybeUninit::uninit(); ANCILLARY_BYTES];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(Error::from(ErrorKind::InvalidInput));
    }
    let parts = [IoSlice::new(&bytes)];
    loop {
        match rustix::net::sendmsg(socket, &parts, &mut ancillary, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            result => return Ok(result.map(|_| ())?),
        }
    }
}

fn read<T: DeserializeOwned>(
    socket: BorrowedFd<'_>,
    ancillary: &mut RecvAncillaryBuffer<'_>,
) -> Result<Option<(T, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; MAX_PACKET_BYTES];
    let received = loop {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        match rustix::net::recvmsg(socket, &mut parts, ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            result => break result?,
        }
    };
    let descriptors: Vec<OwnedFd> = ancillary
        .drain()
        .filter_map(|part| match part {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    if received.bytes == 0 {
        return Ok(None);
    }
    if received.flags.contains(ReturnFlags::TRUNC) {
        let why = format!("A control packet is larger than {MAX_PACKET_BYTES} bytes");
        return Err(Error::new(ErrorKind::InvalidData, why));
    }
    let message = bytes
        .get(..received.bytes)
        .ok_or(ErrorKind::InvalidData)
        .map(serde_json::from_slice)??;
    Ok(Some((message, descriptors)))
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;
    use crate::control::{Action, Reply};

    fn pair() -> (OwnedFd, OwnedFd) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
    }

    fn stats() -> ToVmm {
        ToVmm::Request {
            operation: "1".into(),
            action: Action::Stats,
        }
    }

    #[test]
    fn a_request_arrives_with_all_its_descriptors() {
        let (server, vmm) = pair();
        let descriptors = vec![server.as_fd(); MAX_PACKET_FDS];
        send(&server, &stats(), &descriptors).unwrap();
        let (message, arrived) = accept(&vmm).unwrap().unwrap();
        assert_eq!(message, stats());
        assert_eq!(arrived.len(), MAX_PACKET_FDS);
    }

    #[test]
    fn an_answer_arrives_without_the_descriptors_that_a_hostile_vmm_adds() {
        let (server, vmm) = pair();
        let reply = FromVmm::Reply {
            operation: "1".into(),
            result: Ok(Reply::Done),
        };
        write(vmm.as_fd(), &reply, &[vmm.as_fd()]).unwrap();
        let before = std::fs::read_dir("/proc/self/fd").unwrap().count();
        assert_eq!(receive(&server).unwrap(), Some(reply));
        assert_eq!(std::fs::read_dir("/proc/self/fd").unwrap().count(), before);
    }

    #[test]
    fn what_is_not_a_message_is_an_error_and_the_end_is_none() {
        let (server, vmm) = pair();
        assert_eq!(receive(&server).unwrap_err().kind(), ErrorKind::WouldBlock);
        rustix::net::send(&vmm, b"{}", SendFlags::empty()).unwrap();
        assert_eq!(receive(&server).unwrap_err().kind(), ErrorKind::InvalidData);
        drop(vmm);
        assert_eq!(receive(&server).unwrap(), None);
    }

    #[test]
    fn an_oversized_message_is_not_sent() {
        let (server, _vmm) = pair();
        let operation = "x".repeat(MAX_PACKET_BYTES);
        let large = ToVmm::Request {
            operation,
            action: Action::Stats,
        };
        assert_eq!(
            send(&server, &large, &[]).unwrap_err().kind(),
            ErrorKind::InvalidInput
        );
    }
}

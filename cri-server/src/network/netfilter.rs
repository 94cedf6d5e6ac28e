//! Questions to the kernel's packet filter, by netlink (linux/netfilter/nfnetlink.h).

use std::io;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
};

/// Connection tracking.
pub const CTNETLINK: u16 = 1 << 8;
/// Tables and rules.
pub const NF_TABLES: u16 = 10 << 8;

/// `NLM_F_DUMP`: every object, rather than one.
pub const DUMP: u16 = 0x300;
/// `NLM_F_REQUEST` and `NLM_F_ACK`: the last answer says how it went.
const REQUEST: u16 = 0x5;
/// `NLMSG_ERROR`, with 0 for success, and `NLMSG_DONE`, after a dump.
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// `struct nlmsghdr`, and `struct nfgenmsg` behind it.
const HEADER: usize = 16;
const GENERIC: usize = 4;
/// The most the kernel puts into one datagram (`NETLINK_DUMP` buffers in af_netlink.c), in bytes.
const DATAGRAM: usize = 32 << 10;

/// Sends a message of the kind, for a protocol family, and hands the attributes of each object of
/// the answer to `object`. Blocks for as long as the kernel works.
pub fn ask(
    kind: u16,
    flags: u16,
    family: u8,
    attributes: &[u8],
    mut object: impl FnMut(&[u8]),
) -> Result<(), Errno> {
    let length = HEADER + GENERIC + attributes.len();
    let mut message = u32::try_from(length)
        .map_err(|_| Errno::MSGSIZE)?
        .to_ne_bytes()
        .to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend((REQUEST | flags).to_ne_bytes());
    // Number and sender, which the socket tells.
    message.extend([0; 8]);
    message.extend([family, 0, 0, 0]);
    message.extend(attributes);
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        Some(netlink::NETFILTER),
    )?;
    send(&socket, &message, SendFlags::empty())?;
    let mut buffer = vec![0; DATAGRAM];
    loop {
        // The next part is there by the time the last one is read.
        let (read, _) = recv(&socket, &mut buffer[..], RecvFlags::DONTWAIT)?;
        let mut rest = buffer.get(..read).unwrap_or_default();
        while let Some((kind, body, after)) = part(rest) {
            rest = after;
            match kind {
                DONE => return Ok(()),
                ERROR => return error(body),
                _ => object(body.get(GENERIC..).unwrap_or_default()),
            }
        }
        if !rest.is_empty() {
            return Err(Errno::BADMSG);
        }
    }
}

/// The first message: its kind, what it holds, and what is behind it.
fn part(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(*bytes.first_chunk()?);
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let length = usize::try_from(length).ok()?;
    let body = bytes.get(HEADER..length)?;
    let after = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, body, after))
}

fn error(body: &[u8]) -> Result<(), Errno> {
    let code = body.first_chunk().map(|code| i32::from_ne_bytes(*code));
    match code.ok_or(Errno::BADMSG)?.checked_neg() {
        Some(0) => Ok(()),
        Some(code) => {
            Err(Errno::from_io_error(&io::Error::from_raw_os_error(code)).unwrap_or(Errno::BADMSG))
        }
        None => Err(Errno::BADMSG),
    }
}

/// An attribute (`struct nlattr`), filled up to a multiple of 4 bytes.
pub fn attribute(kind: u16, value: &[u8]) -> Result<Vec<u8>, Errno> {
    let length = u16::try_from(4 + value.len()).map_err(|_| Errno::MSGSIZE)?;
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    Ok(bytes)
}

/// The value of the first attribute of that kind.
pub fn find(attributes: &[u8], kind: u16) -> Option<&[u8]> {
    // The upper two bits say how a value is written.
    const KIND: u16 = 0x3fff;
    let mut rest = attributes;
    loop {
        let length = usize::from(u16::from_ne_bytes(*rest.first_chunk()?));
        let this = u16::from_ne_bytes(*rest.get(2..)?.first_chunk()?) & KIND;
        let value = rest.get(4..length)?;
        if this == kind {
            return Some(value);
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_found_by_their_kind_and_never_beyond_the_end() {
        let mut all = attribute(1, &[7; 3]).unwrap();
        all.extend(attribute(2 | 0x8000, &[8]).unwrap());
        assert_eq!(find(&all, 1), Some(&[7; 3][..]));
        assert_eq!(find(&all, 2), Some(&[8][..]));
        assert_eq!(find(&all, 3), None);
        for end in 0..all.len() {
            assert_eq!(find(&all[..end.min(12)], 2), None);
        }
        // Lengths of less than a header, and of more than there is.
        assert_eq!(find(&[0, 0, 1, 0, 0, 0, 0, 0], 1), None);
        assert_eq!(find(&[255, 255, 1, 0, 0, 0, 0, 0], 1), None);
    }

    #[test]
    fn what_the_kernel_refuses_is_an_error() {
        let none = |_: &[u8]| panic!("an object");
        assert_eq!(ask(NF_TABLES | 0xff, 0, 1, &[], none), Err(Errno::INVAL));
    }
}

//! Flows to ports of the host, as the kernel's connection tracking remembers them
//! (linux/netfilter/nfnetlink_conntrack.h).
//!
//! A flow is translated as its first packet was. Datagrams have no end that anybody sees, so those
//! of a client that keeps its port would go on to the address of a pod that is gone.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

use rustix::io::Errno;

use super::netfilter::{CTNETLINK, DUMP, ask, attribute, find};
use super::ports::{HostPort, Protocol};

const GET: u16 = CTNETLINK | 1;
const DELETE: u16 = CTNETLINK | 2;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// Attributes of a flow: what its first packet said, its number, and where it is counted.
const ORIGINAL: u16 = 1;
const ID: u16 = 12;
const ZONE: u16 = 18;
/// Attributes of `ORIGINAL`.
const ADDRESSES: u16 = 1;
const PROTOCOL: u16 = 2;
/// Attributes of `ADDRESSES`.
const TO_V4: u16 = 2;
const TO_V6: u16 = 4;
/// Attributes of `PROTOCOL`.
const NUMBER: u16 = 1;
const TO_PORT: u16 = 3;
const UDP: u8 = 17;

/// Makes the kernel forget the flows of datagrams that were sent to these ports of the host, so that
/// the next datagram of each is translated as the rules are now. Answers how many there were. Reads
/// all that is tracked; blocks.
pub fn forget(ports: &[HostPort]) -> Result<usize, Errno> {
    let ports: Vec<_> = ports
        .iter()
        .filter(|port| port.protocol == Protocol::Udp)
        .collect();
    if ports.is_empty() {
        return Ok(0);
    }
    let mut stale = Vec::new();
    for family in [AF_INET, AF_INET6] {
        ask(GET, DUMP, family, &[], |flow| {
            let meant = destination(flow).is_some_and(|(to, number)| {
                let mut ports = ports.iter();
                ports.any(|port| port.port == number && is_at(port.host, to))
            });
            if meant && let Some(name) = name(flow) {
                stale.push((family, name));
            }
        })?;
    }
    for (family, name) in &stale {
        match ask(DELETE, 0, *family, name, |_| {}) {
            // It has ended by itself.
            Err(Errno::NOENT) => {}
            other => other?,
        }
    }
    Ok(stale.len())
}

/// Where the first datagram of a flow was sent to; none of other protocols.
fn destination(flow: &[u8]) -> Option<(IpAddr, u16)> {
    let original = find(flow, ORIGINAL)?;
    let protocol = find(original, PROTOCOL)?;
    if find(protocol, NUMBER)? != [UDP] {
        return None;
    }
    let port = u16::from_be_bytes(*find(protocol, TO_PORT)?.first_chunk()?);
    let addresses = find(original, ADDRESSES)?;
    let to = match find(addresses, TO_V4) {
        Some(four) => Ipv4Addr::from(*four.first_chunk::<4>()?).into(),
        None => Ipv6Addr::from(*find(addresses, TO_V6)?.first_chunk::<16>()?).into(),
    };
    Some((to, port))
}

/// Whether a port that is bound to `host` is reached by `to`.
fn is_at(host: Option<IpAddr>, to: IpAddr) -> bool {
    match host {
        Some(host) if !host.is_unspecified() => host == to,
        Some(host) if host.is_ipv4() != to.is_ipv4() => false,
        // Nobody can be bound to an address that is not this host's.
        _ => UdpSocket::bind((to, 0)).is_ok(),
    }
}

/// What a flow is deleted by.
fn name(flow: &[u8]) -> Option<Vec<u8>> {
    let mut name = Vec::new();
    for kind in [ORIGINAL, ID, ZONE] {
        match find(flow, kind) {
            Some(value) => name.extend(attribute(kind, value).ok()?),
            None if kind == ORIGINAL => return None,
            None => {}
        }
    }
    Some(name)
}

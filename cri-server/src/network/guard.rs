//! What the guest of a pod on the embedded bridge may send: frames that say they are its own.
//!
//! A container that may send what it likes could else take the frames of its neighbours, by their
//! hardware address or by answers to who has theirs. The rules become filters between tap and link
//! (`mirror.rs`), so they cost no program and no look at the host's tables.

use std::net::{Ipv4Addr, Ipv6Addr};

const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;

/// A rule of ours matches frames of one protocol only: a frame with a VLAN tag is of none of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// The EtherType.
    pub protocol: u16,
    /// All of them match.
    pub keys: Vec<Key>,
    pub verdict: Verdict,
}

/// Four bytes of a frame as they are to be, in the order of the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// Where they begin, counted from the end of the Ethernet header.
    pub at: i32,
    pub value: u32,
    /// The bits that count.
    pub mask: u32,
}

/// What becomes of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Pass,
    Refuse,
}

/// A pod's own addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Guard {
    pub mac: [u8; 6],
    pub v4: Ipv4Addr,
    pub v6: Option<Ipv6Addr>,
}

impl Guard {
    /// The first rule that matches counts; what none matches is refused.
    pub fn rules(&self) -> Vec<Rule> {
        let own = self.v4.octets();
        // RFC 826: Ethernet and IPv4, whose addresses have 6 and 4 bytes; then who sends.
        let mut sender = word(4, [6, 4, 0, 0], [0xff, 0xff, 0, 0]).to_vec();
        sender.extend(word(0, [0, 1, 8, 0], [0xff; 4]));
        sender.extend(bytes(8, &[&self.mac[..], &own].concat()));
        let mut rules = vec![
            // `route_localnet` of the bridge, which ports on 127.0.0.1 need, opens the host's loopback.
            self.rule(IPV4, bytes(16, &[127]), Verdict::Refuse),
            self.rule(IPV4, bytes(12, &own), Verdict::Pass),
            self.rule(ARP, sender, Verdict::Pass),
        ];
        let Some(v6) = self.v6 else { return rules };
        let own = [v6, link_local(self.mac)];
        // Neighbour discovery (RFC 4861): an advertisement tells who has an address.
        for address in own {
            let mut advertisement = message(136, 0xff);
            advertisement.extend(bytes(8, &address.octets()));
            advertisement.extend(bytes(48, &address.octets()));
            rules.push(self.rule(IPV6, advertisement, Verdict::Pass));
        }
        // No other advertisement, no redirect (136 and 137), no router (134).
        for keys in [message(136, 0xfe), message(134, 0xff)] {
            rules.push(self.rule(IPV6, keys, Verdict::Refuse));
        }
        // Reports of listeners (RFC 2710 and 3810, behind a header for each hop): without them a bridge
        // that looks into multicast brings nothing, neighbour discovery neither.
        for kind in [131, 132, 143] {
            let mut report = next_header(0);
            report.extend(word(40, [58, 0, 0, 0], [0xff, 0xff, 0, 0]));
            report.extend(word(48, [kind, 0, 0, 0], [0xff, 0, 0, 0]));
            report.extend(bytes(8, &link_local(self.mac).octets()));
            rules.push(self.rule(IPV6, report, Verdict::Pass));
        }
        // A message may hide behind headers (RFC 8200 §4): for each hop, routing, destination. One
        // in fragments is not heard (RFC 6980).
        for header in [0, 43, 60] {
            rules.push(self.rule(IPV6, next_header(header), Verdict::Refuse));
        }
        for address in own {
            rules.push(self.rule(IPV6, bytes(8, &address.octets()), Verdict::Pass));
        }
        rules
    }

    fn rule(&self, protocol: u16, more: Vec<Key>, verdict: Verdict) -> Rule {
        // The source of the Ethernet header: 8 bytes from its end, of which the last 2 are the type.
        let mut keys = bytes(-8, &self.mac);
        keys.extend(more);
        Rule {
            protocol,
            keys,
            verdict,
        }
    }
}

/// The address that an interface gives itself (RFC 4291, appendix A).
fn link_local([a, b, c, d, e, f]: [u8; 6]) -> Ipv6Addr {
    let half = [a ^ 2, b, c, 0xff, 0xfe, d, e, f];
    let mut whole = [0; 16];
    whole[..2].copy_from_slice(&[0xfe, 0x80]);
    whole[8..].copy_from_slice(&half);
    whole.into()
}

/// IPv6 whose first header is this.
fn next_header(number: u8) -> Vec<Key> {
    word(4, [0, 0, number, 0], [0, 0, 0xff, 0]).to_vec()
}

/// ICMPv6 of a type, of which the bits in `mask` count.
fn message(kind: u8, mask: u8) -> Vec<Key> {
    let mut keys = next_header(58);
    keys.extend(word(40, [kind, 0, 0, 0], [mask, 0, 0, 0]));
    keys
}

/// Keys for all of `wanted` from `at` on.
fn bytes(at: i32, wanted: &[u8]) -> Vec<Key> {
    let mut keys = Vec::new();
    for (place, part) in (at..).step_by(4).zip(wanted.chunks(4)) {
        let (mut value, mut mask) = ([0; 4], [0; 4]);
        value[..part.len()].copy_from_slice(part);
        mask[..part.len()].fill(0xff);
        keys.extend(word(place, value, mask));
    }
    keys
}

fn word(at: i32, value: [u8; 4], mask: [u8; 4]) -> [Key; 1] {
    [Key {
        at,
        value: u32::from_be_bytes(value),
        mask: u32::from_be_bytes(mask),
    }]
}

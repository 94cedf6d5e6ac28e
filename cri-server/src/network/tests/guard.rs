//! What the guests of the embedded bridge may send.

use std::net::Ipv6Addr;

use super::six::{icmp6, ipv6};
use super::*;

/// A frame as it is on the wire.
fn frame(to: [u8; 6], from: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes(), payload].concat()
}

/// RFC 826: an answer to nobody's question.
fn answer(mac: [u8; 6], address: Ipv4Addr) -> Vec<u8> {
    let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 2];
    for _ in 0..2 {
        arp.extend(mac);
        arp.extend(address.octets());
    }
    arp
}

/// RFC 4861 §4.4: likewise, over what is there.
fn advertised(target: Ipv6Addr, mac: [u8; 6]) -> Vec<u8> {
    let mut message = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
    message.extend(target.octets());
    message.extend([2, 1]);
    message.extend(mac);
    message
}

/// With a header before the message that says nothing (RFC 8200 §4.6).
fn hidden(mut packet: Vec<u8>, header: u8) -> Vec<u8> {
    let next = std::mem::replace(&mut packet[6], header);
    packet[5] += 8;
    packet.splice(40..40, [next, 0, 1, 4, 0, 0, 0, 0]);
    packet
}

#[test]
fn a_guest_is_heard_only_as_itself() {
    on_new_host(|| async {
        let server = Server::start().await;
        let (mut a, mut b) = (server.pod("a").await, server.pod("b").await);
        let (own, victim, other) = (a.interface.mac, b.interface.mac, [2, 0, 0, 0, 0, 9]);
        let (here, there) = (a.address(), b.address());
        let ((here6, router), (there6, _)) = (ipv6(&a), ipv6(&b));
        let local: Ipv6Addr = "fe80::1".parse().unwrap();
        let all = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
        let (four, arp, six) = (0x0800_u16, 0x0806, 0x86dd);
        let text = |from: Ipv4Addr| udp(from, there, 5000, b"word");
        let echo = |from: Ipv6Addr| icmp6(from, there6, vec![128, 0, 0, 0, 0, 1, 0, 1]);
        let says = |from: Ipv6Addr, target: Ipv6Addr| icmp6(from, all, advertised(target, own));
        let mut tagged = vec![0, 1];
        tagged.extend(four.to_be_bytes());
        tagged.extend(text(here));
        let router_says = |from: Ipv6Addr| {
            let mut message = vec![134, 0, 0, 0, 64, 0, 7, 8];
            message.extend([0; 8]);
            icmp6(from, all, message)
        };
        let forged = [
            ("another hardware address", other, four, text(here)),
            ("the neighbour's", victim, arp, answer(own, here)),
            ("another IPv4 address", own, four, text(there)),
            ("the gateway's", own, four, text(a.gateway())),
            ("the neighbour's by ARP", own, arp, answer(own, there)),
            ("a hardware address in ARP", own, arp, answer(other, here)),
            ("another IPv6 address", own, six, echo(there6)),
            ("the router's", own, six, echo(router)),
            ("another link-local one", own, six, echo(local)),
            ("an advertisement of another", own, six, says(here6, there6)),
            ("one by another", own, six, says(there6, there6)),
            ("a hidden one", own, six, hidden(says(here6, there6), 60)),
            (
                "another hidden one",
                own,
                six,
                hidden(says(here6, there6), 0),
            ),
            ("a router", own, six, router_says(here6)),
            ("a VLAN", own, 0x8100, tagged),
            (
                "another protocol",
                own,
                0x88cc,
                vec![2, 7, 4, 0, 0, 0, 0, 0],
            ),
        ];
        let honest = [
            (four, text(here)),
            (arp, answer(own, here)),
            (six, echo(here6)),
            (six, says(here6, here6)),
        ];
        for (what, from, kind, payload) in forged {
            let frame = frame(victim, from, kind, &payload);
            a.tap
                .write_all(&[&[0; HEADER][..], &frame].concat())
                .unwrap();
            for (kind, payload) in &honest {
                a.send(victim, *kind, payload);
                let seen = b
                    .receive(|seen| seen[..6] == victim && seen[6..12] != bridge::mac(a.gateway()));
                assert_eq!(seen[12..14], kind.to_be_bytes(), "{what} is heard");
                assert!(seen[14..].starts_with(payload), "{what} is heard");
            }
        }
    });
}

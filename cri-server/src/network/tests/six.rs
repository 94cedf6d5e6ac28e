//! IPv6 of the embedded bridge.

use std::net::Ipv6Addr;

use super::*;

pub fn ipv6(pod: &Pod) -> (Ipv6Addr, Ipv6Addr) {
    let address = pod.interface.addresses[1].address;
    let gateway = pod.interface.routes[1].gateway.unwrap();
    match (address, gateway) {
        (IpAddr::V6(address), IpAddr::V6(gateway)) => (address, gateway),
        other => panic!("{other:?}"),
    }
}

fn setting(path: &str) -> String {
    let path = format!("/proc/sys/net/ipv6/conf/{path}");
    std::fs::read_to_string(path).unwrap().trim().to_owned()
}

/// ICMPv6 in IPv6 with the hop limit that neighbour discovery wants (RFC 4861 §6.1.2, §7.1.1).
pub fn icmp6(from: Ipv6Addr, to: Ipv6Addr, mut message: Vec<u8>) -> Vec<u8> {
    let length = u16::try_from(message.len()).unwrap();
    let mut sum = u32::from(length) + 58;
    let words = [from.octets(), to.octets()].concat();
    for pair in words.chunks(2).chain(message.chunks(2)) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair[1]]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    message[2..4].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([58, 255]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend(message);
    packet
}

/// A router that offers itself for half an hour.
fn advertisement(from: Ipv6Addr) -> Vec<u8> {
    let mut message = vec![134, 0, 0, 0, 64, 0];
    message.extend(1800_u16.to_be_bytes());
    message.extend([0; 8]);
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    icmp6(from, all_nodes, message)
}

const ALL_NODES: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

/// Waits until the host has a default route by `router`.
fn expect_default_route(router: &str) {
    for _ in 0..200 {
        let mut routes = Command::new("ip");
        routes.args(["-6", "route", "show", "default"]);
        let said = routes.output().unwrap();
        if String::from_utf8(said.stdout).unwrap().contains(router) {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("no default route by {router}");
}

#[test]
fn a_pods_address_goes_with_its_other_and_the_gateway_answers_at_once() {
    on_new_host(|| async {
        let server = Server::start().await;
        let mut pod = server.pod("a").await;
        let (address, gateway) = ipv6(&pod);
        let local: Ipv6Prefix = "fd00::/8".parse().unwrap();
        assert!(local.overlaps(Ipv6Prefix::around(address, 128).unwrap()));
        assert_eq!(address.octets()[15], pod.address().octets()[3]);

        // RFC 4861 §4.3, §7.2.2: a solicitation to the target's multicast address.
        let mut solicitation = vec![135, 0, 0, 0, 0, 0, 0, 0];
        solicitation.extend(gateway.octets());
        solicitation.extend([1, 1]);
        solicitation.extend(pod.interface.mac);
        let [.., a, b, c] = gateway.octets();
        let group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(a), {
            u16::from_be_bytes([b, c])
        });
        let packet = icmp6(address, group, solicitation);
        pod.send([0x33, 0x33, 0xff, a, b, c], 0x86dd, &packet);
        let answer = pod.receive(|frame| frame[12..14] == [0x86, 0xdd] && frame[54] == 136);
        assert_eq!(answer[62..78], gateway.octets());
        assert_eq!(answer[6..12], bridge::mac(pod.gateway()));
    });
}

#[test]
fn the_prefix_stays_the_servers_own() {
    on_new_host(|| async {
        let server = Server::start().await;
        let (first, _) = ipv6(&server.pod("a").await);
        server.network.tear_down("a").await.unwrap();
        let server = server.restart().await;
        let (second, _) = ipv6(&server.pod("b").await);
        assert_eq!(first.segments()[..4], second.segments()[..4]);
        // Unless the host has come to use it.
        server.network.tear_down("b").await.unwrap();
        let links = Links::open().unwrap();
        let lo = links.find("lo").await.unwrap().unwrap();
        links.up(&lo).await.unwrap();
        links.add_address(&lo, first.into(), 64).await.unwrap();
        let (third, _) = ipv6(&server.pod("c").await);
        assert_ne!(first.segments()[..4], third.segments()[..4]);
        server.network.tear_down("c").await.unwrap();
    });
}

#[test]
fn a_host_that_lives_by_advertisements_goes_on_to() {
    on_new_host(|| async {
        let links = Links::open().unwrap();
        let tap = tap::open("uplink", 1).unwrap().remove(0);
        let uplink = links.find("uplink").await.unwrap().unwrap();
        links.up(&uplink).await.unwrap();
        let mut wire = Pod {
            interface: Interface {
                mac: [2, 0, 0, 0, 0, 9],
                ..interface(&Attachment {
                    bridge: String::new(),
                    address: Ipv4Addr::LOCALHOST,
                    subnets: subnets::Subnets {
                        v4: Ipv4Prefix::around(Ipv4Addr::LOCALHOST, 8).unwrap(),
                        v6: None,
                    },
                    mac: [0; 6],
                    mtu: 1500,
                })
            },
            tap: File::from(tap),
        };
        let packet = advertisement("fe80::a".parse().unwrap());
        wire.send(ALL_NODES, 0x86dd, &packet);
        expect_default_route("fe80::a");

        let before = ["uplink", "default", "lo"]
            .map(|name| ["forwarding", "accept_ra"].map(|key| setting(&format!("{name}/{key}"))));
        let server = Server::start().await;
        let mut pod = server.pod("a").await;
        assert_eq!(setting("all/forwarding"), "1");
        let after = ["uplink", "default", "lo"]
            .map(|name| ["forwarding", "accept_ra"].map(|key| setting(&format!("{name}/{key}"))));
        assert_eq!(before, after);
        expect_default_route("fe80::a");
        // A pod's advertisement is not heard, the uplink's still is.
        let packet = advertisement("fe80::c".parse().unwrap());
        pod.send(ALL_NODES, 0x86dd, &packet);
        let packet = advertisement("fe80::b".parse().unwrap());
        wire.send(ALL_NODES, 0x86dd, &packet);
        expect_default_route("fe80::b");
        let routes = Command::new("ip").args(["-6", "route"]).output().unwrap();
        let routes = String::from_utf8(routes.stdout).unwrap();
        assert!(!routes.contains("fe80::c"), "{routes}");
        server.network.tear_down("a").await.unwrap();
    });
}

#[test]
fn a_host_without_ipv6_has_pods_without_it() {
    on_new_host(|| async {
        std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
        let server = Server::start().await;
        let pod = server.pod("a").await;
        assert_eq!(pod.interface.addresses.len(), 1);
        assert_eq!(setting("bulkhead0/disable_ipv6"), "1");
        assert_eq!(setting("all/forwarding"), "0");
        let refusal = server.pod_with("b", &host_ports::with_port("::", 80)).await;
        let refusal = refusal.err().unwrap().to_string();
        assert!(refusal.contains("[::]:80/tcp"), "{refusal}");
        server.network.tear_down("a").await.unwrap();
    });
}

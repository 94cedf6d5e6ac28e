//! Pods of the embedded bridge on the real kernel. Each test has a network namespace of its own
//! for a host; root is needed, and nft.

use std::fs::File;
use std::future::Future;
use std::io::{ErrorKind, Read, Write};
use std::net::UdpSocket;
use std::process::Command;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::link::Pair;
use super::*;

mod guard;
mod host_ports;
mod six;

const BROADCAST: [u8; 6] = [0xff; 6];
const HEADER: usize = 12;

/// Runs the test on a thread in new network and mount namespaces; what it starts inherits them.
fn on_new_host<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let thread = std::thread::spawn(|| {
        sys::unshare_network().expect("a network namespace (is this root?)");
        sys::unshare_mounts().expect("a mount namespace");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(test());
    });
    thread.join().unwrap();
}

struct Server {
    directory: tempfile::TempDir,
    network: Network,
}

impl Server {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let network = open(&directory, Config::default()).await;
        Self { directory, network }
    }

    /// What a kill and a new start are to the network: nothing is said to the old one.
    async fn restart(self) -> Self {
        drop(self.network);
        let network = open(&self.directory, Config::default()).await;
        Self {
            directory: self.directory,
            network,
        }
    }

    async fn pod(&self, sandbox: &str) -> Pod {
        self.pod_with(sandbox, &Default::default()).await.unwrap()
    }

    async fn pod_with(
        &self,
        sandbox: &str,
        config: &cri::PodSandboxConfig,
    ) -> Result<Pod, NetworkError> {
        let (network, mut taps) = self.network.set_up(sandbox, config, 1).await?;
        assert_eq!(taps.len(), 1);
        Ok(Pod {
            interface: network.interfaces[0].clone(),
            tap: File::from(taps.remove(0).remove(0)),
        })
    }
}

async fn open(directory: &tempfile::TempDir, mut config: Config) -> Network {
    config.cni = directory.path().join("none");
    Network::open(
        config,
        &directory.path().join("root"),
        &directory.path().join("run"),
    )
    .await
    .unwrap()
}

struct Pod {
    interface: Interface,
    tap: File,
}

impl Pod {
    fn address(&self) -> Ipv4Addr {
        ipv4(self.interface.addresses[0].address)
    }

    fn gateway(&self) -> Ipv4Addr {
        ipv4(self.interface.routes[0].gateway.unwrap())
    }

    fn send(&mut self, to: [u8; 6], kind: u16, payload: &[u8]) {
        let mut frame = vec![0; HEADER];
        frame.extend(to);
        frame.extend(self.interface.mac);
        frame.extend(kind.to_be_bytes());
        frame.extend(payload);
        self.tap.write_all(&frame).unwrap();
    }

    fn ask_who_has(&mut self, target: Ipv4Addr) {
        // RFC 826: Ethernet, IPv4, request.
        let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 1];
        arp.extend(self.interface.mac);
        arp.extend(self.address().octets());
        arp.extend([0; 6]);
        arp.extend(target.octets());
        self.send(BROADCAST, 0x0806, &arp);
    }

    fn send_udp(&mut self, from: Ipv4Addr, to: Ipv4Addr, port: u16, text: &[u8]) {
        let gateway = bridge::mac(self.gateway());
        self.send(gateway, 0x0800, &udp(from, to, port, text));
    }

    /// The first frame that fits, without the virtio header; others are passed over.
    fn receive(&mut self, fits: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let mut buffer = [0; 2048];
        loop {
            match self.tap.read(&mut buffer) {
                Ok(count) if count > HEADER && fits(&buffer[HEADER..count]) => {
                    return buffer[HEADER..count].to_vec();
                }
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let mut wait = [PollFd::new(&self.tap, PollFlags::IN)];
                    let limit = Timespec {
                        tv_sec: 20,
                        tv_nsec: 0,
                    };
                    assert_ne!(poll(&mut wait, Some(&limit)).unwrap(), 0, "no frame came");
                }
                Err(error) => panic!("tap: {error}"),
            }
        }
    }
}

fn ipv4(address: IpAddr) -> Ipv4Addr {
    match address {
        IpAddr::V4(address) => address,
        IpAddr::V6(address) => panic!("{address}"),
    }
}

fn udp(from: Ipv4Addr, to: Ipv4Addr, port: u16, text: &[u8]) -> Vec<u8> {
    let datagram = u16::try_from(8 + text.len()).unwrap();
    let mut packet = vec![0x45, 0];
    packet.extend((20 + datagram).to_be_bytes());
    packet.extend([0, 1, 0, 0, 64, 17, 0, 0]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    let mut sum: u32 = packet
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    packet[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    // Source port 4000; a checksum of zero is none.
    packet.extend(4000_u16.to_be_bytes());
    packet.extend(port.to_be_bytes());
    packet.extend(datagram.to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(text);
    packet
}

/// What a pod must not leave behind on its host.
async fn traces() -> (Vec<String>, usize, String) {
    let links = Links::open().unwrap();
    let names = links
        .all()
        .await
        .unwrap()
        .into_iter()
        .map(|link| link.name)
        .collect();
    let routes = links.destinations().await.unwrap().len();
    let rules = Command::new(nat::program().unwrap())
        .args(["list", "ruleset"])
        .output()
        .unwrap();
    (names, routes, String::from_utf8(rules.stdout).unwrap())
}

#[test]
fn pods_reach_each_other_and_the_gateway_through_their_taps() {
    on_new_host(|| async {
        let server = Server::start().await;
        let mut a = server.pod("a").await;
        let mut b = server.pod("b").await;
        assert_ne!(a.address(), b.address());
        assert_ne!(a.interface.mac, b.interface.mac);

        a.ask_who_has(b.address());
        let target = b.address().octets();
        let seen = b.receive(|frame| frame[12..14] == [8, 6] && frame[38..42] == target);
        assert_eq!(seen[6..12], a.interface.mac);

        a.ask_who_has(a.gateway());
        let mac = a.interface.mac;
        let answer = a.receive(|frame| frame[..6] == mac && frame[12..14] == [8, 6]);
        assert_eq!(answer[22..28], bridge::mac(a.gateway()));
        assert_eq!(answer[28..32], a.gateway().octets());
    });
}

#[test]
fn the_world_sees_the_hosts_address_and_no_forged_one() {
    on_new_host(|| async {
        let here = Ipv4Addr::new(192, 0, 2, 1);
        let there = Ipv4Addr::new(192, 0, 2, 2);
        let server = Server::start().await;
        // A neighbour of the host, on a link pair.
        let place = server.directory.path().join("world");
        let world = Namespace::create(place.clone()).await.unwrap();
        let mut pod = server.pod("a").await;
        let links = Links::open().unwrap();
        let bridge = links.find("bulkhead0").await.unwrap().unwrap().index;
        links
            .add_pair(Pair {
                host: "uplink",
                bridge,
                pod: "eth0",
                namespace: &world,
                mac: [2, 0, 0, 0, 0, 2],
                mtu: 1500,
            })
            .await
            .unwrap();
        let free = Command::new("ip")
            .args(["link", "set", "uplink", "nomaster"])
            .status();
        assert!(free.unwrap().success());
        let uplink = links.find("uplink").await.unwrap().unwrap();
        links.add_address(&uplink, here.into(), 24).await.unwrap();
        let socket = world
            .run(move || async move {
                let links = Links::open()?;
                let link = links.find("eth0").await?.unwrap();
                links.up(&link).await?;
                links.add_address(&link, there.into(), 24).await?;
                Ok(UdpSocket::bind((there, 5000)).unwrap())
            })
            .await
            .unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();

        let forged = Ipv4Addr::new(198, 51, 100, 9);
        pod.send_udp(forged, there, 5000, b"forged");
        let address = pod.address();
        pod.send_udp(address, there, 5000, b"honest");
        let mut text = [0; 64];
        let (count, sender) = socket.recv_from(&mut text).unwrap();
        assert_eq!(&text[..count], b"honest");
        assert_eq!(sender.ip(), here);

        // And back: the answer is translated to the pod's address.
        socket.send_to(b"answer", sender).unwrap();
        let gateway = pod.gateway();
        let mac = pod.interface.mac;
        // The host asks for the pod's hardware address first.
        pod.receive(|frame| frame[12..14] == [8, 6] && frame[28..32] == gateway.octets());
        let mut reply = vec![0, 1, 8, 0, 6, 4, 0, 2];
        reply.extend(mac);
        reply.extend(address.octets());
        reply.extend(bridge::mac(gateway));
        reply.extend(gateway.octets());
        pod.send(bridge::mac(gateway), 0x0806, &reply);
        let answer = pod.receive(|frame| frame[12..14] == [8, 0] && frame[23] == 17);
        assert_eq!(answer[30..34], address.octets());
        assert_eq!(&answer[42..48], b"answer");
        netns::remove(&place).unwrap();
    });
}

#[test]
fn the_last_pod_leaves_the_host_as_it_was() {
    on_new_host(|| async {
        let before = traces().await;
        let server = Server::start().await;
        let (a, b) = (server.pod("a").await, server.pod("b").await);
        assert_ne!(traces().await, before);
        drop((a, b));
        server.network.tear_down("a").await.unwrap();
        server.network.tear_down("a").await.unwrap();
        server.network.tear_down("never-set-up").await.unwrap();
        assert_eq!(
            server
                .network
                .tear_down("b")
                .await
                .map_err(|e| e.to_string()),
            Ok(())
        );
        assert_eq!(traces().await, before);
        for left in ["root/network/leases", "run/netns"] {
            let left = server.directory.path().join(left);
            assert_eq!(
                std::fs::read_dir(&left).unwrap().count(),
                0,
                "{}",
                left.display()
            );
        }
    });
}

#[test]
fn a_restarted_server_knows_its_bridge_and_its_pods_addresses() {
    on_new_host(|| async {
        let before = traces().await;
        let server = Server::start().await;
        let mut a = server.pod("a").await;
        let server = server.restart().await;
        let mut b = server.pod("b").await;
        assert_ne!(a.address(), b.address());
        a.ask_who_has(b.address());
        b.receive(|frame| frame[12..14] == [8, 6]);
        // The same sandbox again, as after a kill in the middle of its making.
        let address = b.address();
        drop(b);
        let mut b = server.pod("b").await;
        assert_eq!(b.address(), address);
        a.ask_who_has(b.address());
        b.receive(|frame| frame[12..14] == [8, 6]);
        drop((a, b));
        for sandbox in ["a", "b"] {
            server.network.tear_down(sandbox).await.unwrap();
        }
        assert_eq!(traces().await, before);
    });
}

#[test]
fn a_bridge_nobody_needs_goes_when_its_server_starts() {
    on_new_host(|| async {
        let before = traces().await;
        let server = Server::start().await;
        drop(server.pod("a").await);
        let leases = server.directory.path().join("root/network/leases");
        for lease in std::fs::read_dir(&leases).unwrap() {
            std::fs::remove_file(lease.unwrap().path()).unwrap();
        }
        let server = server.restart().await;
        // The pod's own link went with the bridge's server; its namespace goes with the pod.
        server.network.tear_down("a").await.unwrap();
        assert_eq!(traces().await, before);
    });
}

#[test]
fn two_servers_have_two_bridges_with_pools_apart() {
    on_new_host(|| async {
        let (one, two) = (Server::start().await, Server::start().await);
        let (a, b) = (one.pod("a").await, two.pod("a").await);
        assert_ne!(a.gateway(), b.gateway());
        let (names, _, rules) = traces().await;
        for bridge in ["bulkhead0", "bulkhead1"] {
            assert!(names.iter().any(|name| name == bridge), "{names:?}");
            assert!(rules.contains(&format!("table inet {bridge} ")), "{rules}");
        }
        drop((a, b));
        one.network.tear_down("a").await.unwrap();
        let (names, _, rules) = traces().await;
        assert!(names.iter().any(|name| name == "bulkhead1"), "{names:?}");
        assert!(
            !rules.contains("bulkhead0") && rules.contains("bulkhead1"),
            "{rules}"
        );
        two.network.tear_down("a").await.unwrap();
    });
}

#[test]
fn a_port_of_another_servers_pod_is_refused_with_its_name() {
    on_new_host(|| async {
        let (one, two) = (Server::start().await, Server::start().await);
        let config = host_ports::with_port("", 8080);
        let a = one.pod_with("a", &config).await.unwrap();
        let refusal = two.pod_with("b", &config).await.err().unwrap().to_string();
        let root = one.directory.path().join("root").display().to_string();
        assert!(
            refusal.contains("8080/tcp") && refusal.contains("shop/web"),
            "{refusal}"
        );
        assert!(refusal.contains(&root), "{refusal}");
        // A pod of its own is not another server's, and what is given back is free.
        drop(a);
        one.network.tear_down("a").await.unwrap();
        let b = two.pod_with("b", &config).await.unwrap();
        drop((b, one.pod("c").await));
        one.network.tear_down("c").await.unwrap();
        two.network.tear_down("b").await.unwrap();
    });
}

#[test]
fn below_the_mtu_that_ipv6_needs_pods_have_ipv4_alone() {
    on_new_host(|| async {
        let directory = tempfile::tempdir().unwrap();
        let config = Config {
            mtu: Some(1000),
            ..Config::default()
        };
        let network = open(&directory, config).await;
        let pod = cri::PodSandboxConfig::default();
        let (made, taps) = network.set_up("a", &pod, 1).await.unwrap();
        assert_eq!(made.interfaces[0].mtu, 1000);
        assert_eq!(made.interfaces[0].addresses.len(), 1);
        drop(taps);
        let of_ipv6 = host_ports::with_port("::", 8080);
        let refused = network.set_up("b", &of_ipv6, 1).await;
        let refusal = refused.err().unwrap().to_string();
        assert!(refusal.contains("MTU is below 1280"), "{refusal}");
        network.tear_down("a").await.unwrap();
    });
}

#[test]
fn a_promise_of_ipv6_on_a_link_too_small_for_it_is_said() {
    on_new_host(|| async {
        let done = |arguments: &[&str]| {
            let status = Command::new("ip").args(arguments).status();
            assert!(status.unwrap().success(), "{arguments:?}");
        };
        let pair = ["mtu", "1000", "type", "veth", "peer", "name", "other"];
        done(&[&["link", "add", "eth0"], &pair[..]].concat());
        done(&["addr", "add", "10.9.0.2/24", "dev", "eth0"]);
        let promise =
            serde_json::json!({"ips": [{"address": "10.9.0.2/24"}, {"address": "fd09::2/64"}]});
        let promise = Promise::read(&promise).unwrap();
        let error = add_cards(promise, 1).await.err().unwrap().to_string();
        assert!(
            error.contains("fd09::2/64 (IPv6 needs an MTU of 1280 bytes; eth0 has 1000)"),
            "{error}"
        );
        assert!(!error.contains("10.9.0.2"), "{error}");
    });
}

#[test]
fn a_configured_pool_that_the_host_uses_is_refused_by_name() {
    on_new_host(|| async {
        let one = Server::start().await;
        let a = one.pod("a").await;
        let used = Ipv4Prefix::around(a.gateway(), 24);
        let directory = tempfile::tempdir().unwrap();
        let network = open(
            &directory,
            Config {
                pool: used,
                ..Config::default()
            },
        )
        .await;
        let refusal = network
            .set_up("b", &Default::default(), 1)
            .await
            .unwrap_err()
            .to_string();
        assert!(refusal.contains(&used.unwrap().to_string()), "{refusal}");
        assert!(!directory.path().join("run/netns/b").exists());
        drop(a);
        one.network.tear_down("a").await.unwrap();
    });
}

#[test]
fn sandbox_ids_that_are_paths_are_refused() {
    on_new_host(|| async {
        let server = Server::start().await;
        for id in ["", "..", "a/b", "a\0b", &"x".repeat(129)] {
            let refusal = server
                .network
                .set_up(id, &Default::default(), 1)
                .await
                .unwrap_err();
            assert!(matches!(refusal, NetworkError::SandboxId(_)), "{id}");
        }
    });
}

//! Ports of the host that lead to pods of the embedded bridge.

use super::*;

pub fn with_port(host_ip: &str, host_port: i32) -> cri::PodSandboxConfig {
    cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: "web".into(),
            namespace: "shop".into(),
            ..Default::default()
        }),
        port_mappings: vec![cri::PortMapping {
            container_port: 80,
            host_port,
            host_ip: host_ip.into(),
            ..Default::default()
        }],
        ..Default::default()
    }
}

async fn rules() -> String {
    traces().await.2
}

#[test]
fn rules_for_ports_outlive_the_server_and_end_with_their_pod() {
    on_new_host(|| async {
        let before = traces().await;
        let server = Server::start().await;
        let a = server.pod_with("a", &with_port("", 8080)).await.unwrap();
        let [four, six] = [0, 1].map(|index| a.interface.addresses[index].address);
        let ways = [four, six].map(|pod| format!("tcp . 8080 : {pod} . 80"));
        let all = rules().await;
        assert!(ways.iter().all(|way| all.contains(way)), "{all}");

        // A server that starts anew sets the table anew.
        let server = server.restart().await;
        let b = server.pod_with("b", &with_port("192.0.2.1", 8081)).await;
        let all = rules().await;
        assert!(ways.iter().all(|way| all.contains(way)), "{all}");
        assert!(all.contains("192.0.2.1 . tcp . 8081 : "), "{all}");
        let refusal = server.pod_with("c", &with_port("127.0.0.1", 8080)).await;
        let refusal = refusal.err().unwrap().to_string();
        assert!(
            refusal.contains("127.0.0.1:8080/tcp") && refusal.contains("shop/web"),
            "{refusal}"
        );

        drop((a, b));
        let server = server.restart().await;
        server.network.tear_down("a").await.unwrap();
        let all = rules().await;
        assert!(!all.contains("8080") && all.contains("8081"), "{all}");
        server.network.tear_down("b").await.unwrap();
        assert_eq!(traces().await, before);
        let left = server.directory.path().join("root/network/ports");
        assert_eq!(std::fs::read_dir(left).unwrap().count(), 0);
    });
}

#[test]
fn a_pod_whose_rules_somebody_has_flushed_can_be_removed() {
    on_new_host(|| async {
        let server = Server::start().await;
        drop(server.pod_with("a", &with_port("", 8080)).await.unwrap());
        drop(server.pod_with("b", &with_port("", 8081)).await.unwrap());
        let mut flush = Command::new(nat::program().unwrap());
        flush.args(["flush", "ruleset"]);
        assert!(flush.status().unwrap().success());
        server.network.tear_down("a").await.unwrap();
        assert!(rules().await.contains("8081"), "the others are whole again");
        assert!(flush.status().unwrap().success());
        drop(server.pod("c").await);
        assert!(
            rules().await.contains("8081"),
            "a pod without ports brings them back, too"
        );
        for pod in ["b", "c"] {
            server.network.tear_down(pod).await.unwrap();
        }
    });
}

#[test]
fn a_port_on_the_loopback_does_not_open_it_to_pods() {
    on_new_host(|| async {
        let links = Links::open().unwrap();
        let lo = links.find("lo").await.unwrap().unwrap();
        links.up(&lo).await.unwrap();
        let server = Server::start().await;
        let config = with_port("127.0.0.1", 8080);
        let mut pod = server.pod_with("a", &config).await.unwrap();
        let setting = "/proc/sys/net/ipv4/conf/bulkhead0/route_localnet";
        assert_eq!(std::fs::read_to_string(setting).unwrap(), "1\n");
        let socket = UdpSocket::bind("0.0.0.0:5000").unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let (address, gateway) = (pod.address(), pod.gateway());
        pod.send_udp(address, Ipv4Addr::LOCALHOST, 5000, b"sneaked");
        pod.send_udp(Ipv4Addr::LOCALHOST, gateway, 5000, b"forged");
        pod.send_udp(address, gateway, 5000, b"honest");
        let mut text = [0; 64];
        let (count, _) = socket.recv_from(&mut text).unwrap();
        assert_eq!(&text[..count], b"honest");
        server.network.tear_down("a").await.unwrap();
    });
}

#[test]
fn datagrams_of_a_client_that_keeps_its_port_reach_the_next_pod() {
    on_new_host(|| async {
        let server = Server::start().await;
        let mut config = with_port("", 5399);
        config.port_mappings[0].protocol = cri::Protocol::Udp.into();
        let keeper = server.pod("keeper").await;
        let (gateway, mut client) = (keeper.gateway(), None);
        for name in ["first", "second"] {
            let mut pod = server.pod_with(name, &config).await.unwrap();
            let client = client.get_or_insert_with(|| UdpSocket::bind((gateway, 4000)).unwrap());
            client.send_to(b"word", (gateway, 5399)).unwrap();
            // The host looks for whom the datagram is to go to.
            let address = pod.address().octets();
            pod.receive(|frame| frame[12..14] == [8, 6] && frame[38..42] == address);
            server.network.tear_down(name).await.unwrap();
            // Nobody has the port now; the kernel remembers that as well.
            client.send_to(b"word", (gateway, 5399)).unwrap();
        }
    });
}

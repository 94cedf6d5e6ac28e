//! What plugins give a pod, and what they are told of it.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_cri_api::v1::{PortMapping, Protocol};
use bulkhead_tests::Node;
use bulkhead_tests::cri::refused;
use bulkhead_tests::http::fetch;
use bulkhead_tests::leak::Machine;
use bulkhead_tests::node::{BASE, WEB};
use bulkhead_tests::request::{Pod, container, shell, sleeper};
use serde_json::json;
use tonic::Code;

use crate::{bridge, end, home, host_local, leases, run, script, server};

pub fn bridge_gives_addresses_of_both_families(node: &Node) -> Result<()> {
    let ranges = json!([[{"subnet": "10.91.0.0/24"}], [{"subnet": "fd91::/64"}]]);
    let mut ipam = host_local(&home(node, "dual"), ranges);
    ipam["routes"] = json!([{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]);
    let plugin = json!({"type": "bridge", "bridge": "cni-dual", "isGateway": true,
        "mtu": 1400, "ipam": ipam});
    let server = server(node, "dual", json!([plugin]))?;
    let cri = &server.cri;
    let image = node.image_on(cri, BASE)?;
    let pod = Pod::run(cri, node.pod_config("dual")?)?;
    let id = pod.start(&shell("web", &image, "exec httpd -f -p 80 -h /www"))?;
    let network = cri.pod(&pod.id)?.network.context("no network")?;
    let more: Vec<_> = network.additional_ips.iter().map(|ip| &ip.ip).collect();
    ensure!(network.ip.starts_with("10.91.0."), "{network:?}");
    ensure!(
        more.len() == 1 && more[0].starts_with("fd91::"),
        "{network:?}"
    );
    for ip in [&network.ip, more[0]] {
        let page = fetch(SocketAddr::new(ip.parse()?, 80))?;
        ensure!(page.contains("hello"), "{ip}: {page}");
    }
    let said = cri.shell(&id, "cat /sys/class/net/eth0/mtu; ip -6 addr show eth0")?;
    ensure!(said.starts_with("1400\n"), "{said}");
    ensure!(!said.contains("tentative"), "{said}");
    ensure!(
        leases(node, "dual").len() == 2,
        "{:?}",
        leases(node, "dual")
    );
    cri.stop_pod(&pod.id)?;
    ensure!(
        leases(node, "dual").is_empty(),
        "{:?}",
        leases(node, "dual")
    );
    cri.remove_pod(&pod.id)?;
    end(server)
}

pub fn routes_and_neighbours_are_the_guests_in_every_detail(node: &Node) -> Result<()> {
    let text = r#"
        [ "$CNI_COMMAND" = ADD ] || exit 0
        inside() { nsenter --net="$CNI_NETNS" ip "$@" || exit 1; } >&2
        inside route add 10.77.0.0/16 via 10.92.0.1 metric 50 mtu 1300
        inside route add 10.78.0.0/16 via 169.254.1.1 dev eth0 onlink
        inside route add 10.79.0.0/16 dev eth0 scope link src 10.92.0.2
        inside neigh add 10.92.0.200 dev eth0 lladdr 02:00:00:00:00:c8 nud permanent
        inside addr add 10.92.1.7/32 dev eth0
        echo "$config" | sed 's/.*"prevResult":\(.*\),"type":"details"}$/\1/'"#;
    script(node, "details", "details", text)?;
    let plugins = json!([bridge(node, "details", "10.92.0.0/24"), {"type": "details"}]);
    let server = server(node, "details", plugins)?;
    let cri = &server.cri;
    let image = node.image_on(cri, BASE)?;
    let pod = Pod::run(cri, node.pod_config("details")?)?;
    let id = pod.start(&sleeper("looks", &image))?;
    let said = cri.shell(&id, "ip route; ip neigh; ip -o addr show eth0")?;
    for line in [
        "default via 10.92.0.1 dev eth0",
        "10.77.0.0/16 via 10.92.0.1 dev eth0",
        "metric 50",
        "10.78.0.0/16 via 169.254.1.1 dev eth0",
        "onlink",
        "10.79.0.0/16 dev eth0 scope link  src 10.92.0.2",
        "10.92.0.0/24 dev eth0 scope link  src 10.92.0.2",
        "10.92.0.200 dev eth0 lladdr 02:00:00:00:00:c8",
        "PERMANENT",
        "10.92.1.7/32",
    ] {
        ensure!(said.contains(line), "{line}: {said}");
    }
    // IP_MTU of a socket that takes the route.
    let program = "use Socket; socket(my $s, PF_INET, SOCK_DGRAM, 17) or die $!; \
        connect($s, sockaddr_in(9, inet_aton('10.77.0.1'))) or die $!; \
        print unpack('i', getsockopt($s, 0, 14))";
    let image = node.image_on(cri, WEB)?;
    let looks = container("mtu", &image, &["/usr/bin/perl", "-e", program]);
    let ended = pod.run_to_end(&looks)?;
    ensure!(
        ended.stdout() == "1300",
        "{} {}",
        ended.stdout(),
        ended.stderr()
    );
    cri.remove_pod(&pod.id)?;
    end(server)
}

pub fn ptp_routes_by_its_gateway(node: &Node) -> Result<()> {
    let ranges = json!([[{"subnet": "10.93.0.0/24"}], [{"subnet": "fd93::/64"}]]);
    let mut ipam = host_local(&home(node, "ptp"), ranges);
    ipam["routes"] = json!([{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]);
    let server = server(node, "ptp", json!([{"type": "ptp", "ipam": ipam}]))?;
    let cri = &server.cri;
    let image = node.image_on(cri, BASE)?;
    let (one, two) = (
        Pod::run(cri, node.pod_config("one")?)?,
        Pod::run(cri, node.pod_config("two")?)?,
    );
    one.start(&shell("web", &image, "exec httpd -f -p 80 -h /www"))?;
    let address = cri.pod_ip(&one.id)?;
    fetch(SocketAddr::new(address, 80))?;
    let six = cri.pod(&one.id)?.network.context("no network")?;
    let six = six.additional_ips[0].ip.clone();
    fetch(SocketAddr::new(six.parse()?, 80))?;
    // The neighbours of a pod are behind the host, not beside it.
    let id = two.start(&sleeper("client", &image))?;
    run("sysctl -qw net.ipv4.ip_forward=1")?;
    let said = cri.shell(&id, &format!("wget -q -O - http://[{six}]/"))?;
    ensure!(said.contains("hello"), "{six}: {said}");
    let said = cri.shell(&id, &format!("ip route; wget -q -O - http://{address}/"))?;
    ensure!(
        said.contains("10.93.0.0/24 via 10.93.0.1 dev eth0"),
        "{said}"
    );
    ensure!(said.contains("hello"), "{said}");
    for pod in [one, two] {
        cri.remove_pod(&pod.id)?;
    }
    end(server)
}

pub fn macvlan_is_on_the_links_network(node: &Node) -> Result<()> {
    run(
        "ip link add cni-lan type veth peer name cni-other; ip link set cni-lan up;
        ip link set cni-other up; ip addr add 10.94.0.1/24 dev cni-other;
        ip addr add fd94::1/64 dev cni-other nodad",
    )?;
    let plugin = json!({"type": "macvlan", "master": "cni-lan", "mode": "bridge",
        "ipam": {"type": "static", "addresses": [{"address": "10.94.0.9/24"}, {"address": "fd94::9/64"}]}});
    let server = server(node, "macvlan", json!([plugin]))?;
    let cri = &server.cri;
    let image = node.image_on(cri, BASE)?;
    let pod = Pod::run(cri, node.pod_config("macvlan")?)?;
    pod.start(&shell("web", &image, "exec httpd -f -p 80 -h /www"))?;
    let address = cri.pod_ip(&pod.id)?;
    ensure!(address.to_string() == "10.94.0.9", "{address}");
    fetch(SocketAddr::new(address, 80))?;
    fetch("[fd94::9]:80".parse()?)?;
    cri.remove_pod(&pod.id)?;
    run("ip link delete cni-lan")?;
    end(server)
}

pub fn tuning_changes_hardware_address_and_sysctls(node: &Node) -> Result<()> {
    let plugins = json!([bridge(node, "tuning", "10.95.0.0/24"),
        {"type": "tuning", "mac": "c2:b0:57:49:47:f1", "mtu": 1454,
            "sysctl": {"net.core.somaxconn": "517", "net.ipv4.conf.eth0.arp_announce": "2"}}]);
    let server = server(node, "tuning", plugins)?;
    let cri = &server.cri;
    let image = node.image_on(cri, BASE)?;
    let pod = Pod::run(cri, node.pod_config("tuning")?)?;
    let id = pod.start(&shell("web", &image, "exec httpd -f -p 80 -h /www"))?;
    fetch(SocketAddr::new(cri.pod_ip(&pod.id)?, 80))?;
    let said = cri.shell(&id, "cd /sys/class/net/eth0; cat address mtu")?;
    ensure!(said == "c2:b0:57:49:47:f1\n1454", "{said}");
    let line = "cd /proc/sys/net; cat core/somaxconn ipv4/conf/eth0/arp_announce";
    let said = cri.shell(&id, line)?;
    ensure!(said == "517\n2", "{said}");
    cri.remove_pod(&pod.id)?;
    // The pod's own count more.
    let mut config = node.pod_config("own")?;
    let linux = config.linux.get_or_insert_default();
    linux.sysctls = [("net.core.somaxconn".to_owned(), "613".to_owned())].into();
    let pod = Pod::run(cri, config)?;
    let id = pod.start(&sleeper("looks", &image))?;
    let said = cri.shell(&id, line)?;
    ensure!(said == "613\n2", "{said}");
    cri.remove_pod(&pod.id)?;
    end(server)
}

pub fn ports_of_the_host_lead_to_the_pod(node: &Node) -> Result<()> {
    let ranges = json!([[{"subnet": "10.96.0.0/24"}], [{"subnet": "fd96:1::/64"}]]);
    let mut network = bridge(node, "ports", "10.96.0.0/24");
    network["ipam"] = host_local(&home(node, "ports"), ranges);
    let plugins = json!([network,
        {"type": "portmap", "capabilities": {"portMappings": true}},
        {"type": "firewall"}, {"type": "loopback"}]);
    let server = server(node, "ports", plugins)?;
    let cri = &server.cri;
    let image = node.image_on(cri, BASE)?;
    let mut config = node.pod_config("ports")?;
    let port = |protocol: Protocol| PortMapping {
        protocol: protocol.into(),
        container_port: 80,
        host_port: 8099,
        host_ip: String::new(),
    };
    config.port_mappings = vec![port(Protocol::Tcp), port(Protocol::Udp)];
    let pod = Pod::run(cri, config)?;
    pod.start(&shell("web", &image, "exec httpd -f -p 80 -h /www"))?;
    let echo = "exec perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(LocalPort => 80, \
        Proto => q(udp)) or die; while ($s->recv($word, 99)) { $s->send(qq(got $word)) }'";
    pod.start(&shell("echo", &node.image_on(cri, WEB)?, echo))?;
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    let mut answer = [0; 16];
    let heard = (0..30).any(|_| {
        socket.send_to(b"word", "10.96.0.1:8099").is_ok() && socket.recv(&mut answer).is_ok()
    });
    ensure!(heard && answer.starts_with(b"got word"), "{answer:?}");
    for host in ["10.96.0.1:8099", "127.0.0.1:8099", "[fd96:1::1]:8099"] {
        let page = fetch(host.parse()?).with_context(|| host)?;
        ensure!(page.contains("hello"), "{host}: {page}");
    }
    cri.remove_pod(&pod.id)?;
    let left = run("(iptables-save -t nat; ip6tables-save -t nat) | grep -c 8099 || true")?;
    ensure!(left == "0\n", "{left} rules are left");
    end(server)
}

pub fn bandwidth_is_limited(node: &Node) -> Result<()> {
    let plugins = json!([bridge(node, "bandwidth", "10.97.0.0/24"),
        {"type": "bandwidth", "capabilities": {"bandwidth": true}}]);
    let server = server(node, "bandwidth", plugins)?;
    let cri = &server.cri;
    let mut config = node.pod_config("bandwidth")?;
    // The module brings two links by itself.
    run("modprobe ifb numifbs=0")?;
    let limits = [("ingress", "8M"), ("egress", "4M")];
    let limits =
        limits.map(|(way, rate)| (format!("kubernetes.io/{way}-bandwidth"), rate.to_owned()));
    config.annotations = limits.into();
    let pod = Pod::run(cri, config.clone())?;
    // What the pod gets leaves by the host's end of its link; what it sends, by an ifb of its own.
    let said = run("tc qdisc show")?;
    let limited = |rate: &str| {
        said.lines()
            .any(|line| line.contains("tbf") && line.contains(rate))
    };
    ensure!(limited("8Mbit") && limited("4Mbit"), "{said}");
    cri.remove_pod(&pod.id)?;
    end(server)
}

pub fn what_no_plugin_takes_is_told_by_the_log(node: &Node) -> Result<()> {
    let plugins = json!([bridge(node, "plain", "10.98.0.0/24")]);
    let server = server(node, "plain", plugins)?;
    let mut config = node.pod_config("plain")?;
    config.port_mappings = vec![PortMapping {
        container_port: 80,
        host_port: 8099,
        ..PortMapping::default()
    }];
    let logged = server.log_length();
    let pod = Pod::run(&server.cri, config.clone())?;
    let said = server.log_since(logged);
    ensure!(said.contains("portMappings"), "{said}");
    server.cri.stop_pod(&pod.id)?;
    server.cri.remove_pod(&pod.id)?;
    config.port_mappings = Vec::new();
    let before = Machine::look_at(&server)?;
    let annotation = "kubernetes.io/egress-bandwidth".to_owned();
    config.annotations = [(annotation, "much".to_owned())].into();
    let message = refused(server.cri.run_pod(&config), &[Code::InvalidArgument])?;
    ensure!(message.contains("egress-bandwidth"), "{message}");
    before.settles_again_at(&server)?;
    end(server)
}

pub fn service_on_the_node_is_reached_from_its_pods(node: &Node) -> Result<()> {
    let server = server(
        node,
        "service",
        json!([bridge(node, "service", "10.84.0.0/24")]),
    )?;
    let cri = &server.cri;
    let image = node.image_on(cri, BASE)?;
    let (web, client) = (
        Pod::run(cri, node.pod_config("web")?)?,
        Pod::run(cri, node.pod_config("client")?)?,
    );
    web.start(&shell("web", &image, "exec httpd -f -p 80 -h /www"))?;
    let address = cri.pod_ip(&web.id)?;
    fetch(SocketAddr::new(address, 80))?;
    let id = client.start(&sleeper("client", &image))?;
    run(&format!(
        "modprobe br_netfilter; sysctl -qw net.ipv4.ip_forward=1
        iptables -t nat -A PREROUTING -d 10.96.0.9 -p tcp --dport 8080 \
            -j DNAT --to-destination {address}:80"
    ))?;
    let set = |value: u8| {
        run(&format!(
            "sysctl -qw net.bridge.bridge-nf-call-iptables={value}"
        ))
    };
    let dial = "timeout 10 wget -q -O - http://10.96.0.9:8080/";
    // The answer has to come back through the host, which sees frames between ports of a bridge
    // only so.
    set(1)?;
    let answered = cri.shell(&id, dial);
    set(0)?;
    let bypassed = cri.shell(&id, dial);
    run(
        "iptables -t nat -D PREROUTING -d 10.96.0.9 -p tcp --dport 8080 \
        -j DNAT --to-destination $(iptables -t nat -S PREROUTING \
        | sed -n 's/.*10.96.0.9.*--to-destination //p')",
    )?;
    ensure!(answered?.contains("hello"), "another page");
    ensure!(bypassed.is_err(), "the module is not needed: {bypassed:?}");
    for pod in [web, client] {
        cri.remove_pod(&pod.id)?;
    }
    end(server)
}

pub fn two_hundred_addresses_are_the_guests(node: &Node) -> Result<()> {
    let text = r#"[ "$CNI_COMMAND" = ADD ] || exit 0
        cd /tmp; exec 3>&1 >&2
        nsenter --net="$CNI_NETNS" ip link add eth0 type dummy
        ips=; lines=
        for number in $(seq 1 200); do
            lines="$lines addr add 10.83.0.$number/24 dev eth0
"
            ips="$ips,{\"address\": \"10.83.0.$number/24\"}"
        done
        echo "$lines" | nsenter --net="$CNI_NETNS" ip -batch -
        echo "{\"cniVersion\": \"1.0.0\", \"ips\": [${ips#,}]}" >&3"#;
    script(node, "many", "many", text)?;
    let server = server(node, "many", json!([{"type": "many"}]))?;
    let cri = &server.cri;
    let image = node.image_on(cri, BASE)?;
    let pod = Pod::run(cri, node.pod_config("many")?)?;
    let network = cri.pod(&pod.id)?.network.context("no network")?;
    ensure!(network.additional_ips.len() == 199, "{network:?}");
    let id = pod.start(&sleeper("looks", &image))?;
    let said = cri.shell(&id, "ip -o -4 addr show eth0 | wc -l")?;
    ensure!(said.trim() == "200", "{said}");
    cri.remove_pod(&pod.id)?;
    end(server)
}

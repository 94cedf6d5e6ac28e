//! Ports of the host, and services on the node.

use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bulkhead_cri_api::v1::{PodSandboxConfig, PortMapping, Protocol};
use bulkhead_tests::Node;
use bulkhead_tests::cri::refused;
use bulkhead_tests::http::fetch;
use bulkhead_tests::leak::Machine;
use bulkhead_tests::node::{BASE, WEB as WEB_IMAGE};
use bulkhead_tests::request::{Pod, shell, sleeper};
use tonic::Code;

use crate::{PAGE, WEB, World, addresses, gateways, page, run, url};

fn port(protocol: Protocol, host_ip: &str, host_port: i32, container_port: i32) -> PortMapping {
    PortMapping {
        protocol: protocol.into(),
        container_port,
        host_port,
        host_ip: host_ip.to_owned(),
    }
}

fn pod_with(node: &Node, name: &str, ports: &[PortMapping]) -> Result<PodSandboxConfig> {
    let mut config = node.pod_config(name)?;
    config.port_mappings = ports.to_vec();
    Ok(config)
}

pub fn port_of_the_host_leads_to_the_pod_from_everywhere(node: &Node) -> Result<()> {
    let world = World::make()?;
    let cri = node.cri()?;
    let image = node.base()?;
    let ports = [port(Protocol::Tcp, "", 8099, 80)];
    let server = Pod::run(cri, pod_with(node, "server", &ports)?)?;
    let web = server.start(&shell("httpd", &image, WEB))?;
    let client = node.pod("client")?;
    let id = client.start(&sleeper("wget", &image))?;
    fetch(SocketAddr::new(cri.pod_ip(&server.id)?, 80))?;
    let [four, six] = gateways(cri, &id)?;
    let local = ["127.0.0.1", "192.0.2.1", "2001:db8::1"];
    let local = local.iter().map(|text| text.parse());
    let local = local.collect::<Result<Vec<IpAddr>, _>>()?;
    for address in local.iter().copied().chain([four, six]) {
        let said = page(&SocketAddr::new(address, 8099).to_string())?;
        ensure!(said == PAGE, "{address}: {said}");
    }
    // Another pod, and the pod itself.
    for (who, container) in [("another pod", &id), ("the pod", &web)] {
        for address in [four, six, local[1], local[2]] {
            let dial = format!("timeout 60 wget -q -O - {}", url(address, 8099));
            let page = cri.shell(container, &dial);
            let page = page.with_context(|| format!("{who} by {address}"))?;
            ensure!(page == PAGE, "{who} by {address}: {page}");
        }
    }
    // Another machine.
    for address in &local[1..] {
        let dial = format!(
            "busybox timeout 60 busybox wget -q -O - {}",
            url(*address, 8099)
        );
        let page = world.shell(&dial)?;
        ensure!(page.trim_end() == PAGE, "the world by {address}: {page}");
    }
    Ok(())
}

/// Answers each datagram with a word and what it heard.
fn echo(word: &str) -> String {
    format!(
        "exec perl -MIO::Socket::IP -e '$s = IO::Socket::IP->new(LocalHost => q(::), LocalPort => 53, \
        Type => SOCK_DGRAM, V6Only => 0) or die; while (defined $s->recv($word, 99)) {{ \
        $s->send(qq({word} $word)) }}'"
    )
}

/// Sends from one port until an answer comes, which is returned.
fn hear(socket: &UdpSocket, to: &str) -> Result<String> {
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    let mut answer = [0; 64];
    for _ in 0..30 {
        socket.send_to(b"word", to)?;
        if let Ok((count, from)) = socket.recv_from(&mut answer) {
            ensure!(from.to_string() == to, "{from}");
            return Ok(String::from_utf8_lossy(&answer[..count]).into_owned());
        }
    }
    bail!("no answer came from {to}");
}

pub fn datagrams_to_a_port_of_the_host_arrive(node: &Node) -> Result<()> {
    let _world = World::make()?;
    let cri = node.cri()?;
    let ports = [port(Protocol::Udp, "", 5399, 53)];
    let pod = Pod::run(cri, pod_with(node, "datagrams", &ports)?)?;
    pod.start(&shell("echo", &node.image(WEB_IMAGE)?, &echo("got")))?;
    for (from, to) in [
        ("0.0.0.0:0", "127.0.0.1:5399"),
        ("[::]:0", "[2001:db8::1]:5399"),
    ] {
        let said = hear(&UdpSocket::bind(from)?, to)?;
        ensure!(said == "got word", "{to}: {said}");
    }
    Ok(())
}

pub fn datagrams_of_a_client_that_keeps_its_port_reach_the_next_pod(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let ports = [port(Protocol::Udp, "", 5398, 53)];
    let client = UdpSocket::bind("0.0.0.0:0")?;
    for name in ["first", "second"] {
        let pod = Pod::run(cri, pod_with(node, name, &ports)?)?;
        pod.start(&shell("echo", &node.image(WEB_IMAGE)?, &echo(name)))?;
        let said = hear(&client, "127.0.0.1:5398")?;
        ensure!(said == format!("{name} word"), "{said}");
        cri.remove_pod(&pod.id)?;
        // Also what went nowhere is remembered.
        client.send_to(b"word", "127.0.0.1:5398")?;
    }
    Ok(())
}

pub fn port_is_bound_to_the_address_it_names(node: &Node) -> Result<()> {
    let _world = World::make()?;
    let cri = node.cri()?;
    let image = node.base()?;
    let ports = [port(Protocol::Tcp, "192.0.2.1", 8098, 80)];
    let one = Pod::run(cri, pod_with(node, "one", &ports)?)?;
    one.start(&shell("httpd", &image, WEB))?;
    ensure!(page("192.0.2.1:8098")? == PAGE, "another page");
    let answer = TcpStream::connect_timeout(&"127.0.0.1:8098".parse()?, Duration::from_secs(3));
    ensure!(answer.is_err(), "127.0.0.1 answers");
    // So another address is free for another pod.
    let ports = [port(Protocol::Tcp, "127.0.0.1", 8098, 80)];
    let two = Pod::run(cri, pod_with(node, "two", &ports)?)?;
    two.start(&shell(
        "httpd",
        &image,
        "echo two > /www/index.html; exec httpd -f -p 80 -h /www",
    ))?;
    let said = page("127.0.0.1:8098")?;
    ensure!(said == "two", "{said}");
    Ok(())
}

pub fn port_of_another_pod_is_refused_with_its_name(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let ports = [port(Protocol::Tcp, "", 8097, 80)];
    let one = Pod::run(cri, pod_with(node, "holder", &ports)?)?;
    let before = Machine::look(node)?;
    let late = pod_with(node, "late", &[port(Protocol::Tcp, "127.0.0.1", 8097, 81)])?;
    let message = refused(cri.run_pod(&late), &[Code::FailedPrecondition])?;
    ensure!(
        message.contains("127.0.0.1:8097/tcp") && message.contains("tests/holder"),
        "{message}"
    );
    before.settles_again(node)?;
    // The same number of another protocol is another port.
    let other = pod_with(node, "other", &[port(Protocol::Udp, "", 8097, 80)])?;
    Pod::run(cri, other)?;
    cri.remove_pod(&one.id)?;
    Pod::run(cri, late)?;
    Ok(())
}

pub fn port_of_another_servers_pod_is_refused_with_its_name(node: &Node) -> Result<()> {
    let ports = [port(Protocol::Tcp, "", 8095, 80)];
    let cri = node.cri()?;
    let one = Pod::run(cri, pod_with(node, "holder", &ports)?)?;
    let second = node.plan("second").start()?;
    let late = pod_with(node, "late", &ports)?;
    let message = refused(second.cri.run_pod(&late), &[Code::FailedPrecondition])?;
    ensure!(
        message.contains("8095/tcp") && message.contains("tests/holder of the server with"),
        "{message}"
    );
    cri.remove_pod(&one.id)?;
    let id = Pod::run(&second.cri, late)?.id;
    second.cri.remove_pod(&id)?;
    second.stop()
}

pub fn ports_of_a_protocol_that_guests_lack_are_refused(node: &Node) -> Result<()> {
    let ports = [port(Protocol::Sctp, "", 8094, 80)];
    let config = pod_with(node, "sctp", &ports)?;
    let message = refused(node.cri()?.run_pod(&config), &[Code::InvalidArgument])?;
    ensure!(message.contains("protocol SCTP"), "{message}");
    Ok(())
}

pub fn ports_end_with_their_pod_after_the_server_was_killed(node: &Node) -> Result<()> {
    let first = node.plan("killed").start()?;
    let image = node.image_on(&first.cri, BASE)?;
    let ports = [port(Protocol::Tcp, "", 8096, 80)];
    let pod = Pod::run(&first.cri, pod_with(node, "ported", &ports)?)?;
    pod.start(&shell("httpd", &image, WEB))?;
    let id = pod.id.clone();
    let other = Pod::run(&first.cri, node.pod_config("other")?)?.id;
    fetch("127.0.0.1:8096".parse()?)?;
    first.kill()?;
    // The rules are the kernel's.
    fetch("127.0.0.1:8096".parse()?)?;
    let second = node.plan("killed").start()?;
    let late = pod_with(node, "late", &ports)?;
    let message = refused(second.cri.run_pod(&late), &[Code::FailedPrecondition])?;
    ensure!(message.contains("tests/ported"), "{message}");
    fetch("127.0.0.1:8096".parse()?)?;
    second.cri.remove_pod(&id)?;
    let rules = run("nft list ruleset")?;
    ensure!(!rules.contains("8096"), "{rules}");
    second.cri.remove_pod(&other)?;
    second.stop()
}

pub fn service_on_the_node_is_reached_from_its_pods(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let image = node.base()?;
    let (server, client) = (node.pod("server")?, node.pod("client")?);
    server.start(&shell("httpd", &image, WEB))?;
    let id = client.start(&sleeper("wget", &image))?;
    let [four, six] = addresses(cri, &server.id)?;
    fetch(SocketAddr::new(four, 80))?;
    run(&format!(
        "nft 'add table inet service; add chain inet service in {{ type nat hook prerouting \
         priority -90; }}; add rule inet service in ip daddr 10.96.0.10 tcp dport 8080 \
         dnat ip to {four}:80; add rule inet service in ip6 daddr fd96::10 tcp dport 8080 \
         dnat ip6 to [{six}]:80'"
    ))?;
    let pages = ["10.96.0.10", "[fd96::10]"]
        .map(|name| cri.shell(&id, &format!("timeout 60 wget -q -O - http://{name}:8080/")));
    run("nft delete table inet service")?;
    for page in pages {
        ensure!(page? == PAGE, "another page");
    }
    Ok(())
}

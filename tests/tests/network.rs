//! The pods' network: addresses, and who reaches whom.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bulkhead_tests::http::{connect, fetch};
use bulkhead_tests::request::{container, shell, sleeper};
use bulkhead_tests::{Node, suite};

suite! {
    pod_has_the_address_its_status_names,
    pods_have_addresses_of_their_own,
    host_reaches_the_pods_web_server,
    pod_reaches_the_host,
    pod_reaches_another_pod,
    large_transfers_arrive_whole,
    loopback_is_up,
    address_ends_with_the_pod,
}

fn pod_has_the_address_its_status_names(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("address")?;
    let id = pod.start(&sleeper("reader", &node.base()?))?;
    let address = cri.pod_ip(&pod.id)?;
    let said = cri.shell(&id, "ip -o -4 addr show eth0; ip route")?;
    ensure!(
        said.contains(&format!("inet {address}/")),
        "{address}: {said}"
    );
    ensure!(said.contains("default via "), "{said}");
    Ok(())
}

fn pods_have_addresses_of_their_own(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let (one, two) = (node.pod("one")?, node.pod("two")?);
    let (first, second) = (cri.pod_ip(&one.id)?, cri.pod_ip(&two.id)?);
    ensure!(first != second, "both have {first}");
    Ok(())
}

fn host_reaches_the_pods_web_server(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("web")?;
    let config = container("lighttpd", &node.image("demo/web:1")?, &[]);
    pod.start(&config)?;
    let page = fetch(SocketAddr::new(cri.pod_ip(&pod.id)?, 80))?;
    ensure!(page.contains("Served by lighttpd from a pod."), "{page}");
    Ok(())
}

fn pod_reaches_the_host(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("outward")?;
    let id = pod.start(&sleeper("client", &node.base()?))?;
    let gateway = cri.shell(
        &id,
        "ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'",
    )?;
    let gateway: IpAddr = gateway.trim().parse().with_context(|| gateway.clone())?;
    let listener = TcpListener::bind((gateway, 0)).context("the pod's gateway is the host")?;
    let port = listener.local_addr()?.port();
    let host = std::thread::spawn(move || -> Result<IpAddr> {
        let (mut stream, peer) = listener.accept()?;
        let mut request = [0; 1024];
        let _ = stream.read(&mut request)?;
        stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\nhost")?;
        Ok(peer.ip())
    });
    let page = cri.shell(&id, &format!("wget -q -O - http://{gateway}:{port}/"))?;
    ensure!(page == "host", "{page}");
    let peer = host
        .join()
        .map_err(|_| anyhow::anyhow!("the host's server panicked"))??;
    ensure!(peer == cri.pod_ip(&pod.id)?, "the host sees {peer}");
    Ok(())
}

fn pod_reaches_another_pod(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let image = node.base()?;
    let (server, client) = (node.pod("server")?, node.pod("client")?);
    server.start(&shell("httpd", &image, "exec httpd -f -p 80 -h /www"))?;
    let id = client.start(&sleeper("wget", &image))?;
    let address = cri.pod_ip(&server.id)?;
    fetch(SocketAddr::new(address, 80))?;
    let page = cri.shell(&id, &format!("wget -q -O - http://{address}/"))?;
    ensure!(page == "hello from the base image", "{page}");
    Ok(())
}

fn large_transfers_arrive_whole(node: &Node) -> Result<()> {
    const BYTES: usize = 8 << 20;
    let cri = node.cri()?;
    let pod = node.pod("transfer")?;
    let line = format!("seq 2000000 | head -c {BYTES} | nc -l -p 9000");
    let id = pod.start(&shell("sender", &node.base()?, &line))?;
    let mut stream = connect(SocketAddr::new(cri.pod_ip(&pod.id)?, 9000))?;
    let mut received = Vec::new();
    if let Err(error) = stream.read_to_end(&mut received) {
        let guest = "cat /proc/net/dev /proc/net/tcp /proc/net/snmp /proc/interrupts";
        let seen = cri.shell(&id, guest);
        bail!(
            "{error} after {} bytes; the guest: {seen:?}",
            received.len()
        );
    }
    let mut wanted = String::new();
    for number in 1..=2_000_000 {
        wanted.push_str(&format!("{number}\n"));
        if wanted.len() >= BYTES {
            break;
        }
    }
    ensure!(received.len() == BYTES, "{} bytes", received.len());
    ensure!(
        Some(&*received) == wanted.as_bytes().get(..BYTES),
        "other bytes"
    );
    Ok(())
}

fn loopback_is_up(node: &Node) -> Result<()> {
    let pod = node.pod("loopback")?;
    let line = "ip -o link show lo | grep -c LOWER_UP; ping -c 1 -W 5 127.0.0.1 > /dev/null && echo answers";
    let ended = pod.run_to_end(&shell("ping", &node.base()?, line))?;
    ensure!(
        ended.stdout() == "1\nanswers\n",
        "{:?} {:?}",
        ended.stdout(),
        ended.stderr()
    );
    Ok(())
}

fn address_ends_with_the_pod(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("ends")?;
    pod.start(&shell(
        "httpd",
        &node.base()?,
        "exec httpd -f -p 80 -h /www",
    ))?;
    let address = SocketAddr::new(cri.pod_ip(&pod.id)?, 80);
    fetch(address)?;
    // The network goes at the stop already: the kubelet gives the address to somebody else.
    cri.stop_pod(&pod.id)?;
    let answer = TcpStream::connect_timeout(&address, Duration::from_secs(3));
    ensure!(answer.is_err(), "{address} still answers");
    Ok(())
}

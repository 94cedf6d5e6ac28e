//! The pods' network: addresses, and who reaches whom.

mod frames;
mod pool;
mod ports;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bulkhead_tests::http::fetch;
use bulkhead_tests::request::{container, shell, sleeper};
use bulkhead_tests::{Cri, Node, suite};

use frames::*;
use pool::*;
use ports::*;

suite! {
    pod_has_the_address_its_status_names,
    pods_have_addresses_of_their_own,
    host_reaches_the_pods_web_server,
    pod_reaches_the_host,
    pod_reaches_another_pod,
    large_transfers_arrive_whole,
    pod_of_two_cpus_uses_two_pairs_of_queues,
    neighbours_outlive_a_pod_that_floods_and_forges,
    forged_addresses_are_not_heard,
    loopback_is_up,
    address_ends_with_the_pod,
    pod_has_addresses_of_both_families,
    pods_reach_the_world_by_the_hosts_addresses,
    port_of_the_host_leads_to_the_pod_from_everywhere,
    datagrams_to_a_port_of_the_host_arrive,
    datagrams_of_a_client_that_keeps_its_port_reach_the_next_pod,
    port_is_bound_to_the_address_it_names,
    port_of_another_pod_is_refused_with_its_name,
    port_of_another_servers_pod_is_refused_with_its_name,
    ports_of_a_protocol_that_guests_lack_are_refused,
    ports_end_with_their_pod_after_the_server_was_killed,
    doctor_names_a_firewall_in_the_pods_way,
    service_on_the_node_is_reached_from_its_pods,
    kubelets_pod_cidr_is_the_next_bridges,
    full_pool_is_refused_and_serves_again,
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

const WEB: &str = "exec httpd -f -p 80 -h /www";
const PAGE: &str = "hello from the base image";

fn run(line: &str) -> Result<String> {
    let done = Command::new("sh").args(["-ec", line]).output()?;
    ensure!(done.status.success(), "{line}: {done:?}");
    Ok(String::from_utf8(done.stdout)?)
}

/// The pod's address of each family.
fn addresses(cri: &Cri, pod: &str) -> Result<[IpAddr; 2]> {
    let network = cri.pod(pod)?.network.context("no network")?;
    let [six] = network.additional_ips.as_slice() else {
        bail!("{network:?}");
    };
    Ok([network.ip.parse()?, six.ip.parse()?])
}

/// The bridge's address of each family, as a pod sees it.
fn gateways(cri: &Cri, container: &str) -> Result<[IpAddr; 2]> {
    let find = |family: &str| -> Result<IpAddr> {
        let line = format!("ip {family} route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'");
        let said = cri.shell(container, &line)?;
        said.trim().parse().with_context(|| said.clone())
    };
    Ok([find("-4")?, find("-6")?])
}

/// The page on an address of the host.
fn page(address: &str) -> Result<String> {
    let page = fetch(address.parse()?).with_context(|| address.to_owned())?;
    Ok(page.trim_end().to_owned())
}

fn url(address: IpAddr, port: u16) -> String {
    format!("http://{}/", SocketAddr::new(address, port))
}

/// A network beside the host with a machine in it: a process that keeps a namespace.
struct World(Child);

impl World {
    fn make() -> Result<Self> {
        let mut command = Command::new("unshare");
        let world = Self(command.args(["--net", "sleep", "infinity"]).spawn()?);
        let pid = world.0.id();
        // The namespace is there when it is another than ours.
        run(&format!(
            "until [ $(readlink /proc/{pid}/ns/net) != $(readlink /proc/self/ns/net) ]; do :; done
            ip link add world type veth peer name eth0 netns {pid}
            sysctl -qw net.ipv6.conf.world.accept_dad=0
            ip link set world up; ip addr add 192.0.2.1/24 dev world
            ip addr add 2001:db8::1/64 dev world nodad"
        ))?;
        world.shell(
            "ip link set lo up; ip link set eth0 up; ip addr add 192.0.2.2/24 dev eth0
            ip addr add 2001:db8::2/64 dev eth0 nodad",
        )?;
        Ok(world)
    }

    /// What a line of shell says there.
    fn shell(&self, line: &str) -> Result<String> {
        run(&format!(
            "nsenter --net --target {} sh -ec '{line}'",
            self.0.id()
        ))
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = run("ip link delete world");
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn pod_has_addresses_of_both_families(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let image = node.base()?;
    let (server, client) = (node.pod("server")?, node.pod("client")?);
    let web = server.start(&shell("httpd", &image, WEB))?;
    let id = client.start(&sleeper("wget", &image))?;
    let [_, six] = addresses(cri, &server.id)?;
    let [_, other] = addresses(cri, &client.id)?;
    ensure!(
        six.to_string().starts_with("fd") && six != other,
        "{six} {other}"
    );
    let said = cri.shell(&web, "ip -o -6 addr show eth0; ip -6 route")?;
    ensure!(said.contains(&format!("inet6 {six}/64")), "{said}");
    ensure!(!said.contains("tentative"), "{said}");
    // From the host, from another pod, and back to the host.
    let said = page(&SocketAddr::new(six, 80).to_string())?;
    ensure!(said == PAGE, "{said}");
    let page = cri.shell(&id, &format!("wget -q -O - {}", url(six, 80)))?;
    ensure!(page == PAGE, "{page}");
    let [_, gateway] = gateways(cri, &id)?;
    cri.shell(&id, &format!("ping -6 -c 1 -W 20 {gateway}"))?;
    Ok(())
}

fn pods_reach_the_world_by_the_hosts_addresses(node: &Node) -> Result<()> {
    let world = World::make()?;
    let cri = node.cri()?;
    let pod = node.pod("traveller")?;
    let id = pod.start(&sleeper("client", &node.base()?))?;
    for (there, here) in [("192.0.2.2", "192.0.2.1"), ("2001:db8::2", "2001:db8::1")] {
        // It says who it hears of, once.
        let line = format!(
            "perl -MIO::Socket::IP -e \"\\$s = IO::Socket::IP->new(Listen => 1, \
                 LocalHost => q({there}), LocalPort => 7000) or die; \\$c = \\$s->accept; \
                 print \\$c->peerhost\""
        );
        let dial = format!("until nc -w 5 {there} 7000 < /dev/null; do sleep 1; done");
        let seen = std::thread::scope(|scope| -> Result<String> {
            let listener = scope.spawn(|| world.shell(&line));
            cri.shell(&id, &dial)?;
            let said = listener.join();
            said.map_err(|_| anyhow::anyhow!("the listener panicked"))?
        })?;
        ensure!(seen == here, "{there} hears of {seen}");
    }
    Ok(())
}

fn doctor_names_a_firewall_in_the_pods_way(node: &Node) -> Result<()> {
    let doctor = || -> Result<String> {
        let program = node.programs().join("bulkhead");
        let done = Command::new(program).arg("doctor").output()?;
        Ok(String::from_utf8(done.stdout)?)
    };
    run("nft 'add table inet wall; add chain inet wall way \
        { type filter hook forward priority 0; policy drop; }'")?;
    let closed = doctor();
    let opened =
        run("nft add rule inet wall way iifname 'bulkhead*' accept").and_then(|_| doctor());
    run("nft delete table inet wall")?;
    let (closed, opened) = (closed?, opened?);
    let line = "warn  forwarding: way of nft's table inet wall drops";
    ensure!(closed.contains(line), "{closed}");
    ensure!(!opened.contains("table inet wall"), "{opened}");
    Ok(())
}

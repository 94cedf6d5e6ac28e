//! The pods' network: addresses, and who reaches whom.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bulkhead_cri_api::v1::{PodSandboxConfig, PortMapping, Protocol};
use bulkhead_tests::cri::refused;
use bulkhead_tests::http::{connect, fetch};
use bulkhead_tests::leak::Machine;
use bulkhead_tests::node::{BASE, WEB as WEB_IMAGE, counted};
use bulkhead_tests::request::{Pod, container, pod_resources, security, shell, sleeper};
use bulkhead_tests::{Cri, Node, suite};
use tonic::Code;

suite! {
    pod_has_the_address_its_status_names,
    pods_have_addresses_of_their_own,
    host_reaches_the_pods_web_server,
    pod_reaches_the_host,
    pod_reaches_another_pod,
    large_transfers_arrive_whole,
    pod_of_two_cpus_uses_two_pairs_of_queues,
    neighbours_outlive_a_pod_that_floods_and_forges,
    loopback_is_up,
    address_ends_with_the_pod,
    pod_has_addresses_of_both_families,
    pods_reach_the_world_by_the_hosts_addresses,
    port_of_the_host_leads_to_the_pod_from_everywhere,
    datagrams_to_a_port_of_the_host_arrive,
    port_is_bound_to_the_address_it_names,
    port_of_another_pod_is_refused_with_its_name,
    ports_end_with_their_pod_after_the_server_was_killed,
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

fn pod_of_two_cpus_uses_two_pairs_of_queues(node: &Node) -> Result<()> {
    const STREAMS: usize = 8;
    const BYTES: usize = 1 << 20;
    let cri = node.cri()?;
    let mut config = node.pod_config("queues")?;
    let limits = pod_resources(&mut config);
    (limits.cpu_period, limits.cpu_quota) = (100_000, 200_000);
    let pod = Pod::run(cri, config)?;
    let line = format!(
        "for port in $(seq 9000 {}); do seq 2000000 | head -c {BYTES} | nc -l -p $port & done; wait",
        9000 + STREAMS - 1
    );
    let id = pod.start(&shell("sender", &node.base()?, &line))?;
    let queues = cri.shell(&id, "ls /sys/class/net/eth0/queues")?;
    ensure!(
        queues
            .split_whitespace()
            .eq(["rx-0", "rx-1", "tx-0", "tx-1"]),
        "{queues}"
    );
    let address = cri.pod_ip(&pod.id)?;
    let mut wanted: String = (1..=200_000).map(|number| format!("{number}\n")).collect();
    wanted.truncate(BYTES);
    let streams: Vec<_> = (9000..)
        .take(STREAMS)
        .map(|port| {
            std::thread::spawn(move || -> Result<Vec<u8>> {
                let mut received = Vec::new();
                connect(SocketAddr::new(address, port))?.read_to_end(&mut received)?;
                Ok(received)
            })
        })
        .collect();
    for stream in streams {
        let received = stream.join();
        let received = received.map_err(|_| anyhow::anyhow!("a reader panicked"))??;
        ensure!(received == wanted.as_bytes(), "{} bytes", received.len());
    }
    Ok(())
}

/// Sends as root of a privileged container can: frames of any length with any content, such that
/// claim to be of others, and such whose header asks the host for what makes no sense.
const FORGE: &str = r#"
use Socket;
my ($count, $seed) = @ARGV;
srand $seed;
socket(my $wire, 17, SOCK_RAW, 0x0300) or die "socket: $!";
open my $sys, "<", "/sys/class/net/eth0/ifindex" or die; chomp(my $index = <$sys>);
my $eth0 = pack("S n l S C C a8", 17, 3, $index, 1, 0, 6, "\xff" x 6);
# PACKET_VNET_HDR of SOL_PACKET: a header before each frame.
my ($sent, $refused) = (0, 0);
for my $headed (0, 1) {
    setsockopt($wire, 263, 15, pack("i", $headed)) or die "PACKET_VNET_HDR: $!";
    for (1 .. $count) {
        my $length = rand() < 0.1 ? int rand 60000 : int rand 1500;
        my $frame = join "", map { chr int rand 256 } 1 .. (14 + ($length > 200 ? 200 : $length));
        $frame .= "\0" x ($length - 200) if $length > 200;
        # Half of them look like IP, from an address of somebody else.
        substr($frame, 12, 9) = pack "n C*", 0x0800, 0x45, 0, 0, 60, 0, 0, 0 if rand() < 0.5;
        substr($frame, 0, 6) = "\xff" x 6 if rand() < 0.2;
        my $header = pack "C C v v v v", int rand 8, (0, 1, 3, 4, 5, 0x81, int rand 256)[rand 7],
            map { int rand(rand() < 0.5 ? 65536 : 100) } 1 .. 4;
        defined send($wire, $headed ? $header . $frame : $frame, 0, $eth0) ? $sent++ : $refused++;
    }
}
print "sent $sent refused $refused\n";
"#;

fn neighbours_outlive_a_pod_that_floods_and_forges(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let image = node.image(WEB_IMAGE)?;
    let (neighbour, rogue) = (node.pod("neighbour")?, node.pod("rogue")?);
    neighbour.start(&container("lighttpd", &image, &[]))?;
    let address = SocketAddr::new(cri.pod_ip(&neighbour.id)?, 80);
    fetch(address)?;
    let mut forger = sleeper("forger", &image);
    let capabilities = security(&mut forger).capabilities.get_or_insert_default();
    capabilities.add_capabilities.push("NET_RAW".to_owned());
    let id = rogue.start(&forger)?;
    let count = counted(1000).to_string();
    let said = cri.output(&id, &["perl", "-e", FORGE, &count, "1"])?;
    let sent = said.split_whitespace().nth(1).map(str::parse::<u32>);
    ensure!(matches!(sent, Some(Ok(500..))), "{said}");
    // The neighbour, the host's way to the rogue, and the rogue's own network work on.
    let page = fetch(address)?;
    ensure!(page.contains("Served by lighttpd from a pod."), "{page}");
    let ask = "use IO::Socket::INET; my $web = IO::Socket::INET->new($ARGV[0]) or die; \
               print $web \"GET / HTTP/1.0\\r\\n\\r\\n\"; print <$web>";
    let page = cri.output(&id, &["perl", "-e", ask, &address.to_string()])?;
    ensure!(page.contains("Served by lighttpd from a pod."), "{page}");
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

fn port_of_the_host_leads_to_the_pod_from_everywhere(node: &Node) -> Result<()> {
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

fn datagrams_to_a_port_of_the_host_arrive(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let ports = [port(Protocol::Udp, "", 5399, 53)];
    let pod = Pod::run(cri, pod_with(node, "datagrams", &ports)?)?;
    let line = "exec perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(LocalPort => 53, \
        Proto => q(udp)) or die; while ($s->recv($word, 99)) { $s->send(qq(got $word)) }'";
    pod.start(&shell("echo", &node.image(WEB_IMAGE)?, line))?;
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    let mut answer = [0; 64];
    for _ in 0..30 {
        socket.send_to(b"word\n", "127.0.0.1:5399")?;
        if let Ok((count, from)) = socket.recv_from(&mut answer) {
            ensure!(answer[..count] == *b"got word\n", "{:?}", &answer[..count]);
            ensure!(from.to_string() == "127.0.0.1:5399", "{from}");
            return Ok(());
        }
    }
    bail!("no answer came");
}

fn port_is_bound_to_the_address_it_names(node: &Node) -> Result<()> {
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

fn port_of_another_pod_is_refused_with_its_name(node: &Node) -> Result<()> {
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

fn ports_end_with_their_pod_after_the_server_was_killed(node: &Node) -> Result<()> {
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

fn service_on_the_node_is_reached_from_its_pods(node: &Node) -> Result<()> {
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

fn kubelets_pod_cidr_is_the_next_bridges(node: &Node) -> Result<()> {
    let server = node.plan("cidr").start()?;
    let cri = &server.cri;
    let before = Pod::run(cri, node.pod_config("before")?)?;
    cri.tell_pod_cidr("10.77.8.0/24,fd77:8::/64")?;
    let kept = Pod::run(cri, node.pod_config("kept")?)?;
    let address = cri.pod_ip(&kept.id)?;
    ensure!(!address.to_string().starts_with("10.77.8."), "{address}");
    for pod in [before, kept] {
        cri.remove_pod(&pod.id)?;
    }
    let after = Pod::run(cri, node.pod_config("after")?)?;
    let [four, six] = addresses(cri, &after.id)?;
    ensure!(four.to_string().starts_with("10.77.8."), "{four}");
    ensure!(six.to_string().starts_with("fd77:8::"), "{six}");
    for (cidr, why) in [("10.77.8.0", "10.77.8.0"), ("10.0.0.0/31", "no room")] {
        let message = refused(cri.tell_pod_cidr(cidr), &[Code::InvalidArgument])?;
        ensure!(message.contains(why), "{cidr}: {message}");
    }
    server.stop()
}

fn full_pool_is_refused_and_serves_again(node: &Node) -> Result<()> {
    let server = node.plan("full").start()?;
    let cri = &server.cri;
    cri.tell_pod_cidr("10.77.9.0/30")?;
    let only = Pod::run(cri, node.pod_config("only")?)?;
    let before = Machine::look_at(&server)?;
    let late = node.pod_config("late")?;
    let message = refused(cri.run_pod(&late), &[Code::ResourceExhausted])?;
    ensure!(message.contains("10.77.9.0/30"), "{message}");
    before.settles_again_at(&server)?;
    cri.remove_pod(&only.id)?;
    let again = Pod::run(cri, late)?;
    ensure!(
        cri.pod_ip(&again.id)?.to_string() == "10.77.9.2",
        "another address"
    );
    server.stop()
}

//! Frames: many, large, and forged.

use std::io::Read;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bulkhead_tests::Node;
use bulkhead_tests::http::{connect, fetch};
use bulkhead_tests::node::{WEB as WEB_IMAGE, counted};
use bulkhead_tests::request::{Pod, container, pod_resources, security, shell, sleeper};

use crate::{WEB, addresses, gateways, run};

pub fn large_transfers_arrive_whole(node: &Node) -> Result<()> {
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

pub fn pod_of_two_cpus_uses_two_pairs_of_queues(node: &Node) -> Result<()> {
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

pub fn neighbours_outlive_a_pod_that_floods_and_forges(node: &Node) -> Result<()> {
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

/// Sends as somebody else, and then as itself: `OWN VICTIM OWN6 VICTIM6 HOST HOST6` and the host's
/// and the victim's hardware addresses, in hexadecimal. Everything is said to port 5000 of the host.
const PRETEND: &str = r#"
use Socket qw(:DEFAULT inet_pton);
my ($own, $victim, $own6, $victim6, $host, $host6, $to, $theirs) = @ARGV;
$_ = inet_pton(AF_INET, $_) for $own, $victim, $host;
$_ = inet_pton(10, $_) for $own6, $victim6, $host6;
$_ = pack "H*", $_ for $to, $theirs;
open my $sys, "<", "/sys/class/net/eth0/address" or die;
chomp(my $mac = <$sys>);
$mac = pack "H*", $mac =~ s/://gr;
open $sys, "<", "/sys/class/net/eth0/ifindex" or die;
chomp(my $index = <$sys>);
socket(my $wire, 17, SOCK_RAW, 0x0300) or die "socket: $!";
my $eth0 = pack "S n l S C C a8", 17, 3, $index, 1, 0, 6, "\xff" x 6;
sub sum {
    my $sum = 0;
    $sum += $_ for unpack "n*", shift() . "\0";
    $sum = ($sum & 0xffff) + ($sum >> 16) while $sum >> 16;
    return ~$sum & 0xffff;
}
sub frame { send($wire, join("", @_), 0, $eth0) or die "send: $!" }
sub text {
    my ($from, $source, $word) = @_;
    my $head = pack "C C n n n C C n a4 a4", 0x45, 0, 32, 1, 0, 64, 17, 0, $source, $host;
    substr($head, 10, 2) = pack "n", sum($head);
    frame $to, $from, "\x08\x00", $head, pack("n n n n", 4000, 5000, 12, 0), $word;
}
sub text6 {
    my ($source, $word) = @_;
    my $body = pack("n n n n", 4000, 5000, 12, 0) . $word;
    substr($body, 6, 2) = pack "n", sum(pack("a16 a16 N N", $source, $host6, 12, 17) . $body);
    my $head = pack "N n C C a16 a16", 0x60000000, 12, 17, 64, $source, $host6;
    frame $to, $mac, "\x86\xdd", $head, $body;
}
sub claim {
    my ($address) = @_;
    frame $to, $mac, "\x08\x06", pack("n n C C n", 1, 0x0800, 6, 4, 2), $mac, $address, $to, $host;
}
sub claim6 {
    my ($source, $address) = @_;
    my $body = pack("C C n N", 136, 0, 0, 0x60000000) . $address . pack("C C", 2, 1) . $mac;
    substr($body, 2, 2) = pack "n", sum(pack("a16 a16 N N", $source, $host6, 32, 58) . $body);
    my $head = pack "N n C C a16 a16", 0x60000000, 32, 58, 255, $source, $host6;
    frame $to, $mac, "\x86\xdd", $head, $body;
}
for (1 .. 20) {
    text $mac, $victim, "ip.4";
    text $theirs, $own, "mac!";
    text6 $victim6, "ip.6";
    claim $victim;
    claim6 $own6, $victim6;
    claim6 $victim6, $victim6;
    select undef, undef, undef, 0.2;
}
for (1 .. 20) {
    text $mac, $own, "own4";
    text6 $own6, "own6";
    select undef, undef, undef, 0.1;
}
"#;

pub fn forged_addresses_are_not_heard(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let image = node.image(WEB_IMAGE)?;
    let (neighbour, rogue) = (node.pod("neighbour")?, node.pod("rogue")?);
    neighbour.start(&shell("httpd", &node.base()?, WEB))?;
    let mut forger = sleeper("forger", &image);
    let capabilities = security(&mut forger).capabilities.get_or_insert_default();
    capabilities.add_capabilities.push("NET_RAW".to_owned());
    let id = rogue.start(&forger)?;
    let [victim, victim6] = addresses(cri, &neighbour.id)?;
    let [own, own6] = addresses(cri, &rogue.id)?;
    let [host, host6] = gateways(cri, &id)?;
    // The host knows both, and so has something to lose.
    for address in [victim, victim6] {
        fetch(SocketAddr::new(address, 80))?;
    }
    let mac = |address: IpAddr| -> Result<String> {
        let said = run(&format!("ip neigh show to {address}"))?;
        let mut words = said.split_whitespace();
        words.find(|word| *word == "lladdr");
        let mac = words.next().with_context(|| format!("{address}: {said}"))?;
        Ok(mac.replace(':', ""))
    };
    let theirs = mac(victim)?;
    ensure!(mac(victim6)? == theirs, "two hardware addresses");
    let link = run(&format!("ip -o addr show to {host} | cut -d' ' -f2"))?;
    let gateway = run(&format!("cat /sys/class/net/{}/address", link.trim()))?;

    let heard = |address: IpAddr| -> Result<UdpSocket> {
        let socket = UdpSocket::bind((address, 5000))?;
        socket.set_read_timeout(Some(Duration::from_secs(20)))?;
        Ok(socket)
    };
    let (four, six) = (heard(host)?, heard(host6)?);
    let who = [own, victim, own6, victim6, host, host6].map(|address| address.to_string());
    let gateway = gateway.trim().replace(':', "");
    let words = who.iter().map(String::as_str).chain([&*gateway, &theirs]);
    let command: Vec<&str> = ["perl", "-e", PRETEND].into_iter().chain(words).collect();
    cri.output(&id, &command)?;
    // The first that is heard is an honest one.
    for (socket, honest, from) in [(four, "own4", own), (six, "own6", own6)] {
        let mut word = [0; 8];
        let (count, peer) = socket.recv_from(&mut word).with_context(|| honest)?;
        ensure!(word[..count] == *honest.as_bytes(), "{:?}", &word[..count]);
        ensure!(peer.ip() == from, "{peer}");
    }
    for address in [victim, victim6] {
        ensure!(mac(address)? == theirs, "{address} is the rogue's");
        fetch(SocketAddr::new(address, 80))?;
    }
    Ok(())
}

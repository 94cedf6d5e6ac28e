//! Measures the network: pods of this project and of the reference, and VMs alone on a tap.
//!
//! `net-clock DIRECTORY RUNS`; the directory holds `net` (tests/perf/net.c), and for the VMs
//! `bulkhead-vmm`, `vmlinux` and `net-init` (an initramfs whose init is `net`).
//! Prints one JSON object at the end, and nothing before: output would disturb the clock.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use bulkhead_cri_api::v1::PodSandboxStatusRequest;
use bulkhead_tests::Node;
use bulkhead_tests::http::connect;
use bulkhead_tests::hypervisor::{Hypervisor, Machine, Setup};
use bulkhead_tests::node::BASE;
use bulkhead_tests::request::{Pod, shell, sleeper};
use bulkhead_tests::server::{Runtime, Server, phase};
use bulkhead_vmm_api::InterfaceCounters;

/// The servers by their names in the figures.
const RUNTIMES: [(&str, Runtime); 2] = [
    ("bulkhead", Runtime::Bulkhead),
    ("reference", Runtime::Reference),
];
/// Where everybody serves, as `net` does as init.
const ECHO: u16 = 1;
const SINK: u16 = 2;
/// What is moved at once, and how many requests are made.
const BYTES: u64 = 16 << 20;
const REQUESTS: u64 = 100;
/// The network of the VMs' tap: the host's address, and the VM's.
const HOST: &str = "10.99.0.1";
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 2);
const TAP: &str = "net-clock";
/// Where the plugin is measured alone.
const NAMESPACE: &str = "net-clock";

/// Figures by their names.
type Figures = BTreeMap<String, Vec<u64>>;

fn main() -> Result<()> {
    println!("{}", measure()?);
    Ok(())
}

fn measure() -> Result<serde_json::Value> {
    let mut arguments = std::env::args().skip(1);
    let (Some(directory), Some(runs)) = (arguments.next(), arguments.next()) else {
        bail!("usage: net-clock DIRECTORY RUNS");
    };
    let directory = PathBuf::from(directory);
    let runs: u32 = runs.parse().context("RUNS is not a number")?;
    let program = directory.join("net");
    let mut figures = Figures::new();

    for run in 0..=runs {
        for hypervisor in [Hypervisor::Bulkhead, Hypervisor::Qemu] {
            let vm = vm(hypervisor, &directory).context(hypervisor.name())?;
            keep(&mut figures, run, hypervisor.name(), vm);
        }
    }

    let node = Node::open("net-clock")?;
    let mut servers = Vec::new();
    for (name, runtime) in RUNTIMES {
        let mut plan = node.plan(name);
        plan.runtime = runtime;
        servers.push((name, runtime, plan.start()?));
    }
    let shelf = offer(fs::read(&program)?)?;
    let host = Services::start(&program)?;
    for run in 0..=runs {
        // Both in turn, so that a change of the machine's speed meets both alike.
        for (name, runtime, server) in &servers {
            let case = Case {
                node: &node,
                server,
                counts: *runtime == Runtime::Bulkhead,
                program: &program,
                shelf,
            };
            let pods = case.pods(&format!("{name}-{run}"));
            let pods =
                pods.with_context(|| format!("{name}, whose log ends:\n{}", server.log_tail()));
            keep(&mut figures, run, name, pods?);
        }
    }
    drop(host);
    let mut plan = node.plan("cni");
    plan.runtime = Runtime::Bulkhead;
    plan.cni = Some(bridge(&node));
    let server = plan.start()?;
    for run in 0..=runs {
        let logged = server.log_length();
        Pod::run(&server.cri, node.pod_config(&format!("cni-{run}"))?)?;
        let network = phase(&server.log_since(logged), "network")?;
        server.remove_pods()?;
        let cni = [
            ("network".to_owned(), network),
            ("plugins".to_owned(), plugin(&node)?),
        ];
        keep(&mut figures, run, "cni", cni.into());
    }
    server.stop()?;
    for (_, _, server) in servers {
        server.stop()?;
    }
    Ok(serde_json::to_value(figures)?)
}

/// The first run fills caches.
fn keep(figures: &mut Figures, run: u32, name: &str, more: BTreeMap<String, u64>) {
    for (figure, value) in more.into_iter().filter(|_| run > 0) {
        figures
            .entry(format!("{name} {figure}"))
            .or_default()
            .push(value);
    }
}

/// Lets whoever asks have the program over HTTP.
fn offer(program: Vec<u8>) -> Result<u16> {
    let listener = TcpListener::bind("0.0.0.0:0")?;
    let port = listener.local_addr()?.port();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut request = [0; 1024];
            let _ = stream.read(&mut request);
            let head = format!(
                "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n",
                program.len()
            );
            let sent = stream.write_all(head.as_bytes());
            // Whoever went away does not miss it.
            let _ = sent.and_then(|()| stream.write_all(&program));
        }
    });
    Ok(port)
}

/// Echo and sink on the host, until dropped.
struct Services(Vec<Child>);

impl Services {
    fn start(program: &Path) -> Result<Self> {
        let mut all = Self(Vec::new());
        for (service, port) in [("echo", ECHO), ("sink", SINK)] {
            let mut command = Command::new(program);
            all.0
                .push(command.args([service, &port.to_string()]).spawn()?);
        }
        Ok(all)
    }
}

impl Drop for Services {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A server whose pods are measured.
struct Case<'a> {
    node: &'a Node,
    server: &'a Server,
    /// Whether its pods' interfaces are counted.
    counts: bool,
    program: &'a Path,
    /// Where the host serves the program.
    shelf: u16,
}

impl Case<'_> {
    /// Two pods speak with each other and with the host.
    fn pods(&self, name: &str) -> Result<BTreeMap<String, u64>> {
        let cri = &self.server.cri;
        let image = self.node.image_on(cri, BASE)?;
        let logged = self.server.log_length();
        let (near, far) = (format!("{name}-near"), format!("{name}-far"));
        let near = Pod::run(cri, self.node.pod_config(&near)?)?;
        let far = Pod::run(cri, self.node.pod_config(&far)?)?;
        let gateway = "$(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p')";
        let fetch = format!(
            "wget -q -O /tmp/net http://{gateway}:{}/ && chmod +x /tmp/net",
            self.shelf
        );
        let serve = format!("{fetch}; /tmp/net echo {ECHO} & exec /tmp/net sink {SINK}");
        far.start(&shell("services", &image, &serve))?;
        let client = near.start(&sleeper("client", &image))?;
        cri.shell(&client, &fetch)?;
        let host: IpAddr = cri
            .shell(&client, &format!("echo {gateway}"))?
            .trim()
            .parse()?;
        let pod = cri.pod_ip(&far.id)?;
        for port in [ECHO, SINK] {
            connect(SocketAddr::new(pod, port))?;
        }

        let mut figures = BTreeMap::new();
        for (to, words) in [(pod, "pod"), (host, "host")] {
            let run = |verb: &str, port: u16, count: u64| {
                let line = format!("/tmp/net {verb} {to} {port} {count}");
                nanoseconds(&cri.shell(&client, &line)?)
            };
            let before = self.counters(&near)?;
            figures.insert(format!("pod to {words}"), run("send", SINK, BYTES)?);
            if words == "host" {
                figures.extend(counted("sent", before, self.counters(&near)?));
            }
            let asked = run("ask", ECHO, REQUESTS)? / REQUESTS;
            figures.insert(format!("pod asks {words}"), asked);
        }
        // How the device fares with more than one connection to wait for.
        let before = self.counters(&near)?;
        let line = format!("/tmp/net many {host} {SINK} {BYTES}");
        let sent = nanoseconds(&cri.shell(&client, &line)?)?;
        figures.insert("pod to host by 8".into(), sent);
        figures.extend(counted("sent by 8", before, self.counters(&near)?));
        let before = self.counters(&far)?;
        let sent = host_runs(self.program, "many", pod, SINK, BYTES)?;
        figures.insert("host to pod by 8".into(), sent);
        figures.extend(counted("received by 8", before, self.counters(&far)?));
        let before = self.counters(&far)?;
        figures.insert(
            "host to pod".into(),
            host_runs(self.program, "send", pod, SINK, BYTES)?,
        );
        figures.extend(counted("received", before, self.counters(&far)?));
        let before = self.counters(&far)?;
        let asked = host_runs(self.program, "ask", pod, ECHO, REQUESTS)? / REQUESTS;
        figures.insert("host asks pod".into(), asked);
        figures.extend(counted("asked", before, self.counters(&far)?));
        if self.counts {
            let log = self.server.log_since(logged);
            let start = phase(&log, "host")? + phase(&log, "guest")? + phase(&log, "prepare")?;
            let network = phase(&log, "network")?;
            figures.extend([("start".into(), start), ("network".into(), network)]);
        }
        self.server.remove_pods()?;
        Ok(figures)
    }

    fn counters(&self, pod: &Pod<'_>) -> Result<Option<InterfaceCounters>> {
        if !self.counts {
            return Ok(None);
        }
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: pod.id.clone(),
            verbose: true,
        };
        let info = pod.cri.pod_sandbox_status(request)?.info;
        let interfaces = info
            .get("interfaces")
            .context("the status has no interfaces")?;
        let interfaces: Vec<InterfaceCounters> = serde_json::from_str(interfaces)?;
        Ok(Some(
            *interfaces.first().context("the pod has no interface")?,
        ))
    }
}

/// What an interface has counted between two looks.
fn counted(
    words: &str,
    before: Option<InterfaceCounters>,
    after: Option<InterfaceCounters>,
) -> Vec<(String, u64)> {
    let (Some(before), Some(after)) = (before, after) else {
        return Vec::new();
    };
    let mut all = Vec::new();
    for (queue, before, after) in [
        ("to guest", before.received, after.received),
        ("from guest", before.sent, after.sent),
    ] {
        for (figure, before, after) in [
            ("frames", before.frames, after.frames),
            ("bytes", before.bytes, after.bytes),
            ("lost", before.lost, after.lost),
            ("notifications", before.notifications, after.notifications),
            ("interrupts", before.interrupts, after.interrupts),
        ] {
            all.push((format!("{words}: {queue} {figure}"), after - before));
        }
    }
    all
}

/// The network of the server with CNI, of Debian's plugins.
fn bridge(node: &Node) -> serde_json::Value {
    serde_json::json!({"cniVersion": "1.0.0", "name": "clock", "plugins": [{
        "type": "bridge", "bridge": "cni-clock", "isGateway": true,
        "ipam": {"type": "host-local", "dataDir": node.scratch().join("addresses"),
            "ranges": [[{"subnet": "10.102.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]})
}

/// How long the plugin of that network takes alone to add a pod.
fn plugin(node: &Node) -> Result<u64> {
    let mut config = bridge(node);
    let mut plugin = config["plugins"][0].take();
    for (key, value) in [("cniVersion", "1.0.0"), ("name", "clock")] {
        plugin[key] = value.into();
    }
    let call = |verb: &str| -> Result<u64> {
        let mut command = Command::new("/usr/lib/cni/bridge");
        command
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", "clock")
            .env("CNI_NETNS", format!("/run/netns/{NAMESPACE}"))
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", "/usr/lib/cni")
            .stdin(Stdio::piped())
            .stdout(Stdio::null());
        let begun = Instant::now();
        let mut child = command.spawn().context("/usr/lib/cni/bridge")?;
        let mut input = child.stdin.take().context("no standard input")?;
        input.write_all(plugin.to_string().as_bytes())?;
        drop(input);
        let status = child.wait()?;
        ensure!(status.success(), "the bridge plugin's {verb}: {status}");
        Ok(u64::try_from(begun.elapsed().as_nanos())?)
    };
    ip(&["netns", "add", NAMESPACE])?;
    let added = call("ADD")?;
    call("DEL")?;
    ip(&["netns", "delete", NAMESPACE])?;
    Ok(added)
}

/// A VM on a tap, which the host asks and sends to.
fn vm(hypervisor: Hypervisor, directory: &Path) -> Result<BTreeMap<String, u64>> {
    let program = directory.join("net");
    ip(&["tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr"])?;
    ip(&["address", "add", &format!("{HOST}/24"), "dev", TAP])?;
    ip(&["link", "set", TAP, "up"])?;
    let setup = Setup {
        directory,
        kernel: "vmlinux",
        initramfs: "net-init",
        words: &format!("net={GUEST}"),
        tap: Some(TAP),
    };
    let mut machine = Machine::start(hypervisor, &setup)?;
    machine.ready()?;
    let guest = IpAddr::from(GUEST);
    for port in [ECHO, SINK] {
        connect(SocketAddr::new(guest, port))?;
    }
    let sent = host_runs(&program, "send", guest, SINK, BYTES)?;
    let asked = host_runs(&program, "ask", guest, ECHO, REQUESTS)? / REQUESTS;
    machine.kill();
    ip(&["link", "delete", TAP])?;
    Ok(BTreeMap::from([
        ("host to pod".into(), sent),
        ("host asks pod".into(), asked),
    ]))
}

fn ip(arguments: &[&str]) -> Result<()> {
    let status = Command::new("ip").args(arguments).status().context("ip")?;
    ensure!(status.success(), "ip {arguments:?}: {status}");
    Ok(())
}

fn host_runs(program: &Path, verb: &str, to: IpAddr, port: u16, count: u64) -> Result<u64> {
    let arguments = [verb, &to.to_string(), &port.to_string(), &count.to_string()];
    let mut command = Command::new(program);
    command.args(arguments).stderr(Stdio::inherit());
    let output = command.output()?;
    ensure!(output.status.success(), "{command:?}: {}", output.status);
    nanoseconds(&String::from_utf8(output.stdout)?)
}

fn nanoseconds(printed: &str) -> Result<u64> {
    let figure = printed.trim().parse();
    figure.with_context(|| format!("no figure: {printed:?}"))
}

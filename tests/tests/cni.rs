//! Pods in networks of CNI plugins: Debian's own, and one that writes down what it is told.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use bulkhead_cri_api::v1::{PodSandboxFilter, PodSandboxStatusRequest, PortMapping, Protocol};
use bulkhead_tests::cri::refused;
use bulkhead_tests::http::fetch;
use bulkhead_tests::leak::Machine;
use bulkhead_tests::node::BASE;
use bulkhead_tests::request::{Pod, shell, sleeper};
use bulkhead_tests::{Node, Server, suite};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tonic::Code;

suite! {
    bridge_gives_addresses_of_both_families,
    routes_and_neighbours_are_the_guests_in_every_detail,
    ptp_routes_by_its_gateway,
    macvlan_is_on_the_links_network,
    tuning_changes_the_hardware_address,
    ports_of_the_host_lead_to_the_pod,
    bandwidth_is_limited,
    what_no_plugin_takes_is_refused_by_name,
    network_may_come_later_and_change,
    promise_that_is_not_kept_fails_the_pod,
    plugin_that_fails_is_told_in_its_words,
    addresses_are_given_back_after_the_server_was_killed,
    network_is_checked_when_the_server_starts,
    kubelets_pod_cidr_makes_the_network_of_the_template,
    service_on_the_node_is_reached_from_its_pods,
    two_hundred_addresses_are_the_guests,
    network_may_change_while_pods_start,
    server_killed_while_a_plugin_ran_leaves_nothing,
    plugin_that_never_takes_back_keeps_no_pod,
}

/// A server whose pods are in the network of these plugins.
fn server(node: &Node, name: &str, plugins: Value) -> Result<Server> {
    let mut plan = node.plan(name);
    plan.cni = Some(json!({"cniVersion": "1.0.0", "name": name, "plugins": plugins}));
    plan.start()
}

/// A plugin for addresses that keeps its leases below `home`.
fn host_local(server: &Path, ranges: Value) -> Value {
    json!({"type": "host-local", "dataDir": server.join("leases"), "ranges": ranges,
        "routes": [{"dst": "0.0.0.0/0"}]})
}

fn home(node: &Node, name: &str) -> std::path::PathBuf {
    node.scratch().join(name)
}

/// A bridge of the test's own, with an address of it for the host.
fn bridge(node: &Node, name: &str, subnet: &str) -> Value {
    json!({"type": "bridge", "bridge": format!("cni-{name}"), "isGateway": true, "ipMasq": false,
        "ipam": host_local(&home(node, name), json!([[{"subnet": subnet}]]))})
}

/// Addresses that plugins hold for pods.
fn leases(node: &Node, name: &str) -> Vec<String> {
    let networks = fs::read_dir(home(node, name).join("leases"));
    let networks = networks.into_iter().flatten().flatten();
    let files = networks.flat_map(|network| fs::read_dir(network.path()));
    let names = files.flatten().flatten().map(|entry| entry.file_name());
    let names = names.filter_map(|name| name.into_string().ok());
    names
        .filter(|name| name.parse::<IpAddr>().is_ok())
        .collect()
}

/// Writes a plugin that is a shell script; `$config` is what it is told.
fn script(node: &Node, name: &str, plugin: &str, text: &str) -> Result<()> {
    let directory = home(node, name).join("cni-plugins");
    fs::create_dir_all(&directory)?;
    let path = directory.join(plugin);
    fs::write(&path, format!("#!/bin/sh\nconfig=$(cat)\n{text}\n"))?;
    Ok(fs::set_permissions(
        &path,
        fs::Permissions::from_mode(0o755),
    )?)
}

fn run(line: &str) -> Result<String> {
    let done = Command::new("sh").args(["-ec", line]).output()?;
    ensure!(done.status.success(), "{line}: {done:?}");
    Ok(String::from_utf8(done.stdout)?)
}

/// Ends a server that has no pods left, and removes the bridge, which plugins leave.
fn end(server: Server) -> Result<()> {
    server.stop()?;
    remove_bridges()
}

fn remove_bridges() -> Result<()> {
    run("cd /sys/class/net; for link in cni-*; do [ ! -e $link ] || ip link delete $link; done")
        .map(drop)
}

fn bridge_gives_addresses_of_both_families(node: &Node) -> Result<()> {
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

fn routes_and_neighbours_are_the_guests_in_every_detail(node: &Node) -> Result<()> {
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
    cri.remove_pod(&pod.id)?;
    end(server)
}

fn ptp_routes_by_its_gateway(node: &Node) -> Result<()> {
    let ipam = host_local(&home(node, "ptp"), json!([[{"subnet": "10.93.0.0/24"}]]));
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
    // The neighbours of a pod are behind the host, not beside it.
    let id = two.start(&sleeper("client", &image))?;
    run("sysctl -qw net.ipv4.ip_forward=1")?;
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

fn macvlan_is_on_the_links_network(node: &Node) -> Result<()> {
    run(
        "ip link add cni-lan type veth peer name cni-other; ip link set cni-lan up;
        ip link set cni-other up; ip addr add 10.94.0.1/24 dev cni-other",
    )?;
    let plugin = json!({"type": "macvlan", "master": "cni-lan", "mode": "bridge",
        "ipam": {"type": "static", "addresses": [{"address": "10.94.0.9/24"}]}});
    let server = server(node, "macvlan", json!([plugin]))?;
    let cri = &server.cri;
    let image = node.image_on(cri, BASE)?;
    let pod = Pod::run(cri, node.pod_config("macvlan")?)?;
    pod.start(&shell("web", &image, "exec httpd -f -p 80 -h /www"))?;
    let address = cri.pod_ip(&pod.id)?;
    ensure!(address.to_string() == "10.94.0.9", "{address}");
    fetch(SocketAddr::new(address, 80))?;
    cri.remove_pod(&pod.id)?;
    run("ip link delete cni-lan")?;
    end(server)
}

fn tuning_changes_the_hardware_address(node: &Node) -> Result<()> {
    let plugins = json!([bridge(node, "tuning", "10.95.0.0/24"),
        {"type": "tuning", "mac": "c2:b0:57:49:47:f1", "mtu": 1454}]);
    let server = server(node, "tuning", plugins)?;
    let cri = &server.cri;
    let image = node.image_on(cri, BASE)?;
    let pod = Pod::run(cri, node.pod_config("tuning")?)?;
    let id = pod.start(&shell("web", &image, "exec httpd -f -p 80 -h /www"))?;
    fetch(SocketAddr::new(cri.pod_ip(&pod.id)?, 80))?;
    let said = cri.shell(&id, "cd /sys/class/net/eth0; cat address mtu")?;
    ensure!(said == "c2:b0:57:49:47:f1\n1454", "{said}");
    cri.remove_pod(&pod.id)?;
    end(server)
}

fn ports_of_the_host_lead_to_the_pod(node: &Node) -> Result<()> {
    let plugins = json!([bridge(node, "ports", "10.96.0.0/24"),
        {"type": "portmap", "capabilities": {"portMappings": true}},
        {"type": "firewall"}, {"type": "loopback"}]);
    let server = server(node, "ports", plugins)?;
    let cri = &server.cri;
    let image = node.image_on(cri, BASE)?;
    let mut config = node.pod_config("ports")?;
    config.port_mappings = vec![PortMapping {
        protocol: Protocol::Tcp.into(),
        container_port: 80,
        host_port: 8099,
        host_ip: String::new(),
    }];
    let pod = Pod::run(cri, config)?;
    pod.start(&shell("web", &image, "exec httpd -f -p 80 -h /www"))?;
    for host in ["10.96.0.1:8099", "127.0.0.1:8099"] {
        let page = fetch(host.parse()?).with_context(|| host)?;
        ensure!(page.contains("hello"), "{host}: {page}");
    }
    cri.remove_pod(&pod.id)?;
    let left = run("iptables-save -t nat | grep -c 8099 || true")?;
    ensure!(left == "0\n", "{left} rules are left");
    end(server)
}

fn bandwidth_is_limited(node: &Node) -> Result<()> {
    let plugins = json!([bridge(node, "bandwidth", "10.97.0.0/24"),
        {"type": "bandwidth", "capabilities": {"bandwidth": true}}]);
    let server = server(node, "bandwidth", plugins)?;
    let cri = &server.cri;
    let mut config = node.pod_config("bandwidth")?;
    let annotation = "kubernetes.io/ingress-bandwidth".to_owned();
    config.annotations = [(annotation, "8M".to_owned())].into();
    let pod = Pod::run(cri, config.clone())?;
    let said = run("tc qdisc show")?;
    ensure!(said.contains("tbf") && said.contains("8Mbit"), "{said}");
    cri.remove_pod(&pod.id)?;
    end(server)
}

fn what_no_plugin_takes_is_refused_by_name(node: &Node) -> Result<()> {
    let plugins = json!([bridge(node, "plain", "10.98.0.0/24")]);
    let server = server(node, "plain", plugins)?;
    let mut config = node.pod_config("plain")?;
    config.port_mappings = vec![PortMapping {
        container_port: 80,
        host_port: 8099,
        ..PortMapping::default()
    }];
    let before = Machine::look_at(&server)?;
    let message = refused(server.cri.run_pod(&config), &[Code::InvalidArgument])?;
    ensure!(message.contains("capability portMappings"), "{message}");
    config.port_mappings = Vec::new();
    let annotation = "kubernetes.io/egress-bandwidth".to_owned();
    config.annotations = [(annotation, "much".to_owned())].into();
    let message = refused(server.cri.run_pod(&config), &[Code::InvalidArgument])?;
    ensure!(message.contains("egress-bandwidth"), "{message}");
    before.settles_again_at(&server)?;
    end(server)
}

fn network_may_come_later_and_change(node: &Node) -> Result<()> {
    let server = server(
        node,
        "later",
        json!([bridge(node, "later", "10.99.0.0/24")]),
    )?;
    let cri = &server.cri;
    let file = home(node, "later").join("cni/10-tests.conflist");
    let text = fs::read_to_string(&file)?;
    fs::remove_file(&file)?;
    let ready = cri.condition("NetworkReady")?;
    ensure!(
        !ready.status && ready.message.contains("no network"),
        "{ready:?}"
    );
    let answer = cri.run_pod(&node.pod_config("early")?);
    refused(answer, &[Code::FailedPrecondition])?;
    fs::write(&file, "{")?;
    let ready = cri.condition("NetworkReady")?;
    ensure!(ready.message.contains("10-tests.conflist"), "{ready:?}");
    fs::write(&file, &text)?;
    ensure!(
        cri.condition("NetworkReady")?.status,
        "the network is there"
    );

    let first = Pod::run(cri, node.pod_config("first")?)?;
    fs::write(
        &file,
        text.replace("10.99.", "10.100.")
            .replace("cni-later", "cni-changed"),
    )?;
    let second = Pod::run(cri, node.pod_config("second")?)?;
    let address = cri.pod_ip(&second.id)?.to_string();
    ensure!(address.starts_with("10.100."), "{address}");
    // Each leaves the network that it is in.
    for pod in [first, second] {
        cri.remove_pod(&pod.id)?;
    }
    ensure!(
        leases(node, "later").is_empty(),
        "{:?}",
        leases(node, "later")
    );
    end(server)
}

fn promise_that_is_not_kept_fails_the_pod(node: &Node) -> Result<()> {
    let text = r#"[ "$CNI_COMMAND" = ADD ] || exit 0
        nsenter --net="$CNI_NETNS" ip link add eth0 type dummy >&2
        echo '{"cniVersion": "1.0.0", "ips": [{"address": "10.5.5.5/24"}, {"address": "fd05::5/64"}]}'"#;
    script(node, "promise", "promise", text)?;
    let server = server(node, "promise", json!([{"type": "promise"}]))?;
    let before = Machine::look_at(&server)?;
    let answer = server.cri.run_pod(&node.pod_config("promise")?);
    let message = refused(answer, &[Code::Internal])?;
    ensure!(message.contains("10.5.5.5/24, fd05::5/64"), "{message}");
    before.settles_again_at(&server)?;
    end(server)
}

fn plugin_that_fails_is_told_in_its_words(node: &Node) -> Result<()> {
    let plugins = json!([bridge(node, "fails", "10.89.0.0/24"), {"type": "fails"}]);
    script(node, "fails", "fails", "exit 0")?;
    let server = server(node, "fails", plugins)?;
    let before = Machine::look_at(&server)?;
    for (text, words) in [
        (
            r#"echo '{"code": 11, "msg": "try later"}'; exit 1"#,
            "try later",
        ),
        ("echo no uplink >&2; exit 1", "no uplink"),
        ("echo garbage", "garbage"),
        ("kill -9 $$", "signal: 9"),
        ("echo '{\"cniVersion\": \"1.0.0\"}'", "no address"),
    ] {
        let text = format!("[ \"$CNI_COMMAND\" = ADD ] || exit 0\n{text}");
        script(node, "fails", "fails", &text)?;
        let answer = server.cri.run_pod(&node.pod_config("fails")?);
        let message = refused(answer, &[Code::Internal])?;
        ensure!(
            message.contains(words) && message.contains("fails"),
            "{message}"
        );
        ensure!(
            leases(node, "fails").is_empty(),
            "{:?}",
            leases(node, "fails")
        );
    }
    remove_bridges()?;
    before.settles_again_at(&server)?;
    end(server)
}

fn addresses_are_given_back_after_the_server_was_killed(node: &Node) -> Result<()> {
    let first = server(
        node,
        "killed",
        json!([bridge(node, "killed", "10.90.0.0/24")]),
    )?;
    let pod = Pod::run(&first.cri, node.pod_config("killed")?)?.id;
    ensure!(leases(node, "killed").len() == 1, "a lease");
    first.kill()?;
    let mut plan = node.plan("killed");
    plan.cni = Some(json!({"cniVersion": "1.0.0", "name": "other", "plugins": [
        {"type": "ptp", "ipam": {"type": "static"}}]}));
    let second = plan.start()?;
    second.cri.remove_pod(&pod)?;
    ensure!(
        leases(node, "killed").is_empty(),
        "{:?}",
        leases(node, "killed")
    );
    end(second)
}

/// What `verbose` says of a pod.
fn info(server: &Server, pod: &str) -> Result<Value> {
    let reply = server.cri.pod_sandbox_status(PodSandboxStatusRequest {
        pod_sandbox_id: pod.to_owned(),
        verbose: true,
    })?;
    Ok(serde_json::from_str(
        reply.info.get("info").context("no info")?,
    )?)
}

fn network_is_checked_when_the_server_starts(node: &Node) -> Result<()> {
    let plugins = json!([bridge(node, "check", "10.87.0.0/24"),
        {"type": "portmap", "capabilities": {"portMappings": true}},
        {"type": "firewall"}, {"type": "tuning", "mtu": 1400}]);
    let first = server(node, "check", plugins.clone())?;
    // Without ports of the host: of those, portmap 1.1.1 looks for the IPv4 rules in IPv6's tables.
    let pod = Pod::run(&first.cri, node.pod_config("check")?)?.id;
    let told = info(&first, &pod)?;
    let address = first.cri.pod_ip(&pod)?;
    let result = told["cni"]["result"]["ips"][0]["address"].as_str();
    ensure!(result == Some(&format!("{address}/24")), "{told}");
    ensure!(told["cni"]["network"] == "check", "{told}");
    let netns = told["netns"].as_str().context("no netns")?.to_owned();
    first.kill()?;

    let second = server(node, "check", plugins.clone())?;
    let told = info(&second, &pod)?;
    ensure!(told["cni"]["broken"].is_null(), "{}", told["cni"]["broken"]);
    second.kill()?;

    run(&format!("nsenter --net={netns} ip addr flush dev eth0"))?;
    let third = server(node, "check", plugins)?;
    let told = info(&third, &pod)?;
    let broken = told["cni"]["broken"].as_str().unwrap_or_default();
    ensure!(broken.contains("bridge failed at CHECK"), "{told}");
    ensure!(third.log_tail().contains(broken), "{}", third.log_tail());
    third.cri.remove_pod(&pod)?;
    end(third)
}

fn kubelets_pod_cidr_makes_the_network_of_the_template(node: &Node) -> Result<()> {
    let template = node.scratch().join("template.conflist");
    let mut ipam = host_local(&home(node, "told"), json!("$podCIDRRanges"));
    ipam["routes"] = json!("$routes");
    let list = json!({"cniVersion": "1.0.0", "name": "told", "plugins": [
        {"type": "bridge", "bridge": "cni-told", "isGateway": true, "ipam": ipam}]});
    fs::write(&template, list.to_string())?;
    let mut plan = node.plan("told");
    plan.network = format!("cni_template = \"{}\"", template.display());
    let server = plan.start()?;
    let cri = &server.cri;
    let ready = cri.condition("NetworkReady")?;
    ensure!(!ready.status, "ready before anything was told");
    cri.tell_pod_cidr("10.86.0.0/24,fd86::/64")?;
    ensure!(
        cri.condition("NetworkReady")?.status,
        "the network is there"
    );
    let pod = Pod::run(cri, node.pod_config("told")?)?;
    let network = cri.pod(&pod.id)?.network.context("no network")?;
    ensure!(network.ip.starts_with("10.86.0."), "{network:?}");
    ensure!(
        network.additional_ips[0].ip.starts_with("fd86::"),
        "{network:?}"
    );
    // What is there is kept.
    let written = fs::read(home(node, "told").join("cni/10-bulkhead.conflist"))?;
    cri.tell_pod_cidr("10.85.0.0/24")?;
    let kept = fs::read(home(node, "told").join("cni/10-bulkhead.conflist"))?;
    ensure!(written == kept, "the network was written anew");
    cri.remove_pod(&pod.id)?;
    end(server)
}

fn service_on_the_node_is_reached_from_its_pods(node: &Node) -> Result<()> {
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

fn two_hundred_addresses_are_the_guests(node: &Node) -> Result<()> {
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

fn network_may_change_while_pods_start(node: &Node) -> Result<()> {
    let name = "moving";
    let server = server(node, name, json!([bridge(node, name, "10.82.0.0/24")]))?;
    let cri = &server.cri;
    let file = home(node, name).join("cni/10-tests.conflist");
    let one = fs::read_to_string(&file)?;
    let two = one
        .replace("10.82.", "10.81.")
        .replace("cni-moving", "cni-moved");
    let ended = std::sync::atomic::AtomicBool::new(false);
    let order = std::sync::atomic::Ordering::Relaxed;
    let pods = std::thread::scope(|scope| -> Result<Vec<String>> {
        let editor = scope.spawn(|| -> Result<()> {
            while !ended.load(order) {
                for text in [&two, &one] {
                    let fresh = file.with_extension("new");
                    fs::write(&fresh, text)?;
                    fs::rename(&fresh, &file)?;
                    std::thread::sleep(std::time::Duration::from_millis(50));
                }
            }
            Ok(())
        });
        let run = |name| Ok(Pod::run(cri, node.pod_config(name)?)?.id);
        let pods = ["one", "two", "three"].into_iter().map(run).collect();
        ended.store(true, order);
        editor
            .join()
            .map_err(|_| anyhow::anyhow!("the editor panicked"))??;
        pods
    })?;
    for pod in &pods {
        let address = cri.pod_ip(pod)?.to_string();
        let known = address.starts_with("10.81.0.") || address.starts_with("10.82.0.");
        ensure!(known, "{address}");
        cri.remove_pod(pod)?;
    }
    ensure!(leases(node, name).is_empty(), "{:?}", leases(node, name));
    end(server)
}

fn server_killed_while_a_plugin_ran_leaves_nothing(node: &Node) -> Result<()> {
    let name = "halfway";
    let begun = home(node, name).join("begun");
    let text = format!(
        "[ \"$CNI_COMMAND\" = ADD ] || exit 0\ntouch {}\nexec sleep 31",
        begun.display()
    );
    script(node, name, "halfway", &text)?;
    let plugins = json!([bridge(node, name, "10.80.0.0/24"), {"type": "halfway"}]);
    let first = server(node, name, plugins.clone())?;
    let config = node.pod_config(name)?;
    std::thread::scope(|scope| -> Result<()> {
        let caller = scope.spawn(|| first.cri.run_pod(&config));
        while !begun.exists() {
            ensure!(!caller.is_finished(), "the pod came to an end");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        ensure!(leases(node, name).len() == 1, "no lease yet");
        kill_process(
            Pid::from_raw(first.pid().cast_signed()).context("no pid")?,
            Signal::KILL,
        )?;
        Ok(())
    })?;
    first.kill()?;
    let second = server(node, name, plugins)?;
    ensure!(leases(node, name).is_empty(), "{:?}", leases(node, name));
    let pods = second.cri.pod_ids(PodSandboxFilter::default())?;
    ensure!(pods.is_empty(), "{pods:?}");
    remove_bridges()?;
    // The plugin of the first server may run on for a while.
    run("while pgrep -f '[s]leep 31' > /dev/null; do sleep 1; done")?;
    end(second)
}

fn plugin_that_never_takes_back_keeps_no_pod(node: &Node) -> Result<()> {
    let name = "never";
    let text = r#"[ "$CNI_COMMAND" = DEL ] && { echo '{"code": 11, "msg": "not today"}'; exit 1; }
        echo "$config" | sed 's/.*"prevResult":\(.*\),"type":"never"}$/\1/'"#;
    script(node, name, name, text)?;
    let server = server(
        node,
        name,
        json!([bridge(node, name, "10.79.0.0/24"), {"type": name}]),
    )?;
    let cri = &server.cri;
    let pod = Pod::run(cri, node.pod_config(name)?)?.id;
    for _ in 0..2 {
        let message = refused(cri.stop_pod(&pod), &[Code::Internal])?;
        ensure!(message.contains("not today"), "{message}");
        // The other plugin has taken back what is its own.
        ensure!(leases(node, name).is_empty(), "{:?}", leases(node, name));
    }
    cri.stop_pod(&pod)?;
    let log = server.log_tail();
    ensure!(log.contains("left something behind"), "{log}");
    cri.remove_pod(&pod)?;
    end(server)
}

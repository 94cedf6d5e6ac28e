//! The configuration that networks are made by, and what is looked at later.

use std::fs;

use anyhow::{Context, Result, ensure};
use bulkhead_cri_api::v1::PodSandboxStatusRequest;
use bulkhead_tests::cri::refused;
use bulkhead_tests::request::Pod;
use bulkhead_tests::{Node, Server};
use serde_json::{Value, json};
use tonic::Code;

use crate::{bridge, end, home, host_local, leases, run, server};

pub fn network_may_come_later_and_change(node: &Node) -> Result<()> {
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

pub fn network_is_checked_when_the_server_starts(node: &Node) -> Result<()> {
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

pub fn kubelets_pod_cidr_makes_the_network_of_the_template(node: &Node) -> Result<()> {
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

pub fn network_may_change_while_pods_start(node: &Node) -> Result<()> {
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

pub fn kubelets_pod_cidr_is_told_to_plugins_that_ask(node: &Node) -> Result<()> {
    let name = "asked";
    let mut network = bridge(node, name, "unused");
    network["ipam"] = host_local(&home(node, name), json!([]));
    network["capabilities"] = json!({"ipRanges": true});
    let first = server(node, name, json!([network.clone()]))?;
    first.cri.tell_pod_cidr("10.77.0.0/24,fd77::/64")?;
    // The kubelet tells it once: the next server knows it still.
    first.stop()?;
    let server = server(node, name, json!([network]))?;
    let cri = &server.cri;
    let pod = Pod::run(cri, node.pod_config(name)?)?;
    let network = cri.pod(&pod.id)?.network.context("no network")?;
    ensure!(
        network.ip.starts_with("10.77.0.") && network.additional_ips[0].ip.starts_with("fd77::"),
        "{network:?}"
    );
    cri.remove_pod(&pod.id)?;
    end(server)
}

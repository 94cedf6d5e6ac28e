//! Pods in networks of CNI plugins: Debian's own, and one that writes down what it is told.

mod configuration;
mod faults;
mod plugins;

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use bulkhead_tests::{Node, Server, suite};
use serde_json::{Value, json};

use configuration::*;
use faults::*;
use plugins::*;

suite! {
    bridge_gives_addresses_of_both_families,
    routes_and_neighbours_are_the_guests_in_every_detail,
    ptp_routes_by_its_gateway,
    macvlan_is_on_the_links_network,
    tuning_changes_hardware_address_and_sysctls,
    ports_of_the_host_lead_to_the_pod,
    bandwidth_is_limited,
    what_no_plugin_takes_is_told_by_the_log,
    network_may_come_later_and_change,
    promise_that_is_not_kept_fails_the_pod,
    plugin_that_fails_is_told_in_its_words,
    addresses_are_given_back_after_the_server_was_killed,
    network_is_checked_when_the_server_starts,
    kubelets_pod_cidr_makes_the_network_of_the_template,
    kubelets_pod_cidr_is_told_to_plugins_that_ask,
    service_on_the_node_is_reached_from_its_pods,
    two_hundred_addresses_are_the_guests,
    network_may_change_while_pods_start,
    server_killed_while_a_plugin_ran_leaves_nothing,
    plugin_that_never_takes_back_keeps_no_pod,
    plugin_that_hangs_is_ended_and_its_pod_fails,
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

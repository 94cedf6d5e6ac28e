//! Rules about the whole workspace, held by tests.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::artefacts::cargo;
use crate::process;

/// Which crate of the workspace may use which.
const MAY_USE: &[(&str, &[&str])] = &[
    ("bulkhead-vmm-api", &[]),
    ("bulkhead-agent-api", &[]),
    ("bulkhead-cri-api", &[]),
    ("bulkhead-erofs", &[]),
    ("bulkhead-vmm", &["bulkhead-vmm-api"]),
    ("bulkhead-agent", &["bulkhead-agent-api"]),
    (
        "bulkhead",
        &[
            "bulkhead-vmm-api",
            "bulkhead-agent-api",
            "bulkhead-cri-api",
            "bulkhead-erofs",
        ],
    ),
    (
        "bulkhead-tests",
        &["bulkhead-agent-api", "bulkhead-cri-api", "bulkhead-vmm-api"],
    ),
    ("xtask", &[]),
];

fn metadata() -> Value {
    let bytes = process::capture(cargo().args([
        "metadata",
        "--format-version=1",
        "--offline",
        // What other systems need was never downloaded.
        "--filter-platform=x86_64-unknown-linux-gnu",
    ]));
    serde_json::from_slice(&bytes.unwrap()).unwrap()
}

/// The packages of the workspace by name.
fn members(metadata: &Value) -> BTreeMap<&str, &Value> {
    let ids: BTreeSet<&str> = metadata["workspace_members"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(Value::as_str)
        .collect();
    metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|package| ids.contains(package["id"].as_str().unwrap()))
        .map(|package| (package["name"].as_str().unwrap(), package))
        .collect()
}

#[test]
fn crates_use_each_other_only_where_allowed() {
    let metadata = metadata();
    let members = members(&metadata);
    let rules: BTreeMap<&str, &[&str]> = MAY_USE.iter().copied().collect();
    for (name, package) in &members {
        let allowed = rules
            .get(name)
            .unwrap_or_else(|| panic!("no rule for the crate {name}"));
        for dependency in package["dependencies"].as_array().unwrap() {
            let used = dependency["name"].as_str().unwrap();
            if members.contains_key(used) {
                assert!(allowed.contains(&used), "{name} must not use {used}");
            }
        }
    }
}

/// Names of all packages that are compiled into `root`, of any depth, without tests and build scripts.
fn tree<'a>(metadata: &'a Value, root: &str) -> BTreeSet<&'a str> {
    let nodes: BTreeMap<&str, &Value> = metadata["resolve"]["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|node| (node["id"].as_str().unwrap(), node))
        .collect();
    let names: BTreeMap<&str, &str> = metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|package| {
            (
                package["id"].as_str().unwrap(),
                package["name"].as_str().unwrap(),
            )
        })
        .collect();
    let mut todo = vec![members(metadata)[root]["id"].as_str().unwrap()];
    let mut seen = BTreeSet::new();
    while let Some(id) = todo.pop() {
        if !seen.insert(id) {
            continue;
        }
        for dependency in nodes[id]["deps"].as_array().unwrap() {
            let kinds = dependency["dep_kinds"].as_array().unwrap();
            if kinds.iter().any(|kind| kind["kind"].is_null()) {
                todo.push(dependency["pkg"].as_str().unwrap());
            }
        }
    }
    seen.into_iter().map(|id| names[id]).collect()
}

#[test]
fn the_vmm_has_no_async_runtime() {
    let metadata = metadata();
    let tree = tree(&metadata, "bulkhead-vmm");
    assert!(
        tree.contains("kvm-ioctls"),
        "the tree was not read: {tree:?}"
    );
    for runtime in ["tokio", "async-std", "smol", "tonic", "hyper"] {
        assert!(!tree.contains(runtime), "bulkhead-vmm depends on {runtime}");
    }
}

#[test]
fn the_agent_knows_no_kvm_and_no_images() {
    let metadata = metadata();
    let tree = tree(&metadata, "bulkhead-agent");
    for stranger in ["kvm-ioctls", "reqwest", "rtnetlink"] {
        assert!(
            !tree.contains(stranger),
            "bulkhead-agent depends on {stranger}"
        );
    }
}

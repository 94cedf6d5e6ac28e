//! From pods and containers to the CRI's messages, and the CRI's filters.

use std::collections::HashMap;

use bulkhead_agent_api::v1::UsageResponse;
use bulkhead_cri_api::v1 as cri;
use bulkhead_vmm_api::InterfaceCounters;

use crate::sandbox::{Container, ContainerState, PodState, View};

/// A pod in a list.
pub fn pod(view: &View) -> cri::PodSandbox {
    let record = view.record();
    cri::PodSandbox {
        id: record.id.clone(),
        metadata: record.config.metadata.clone(),
        state: pod_state(view).into(),
        created_at: record.created_at,
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
        runtime_handler: record.runtime_handler.clone(),
    }
}

/// A pod's status.
pub fn pod_status(view: &View) -> cri::PodSandboxStatus {
    let record = view.record();
    let linux = record.config.linux.clone().unwrap_or_default();
    let options = linux
        .security_context
        .and_then(|context| context.namespace_options);
    let mut rest = record.state.addresses().into_iter();
    let network = cri::PodSandboxNetworkStatus {
        ip: rest.next().unwrap_or_default(),
        additional_ips: rest.map(|ip| cri::PodIp { ip }).collect(),
    };
    cri::PodSandboxStatus {
        id: record.id.clone(),
        metadata: record.config.metadata.clone(),
        state: pod_state(view).into(),
        created_at: record.created_at,
        network: Some(network),
        linux: Some(cri::LinuxPodSandboxStatus {
            namespaces: Some(cri::Namespace {
                options: Some(options.unwrap_or_default()),
            }),
        }),
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
        runtime_handler: record.runtime_handler.clone(),
    }
}

/// What `verbose` adds to a pod's status: JSON in a map. `info` has the pod's network namespace as
/// `netns`, and `cni`: the CNI network with the result of its plugins, null on the bridge.
/// `interfaces` has what the VM's network interfaces have moved.
pub fn pod_info(
    view: &View,
    cni: serde_json::Value,
    agent: Option<UsageResponse>,
    interfaces: &[InterfaceCounters],
) -> HashMap<String, String> {
    let record = view.record();
    let netns = match &record.state {
        PodState::Ready { network, .. } => Some(&network.netns),
        PodState::Starting | PodState::NotReady { .. } => None,
    };
    let state = match &record.state {
        PodState::Starting => serde_json::json!("starting"),
        PodState::Ready { vmm, network, .. } => serde_json::json!({
            "vmm": vmm,
            "network": network,
        }),
        PodState::NotReady { reason } => serde_json::json!({ "reason": reason }),
    };
    let info = serde_json::json!({
        "state": state,
        "netns": netns,
        "cni": cni,
        "hostname": record.hostname,
        "disks": record.disks,
        "start": view.phases(),
    });
    let interfaces = serde_json::json!(interfaces);
    let mut all = HashMap::from([
        ("info".to_owned(), info.to_string()),
        ("interfaces".to_owned(), interfaces.to_string()),
    ]);
    if let Some(usage) = agent {
        let usage = serde_json::json!({
            "descriptors": usage.descriptors,
            "memoryBytes": usage.memory_bytes,
            "mounts": usage.mounts,
            "cgroups": usage.cgroups,
            "processes": usage.processes,
            "zombies": usage.zombies,
        });
        all.insert("agent".to_owned(), usage.to_string());
    }
    all
}

fn pod_state(view: &View) -> cri::PodSandboxState {
    match view.record().state {
        PodState::Ready { .. } => cri::PodSandboxState::SandboxReady,
        PodState::Starting | PodState::NotReady { .. } => cri::PodSandboxState::SandboxNotready,
    }
}

/// A container in a list.
pub fn container(view: &View, container: &Container) -> cri::Container {
    cri::Container {
        id: container.id.clone(),
        pod_sandbox_id: view.record().id.clone(),
        metadata: container.config.metadata.clone(),
        image: container.config.image.clone(),
        image_ref: container.image_ref.clone(),
        state: container_state(container).into(),
        created_at: container.created_at,
        labels: container.config.labels.clone(),
        annotations: container.config.annotations.clone(),
        image_id: container.image_id.clone(),
    }
}

/// A container's status.
pub fn container_status(container: &Container) -> cri::ContainerStatus {
    let config = &container.config;
    let linux = config.linux.clone().unwrap_or_default();
    let mut status = cri::ContainerStatus {
        id: container.id.clone(),
        metadata: config.metadata.clone(),
        state: container_state(container).into(),
        created_at: container.created_at,
        image: config.image.clone(),
        image_ref: container.image_ref.clone(),
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
        mounts: config.mounts.clone(),
        log_path: container
            .log_path
            .as_ref()
            .map(|path| path.to_string_lossy().into_owned())
            .unwrap_or_default(),
        resources: linux.resources.map(|resources| cri::ContainerResources {
            linux: Some(resources),
            windows: None,
        }),
        image_id: container.image_id.clone(),
        user: container.user.as_ref().map(|user| cri::ContainerUser {
            linux: Some(cri::LinuxContainerUser {
                uid: user.uid.into(),
                gid: user.gid.into(),
                supplemental_groups: user.groups.iter().map(|&group| group.into()).collect(),
            }),
        }),
        stop_signal: config.stop_signal,
        ..Default::default()
    };
    match &container.state {
        ContainerState::Creating | ContainerState::Created => {}
        ContainerState::Running { started_at } => status.started_at = *started_at,
        ContainerState::Exited(exit) => {
            status.started_at = exit.started_at;
            status.finished_at = exit.finished_at.max(container.created_at);
            status.exit_code = exit.code;
            status.reason = exit.reason.clone();
            status.message = exit.message.clone();
        }
    }
    status
}

/// What `verbose` adds to a container's status: JSON in a map.
pub fn container_info(view: &View, container: &Container) -> HashMap<String, String> {
    let info = serde_json::json!({
        "sandboxID": view.record().id,
        "process": container.process,
        "stopSignal": container.stop_signal,
    });
    HashMap::from([("info".to_owned(), info.to_string())])
}

fn container_state(container: &Container) -> cri::ContainerState {
    match container.state {
        ContainerState::Creating | ContainerState::Created => cri::ContainerState::ContainerCreated,
        ContainerState::Running { .. } => cri::ContainerState::ContainerRunning,
        ContainerState::Exited(_) => cri::ContainerState::ContainerExited,
    }
}

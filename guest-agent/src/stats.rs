//! What the containers and the network have used so far, in one answer.

use std::path::Path;

use bulkhead_agent_api::read_group;
use bulkhead_agent_api::v1::{ContainerStats, LayerStats, StatsResponse};

use crate::container::{Cgroup, State, cgroup, layer, off};
use crate::sandbox::Sandbox;

/// The figures of every container that has not exited, and of the pod's interfaces.
pub async fn look(sandbox: &Sandbox) -> StatsResponse {
    let mut living = Vec::new();
    for (id, container) in sandbox.containers() {
        // One removed meanwhile has none.
        if let Ok((State::Created | State::Running, _)) = container.state().await {
            living.push(id);
        }
    }
    let interfaces = sandbox.interfaces().await;
    let read = move || {
        let containers = living.into_iter().map(container).collect();
        (containers, read_group(Path::new(cgroup::POD)).tasks)
    };
    let (containers, tasks) = off(read).await.unwrap_or_default();
    StatsResponse {
        containers,
        interfaces,
        tasks: tasks.unwrap_or(0),
    }
}

fn container(id: String) -> ContainerStats {
    let group = Cgroup::of(&id);
    let layer = layer::usage(&layer::place(&id));
    ContainerStats {
        group: Some(read_group(Path::new(&group.path()))),
        processes: group.process_count() as u64,
        layer: layer.map(|(bytes, inodes)| LayerStats { bytes, inodes }),
        container_id: id,
    }
}

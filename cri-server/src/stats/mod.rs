//! What pods and containers use: a pod's figures from its cgroup on the host, a container's from
//! its cgroup in the guest, and the two are never mixed.

mod message;
mod metric;
mod rate;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use bulkhead_agent_api::read_group;
use bulkhead_agent_api::v1::{ContainerStats, GroupStats, InterfaceStats};
use bulkhead_cri_api::v1 as cri;
use tokio::task::JoinSet;

use crate::sandbox::{
    Container, ContainerState, Host, Pod, PodState, SandboxError, Sandboxes, View, now,
};
use rate::Rates;

pub use metric::descriptors;

/// The figures of a server's pods.
#[derive(Clone)]
pub struct Stats {
    sandboxes: Sandboxes,
    rates: Arc<Rates>,
}

/// A pod's figures at one moment.
struct Figures {
    /// Nanoseconds since 1970.
    at: i64,
    view: Arc<View>,
    /// Its cgroup on the host.
    group: GroupStats,
    /// Its running containers, by id, as its guest tells.
    containers: BTreeMap<String, ContainerStats>,
    /// The interfaces it was given, its main one first.
    interfaces: Vec<InterfaceStats>,
    /// Processes and threads of all containers.
    tasks: u64,
    /// What containers write is below this directory.
    writable: PathBuf,
}

impl Stats {
    /// Of these pods.
    pub fn new(sandboxes: Sandboxes) -> Self {
        Self {
            sandboxes,
            rates: Arc::default(),
        }
    }

    /// One container's figures; of one that does not run only who it is.
    pub async fn container(
        &self,
        pod: &Pod,
        id: &str,
    ) -> Result<cri::ContainerStats, SandboxError> {
        let view = pod.view();
        let known = view.record().containers.get(id);
        let container = known.ok_or_else(|| SandboxError::no_container(id))?;
        if !matches!(container.state, ContainerState::Running { .. }) {
            return Ok(message::absent(container));
        }
        self.rates.keep(&self.sandboxes);
        let figures = look(self.sandboxes.host(), pod).await?;
        let found = figures.running().find(|(running, _)| running.id == id);
        Ok(match found {
            Some((container, stats)) => message::container(&figures, container, stats, &self.rates),
            None => message::absent(container),
        })
    }

    /// The figures of the wanted containers that run.
    pub async fn containers(
        &self,
        wanted: impl Fn(&View, &Container) -> bool,
    ) -> Vec<cri::ContainerStats> {
        let any = |view: &View| {
            let mut containers = view.record().containers.values();
            containers.any(|container| wanted(view, container))
        };
        let mut all = Vec::new();
        for figures in self.look(any).await {
            let running = figures.running();
            let wanted = running.filter(|(container, _)| wanted(&figures.view, container));
            all.extend(wanted.map(|(container, stats)| {
                message::container(&figures, container, stats, &self.rates)
            }));
        }
        all
    }

    /// One pod's figures.
    pub async fn pod(&self, pod: &Pod) -> Result<cri::PodSandboxStats, SandboxError> {
        self.rates.keep(&self.sandboxes);
        let figures = look(self.sandboxes.host(), pod).await?;
        Ok(message::pod(&figures, &self.rates))
    }

    /// The figures of the wanted pods that are ready.
    pub async fn pods(&self, wanted: impl Fn(&View) -> bool) -> Vec<cri::PodSandboxStats> {
        let pods = self.look(wanted).await;
        let pods = pods.iter();
        pods.map(|figures| message::pod(figures, &self.rates))
            .collect()
    }

    /// All that [`descriptors`] tells of, of ready pods.
    pub async fn metrics(&self) -> Vec<cri::PodSandboxMetrics> {
        let pods = self.look(|_| true).await;
        pods.iter().map(metric::pod).collect()
    }

    /// Asks the wanted pods that are ready, all at once. One that does not answer is left out.
    async fn look(&self, wanted: impl Fn(&View) -> bool) -> Vec<Figures> {
        self.rates.keep(&self.sandboxes);
        let mut looks = JoinSet::new();
        for pod in self.sandboxes.pods() {
            let view = pod.view();
            if matches!(view.record().state, PodState::Ready { .. }) && wanted(&view) {
                let host = Arc::clone(self.sandboxes.host());
                looks.spawn(async move { (pod.id().to_owned(), look(&host, &pod).await) });
            }
        }
        let mut all = BTreeMap::new();
        while let Some(looked) = looks.join_next().await {
            match looked {
                Ok((id, Ok(figures))) => drop(all.insert(id, figures)),
                Ok((sandbox, Err(error))) => {
                    tracing::warn!(sandbox, %error, "a pod's figures are left out");
                }
                // Only a panic or the server's end.
                Err(error) => tracing::warn!(%error, "a pod's figures are left out"),
            }
        }
        all.into_values().collect()
    }
}

impl Figures {
    /// The containers that run, with their figures. What the guest says of others does not count.
    fn running(&self) -> impl Iterator<Item = (&Container, &ContainerStats)> {
        let known = self.view.record().containers.values();
        let running =
            known.filter(|container| matches!(container.state, ContainerState::Running { .. }));
        running.filter_map(|container| Some((container, self.containers.get(&container.id)?)))
    }
}

async fn look(host: &Arc<Host>, pod: &Pod) -> Result<Figures, SandboxError> {
    let guest = pod.stats().await?;
    let view = pod.view();
    let cgroup = host.cgroup(pod.id(), &view.record().config)?;
    let group = tokio::task::spawn_blocking(move || read_group(&cgroup.path()));
    let given = match &view.record().state {
        PodState::Ready { network, .. } => network.interfaces.as_slice(),
        _ => &[],
    };
    let told = |name: &str| guest.interfaces.iter().find(|told| told.name == name);
    let interfaces = given.iter().filter_map(|given| told(&given.name).cloned());
    Ok(Figures {
        at: now(),
        interfaces: interfaces.collect(),
        containers: guest
            .containers
            .into_iter()
            .map(|container| (container.container_id.clone(), container))
            .collect(),
        tasks: guest.tasks,
        writable: host.config.root.join("sandboxes"),
        group: group.await.unwrap_or_default(),
        view,
    })
}

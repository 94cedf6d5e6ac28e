//! The server's own figures, for Prometheus: how long calls and the parts of a pod's start take, how
//! many pods there are, and what they and the images take of the host. Served only where the
//! configuration names an address.

mod call;
mod http;

use std::net::SocketAddr;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use serde::Deserialize;

use crate::sandbox::{ContainerState, Phases, PodState, Sandboxes};

pub use call::Calls;
pub use http::{Endpoint, ListenError};

/// Where the figures are served.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Address and port of `/metrics`; nowhere unless given. Anybody who reaches it may read it.
    pub address: Option<SocketAddr>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Call {
    method: String,
    code: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Phase {
    phase: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct State {
    state: &'static str,
}

/// The figures of one server.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    calls: Family<Call, Histogram>,
    phases: Family<Phase, Histogram>,
    pods: Family<State, Gauge>,
    containers: Family<State, Gauge>,
    memory: Gauge,
    images: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        // From 1 ms to 65 s.
        let seconds = || Histogram::new(exponential_buckets(0.001, 2.0, 17));
        let mut metrics = Self {
            registry: Registry::with_prefix("bulkhead"),
            calls: Family::new_with_constructor(seconds),
            phases: Family::new_with_constructor(seconds),
            pods: Family::default(),
            containers: Family::default(),
            memory: Gauge::default(),
            images: Gauge::default(),
        };
        let registry = &mut metrics.registry;
        let help = "How long calls of the CRI took, in seconds; of streams until they began";
        registry.register("call_seconds", help, metrics.calls.clone());
        let help = "How long the parts of pods' starts took, in seconds";
        registry.register("pod_start_seconds", help, metrics.phases.clone());
        registry.register("pods", "Pods by state", metrics.pods.clone());
        let help = "Containers by state";
        registry.register("containers", help, metrics.containers.clone());
        let help = "Memory of the ready pods' VMs and VMMs, by their cgroups, in bytes";
        registry.register("pods_memory_bytes", help, metrics.memory.clone());
        let help = "What the images take of the disk, in bytes";
        registry.register("images_bytes", help, metrics.images.clone());
        metrics
    }
}

impl Metrics {
    /// A call has been answered with this gRPC code.
    fn answered(&self, method: &str, code: &str, time: Duration) {
        let call = Call {
            method: method.to_owned(),
            code: code.to_owned(),
        };
        self.calls.get_or_create(&call).observe(time.as_secs_f64());
    }

    /// A pod has started.
    pub fn started(&self, phases: &Phases) {
        for (phase, microseconds) in phases.parts() {
            let phase = self.phases.get_or_create(&Phase { phase });
            phase.observe(Duration::from_micros(microseconds).as_secs_f64());
        }
    }

    /// All figures as they are now, in Prometheus' text format.
    pub async fn render(&self, sandboxes: &Sandboxes) -> String {
        let views = sandboxes.list();
        for state in ["starting", "ready", "not_ready"] {
            let states = views.iter().map(|view| pod_state(&view.record().state));
            self.pods
                .get_or_create(&State { state })
                .set(count(states, state));
        }
        let containers = views
            .iter()
            .flat_map(|view| view.record().containers.values());
        let containers: Vec<_> = containers.map(|one| container_state(&one.state)).collect();
        for state in ["created", "running", "exited"] {
            let states = containers.iter().copied();
            self.containers
                .get_or_create(&State { state })
                .set(count(states, state));
        }
        self.memory.set(signed(sandboxes.memory().await));
        match sandboxes.host().images.usage().await {
            Ok(usage) => drop(self.images.set(signed(usage.bytes))),
            Err(error) => tracing::warn!(%error, "what images take is not known"),
        }
        let mut text = String::new();
        // A string takes everything.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

fn count<'a>(states: impl Iterator<Item = &'a str>, wanted: &str) -> i64 {
    signed(states.filter(|state| *state == wanted).count() as u64)
}

fn signed(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn pod_state(state: &PodState) -> &'static str {
    match state {
        PodState::Starting => "starting",
        PodState::Ready { .. } => "ready",
        PodState::NotReady { .. } => "not_ready",
    }
}

fn container_state(state: &ContainerState) -> &'static str {
    match state {
        ContainerState::Creating | ContainerState::Created => "created",
        ContainerState::Running { .. } => "running",
        ContainerState::Exited(_) => "exited",
    }
}

//! Metrics under the names that cAdvisor gave them, so that dashboards keep working.

use bulkhead_agent_api::v1::{ContainerStats, GroupStats, InterfaceStats, MemoryStats, Stall};
use bulkhead_cri_api::v1 as cri;
use cri::MetricType::{Counter, Gauge};

use super::{Figures, message};
use crate::sandbox::{Container, ContainerState};

/// What every metric tells of its container or pod; empty for a pod's own where it has none.
const WHO: [&str; 6] = ["container", "id", "image", "name", "namespace", "pod"];
const MICROSECONDS: u64 = 1_000_000;
const NANOSECONDS: i64 = 1_000_000_000;

/// A metric's name, what it tells, its kind, and its labels beside [`WHO`].
struct Metric<F: 'static> {
    name: &'static str,
    help: &'static str,
    kind: cri::MetricType,
    labels: &'static [&'static str],
    read: F,
}

/// A value with what its labels say; nothing where it is not known.
type Values = Vec<(&'static [&'static str], u64)>;
type OfGroup = fn(&GroupStats) -> Values;
type OfContainer = fn(&Container, &ContainerStats) -> Option<u64>;
type OfInterface = fn(&InterfaceStats) -> u64;

macro_rules! metrics {
    ($($name:literal, $kind:ident, $help:literal, [$($label:literal),*], $read:expr;)*) => {
        &[$(Metric { name: $name, help: $help, kind: $kind, labels: &[$($label),*], read: $read }),*]
    };
}

/// Of pods, as their cgroups on the host say, and of containers.
const GROUP: &[Metric<OfGroup>] = metrics! {
    "container_cpu_usage_seconds_total", Counter, "CPU time used, in seconds.", [],
        |group| one(group.cpu.map(|cpu| cpu.microseconds / MICROSECONDS));
    "container_cpu_user_seconds_total", Counter, "CPU time used by programs, in seconds.", [],
        |group| one(group.cpu.map(|cpu| cpu.user_microseconds / MICROSECONDS));
    "container_cpu_system_seconds_total", Counter, "CPU time used by the kernel, in seconds.", [],
        |group| one(group.cpu.map(|cpu| cpu.system_microseconds / MICROSECONDS));
    "container_cpu_cfs_periods_total", Counter, "Periods of the CPU quota.", [],
        |group| one(group.cpu.map(|cpu| cpu.periods));
    "container_cpu_cfs_throttled_periods_total", Counter, "Periods in which the quota ran out.", [],
        |group| one(group.cpu.map(|cpu| cpu.throttled_periods));
    "container_cpu_cfs_throttled_seconds_total", Counter, "Time without quota, in seconds.", [],
        |group| one(group.cpu.map(|cpu| cpu.throttled_microseconds / MICROSECONDS));
    "container_memory_usage_bytes", Gauge, "All memory charged, caches included.", [],
        |group| memory(group, |memory| Some(memory.current));
    "container_memory_working_set_bytes", Gauge, "Memory that cannot be reclaimed.", [],
        |group| memory(group, |memory| Some(message::working_set(memory)));
    "container_memory_rss", Gauge, "Anonymous memory, in bytes.", [],
        |group| memory(group, |memory| Some(memory.anonymous));
    "container_memory_cache", Gauge, "Memory of cached files, in bytes.", [],
        |group| memory(group, |memory| Some(memory.file));
    "container_memory_mapped_file", Gauge, "Memory of mapped files, in bytes.", [],
        |group| memory(group, |memory| Some(memory.mapped_file));
    "container_memory_kernel_usage", Gauge, "Memory of the kernel, in bytes.", [],
        |group| memory(group, |memory| Some(memory.kernel));
    "container_memory_swap", Gauge, "Swap used, in bytes.", [],
        |group| memory(group, |memory| memory.swap);
    "container_memory_max_usage_bytes", Gauge, "The most memory ever charged.", [],
        |group| memory(group, |memory| Some(memory.peak));
    "container_memory_failcnt", Counter, "How often the memory limit was met.", [],
        |group| memory(group, |memory| Some(memory.limit_hits));
    "container_memory_failures_total", Counter, "Page faults.", ["failure_type", "scope"],
        |group| match &group.memory {
            Some(memory) => vec![
                (&["pgfault", "hierarchy"], memory.page_faults),
                (&["pgmajfault", "hierarchy"], memory.major_page_faults),
            ],
            None => Vec::new(),
        };
    "container_oom_events_total", Counter, "Processes killed for want of memory.", [],
        |group| memory(group, |memory| Some(memory.oom_kills));
    "container_spec_memory_limit_bytes", Gauge, "The memory limit; 0 without one.", [],
        |group| memory(group, |memory| Some(memory.limit.unwrap_or(0)));
    "container_spec_memory_swap_limit_bytes", Gauge, "The swap limit; 0 without one.", [],
        |group| memory(group, |memory| Some(memory.swap_limit.unwrap_or(0)));
    "container_fs_reads_bytes_total", Counter, "Bytes read from disks.", ["device"],
        |group| disks(group.io.map(|io| io.read_bytes));
    "container_fs_writes_bytes_total", Counter, "Bytes written to disks.", ["device"],
        |group| disks(group.io.map(|io| io.written_bytes));
    "container_fs_reads_total", Counter, "Reads from disks.", ["device"],
        |group| disks(group.io.map(|io| io.reads));
    "container_fs_writes_total", Counter, "Writes to disks.", ["device"],
        |group| disks(group.io.map(|io| io.writes));
    "container_threads", Gauge, "Processes and threads.", [],
        |group| one(group.tasks);
    "container_threads_max", Gauge, "How many there may be; 0 without a limit.", [],
        |group| one(group.tasks.map(|_| group.tasks_limit.unwrap_or(0)));
    "container_pressure_cpu_waiting_seconds_total", Counter, "Time some waited for a CPU.", [],
        |group| waited(group.cpu_pressure.as_ref().and_then(|cpu| cpu.some.as_ref()));
    "container_pressure_cpu_stalled_seconds_total", Counter, "Time all waited for a CPU.", [],
        |group| waited(group.cpu_pressure.as_ref().and_then(|cpu| cpu.full.as_ref()));
    "container_pressure_memory_waiting_seconds_total", Counter, "Time some waited for memory.", [],
        |group| waited(group.memory_pressure.as_ref().and_then(|memory| memory.some.as_ref()));
    "container_pressure_memory_stalled_seconds_total", Counter, "Time all waited for memory.", [],
        |group| waited(group.memory_pressure.as_ref().and_then(|memory| memory.full.as_ref()));
    "container_pressure_io_waiting_seconds_total", Counter, "Time some waited for disks.", [],
        |group| waited(group.io_pressure.as_ref().and_then(|io| io.some.as_ref()));
    "container_pressure_io_stalled_seconds_total", Counter, "Time all waited for disks.", [],
        |group| waited(group.io_pressure.as_ref().and_then(|io| io.full.as_ref()));
};

/// Of containers only.
const CONTAINER: &[Metric<OfContainer>] = metrics! {
    "container_processes", Gauge, "Processes.", [],
        |_, stats| Some(stats.processes);
    "container_fs_usage_bytes", Gauge, "Bytes written onto the root file system.", [],
        |_, stats| stats.layer.map(|layer| layer.bytes);
    "container_start_time_seconds", Gauge, "When it was started, in seconds since 1970.", [],
        |container, _| match container.state {
            ContainerState::Running { started_at } => u64::try_from(started_at / NANOSECONDS).ok(),
            _ => None,
        };
};

/// Of pods only.
const INTERFACE: &[Metric<OfInterface>] = metrics! {
    "container_network_receive_bytes_total", Counter, "Bytes received.", ["interface"],
        |interface| interface.received_bytes;
    "container_network_receive_packets_total", Counter, "Frames received.", ["interface"],
        |interface| interface.received_packets;
    "container_network_receive_errors_total", Counter, "Errors of receiving.", ["interface"],
        |interface| interface.received_errors;
    "container_network_receive_packets_dropped_total", Counter, "Frames dropped as they came.",
        ["interface"], |interface| interface.received_dropped;
    "container_network_transmit_bytes_total", Counter, "Bytes sent.", ["interface"],
        |interface| interface.sent_bytes;
    "container_network_transmit_packets_total", Counter, "Frames sent.", ["interface"],
        |interface| interface.sent_packets;
    "container_network_transmit_errors_total", Counter, "Errors of sending.", ["interface"],
        |interface| interface.sent_errors;
    "container_network_transmit_packets_dropped_total", Counter, "Frames dropped before they went.",
        ["interface"], |interface| interface.sent_dropped;
};

fn one(value: Option<u64>) -> Values {
    value.map(|value| (&[][..], value)).into_iter().collect()
}

fn memory(group: &GroupStats, read: fn(&MemoryStats) -> Option<u64>) -> Values {
    one(group.memory.as_ref().and_then(read))
}

/// The guest's disks are all parts of one of the host: one value for all of them.
fn disks(value: Option<u64>) -> Values {
    value.map(|value| (&[""][..], value)).into_iter().collect()
}

fn waited(stall: Option<&Stall>) -> Values {
    one(stall.map(|stall| stall.microseconds / MICROSECONDS))
}

/// All metrics there are.
pub fn descriptors() -> Vec<cri::MetricDescriptor> {
    let descriptor = |name: &str, help: &str, labels: &[&str]| cri::MetricDescriptor {
        name: name.to_owned(),
        help: help.to_owned(),
        label_keys: WHO
            .iter()
            .chain(labels)
            .map(|&key| key.to_owned())
            .collect(),
    };
    let groups = GROUP
        .iter()
        .map(|one| descriptor(one.name, one.help, one.labels));
    let containers = CONTAINER
        .iter()
        .map(|one| descriptor(one.name, one.help, one.labels));
    let interfaces = INTERFACE
        .iter()
        .map(|one| descriptor(one.name, one.help, one.labels));
    groups.chain(containers).chain(interfaces).collect()
}

/// The metrics of a pod and its running containers.
pub(super) fn pod(figures: &Figures) -> cri::PodSandboxMetrics {
    let record = figures.view.record();
    let pod = record.config.metadata.clone().unwrap_or_default();
    let who = |container: &str, id: &str, image: &str, name: &str| {
        [container, id, image, name, &pod.namespace, &pod.name].map(str::to_owned)
    };
    let of_pod = who("", &record.id, "", "");
    let mut metrics = of_group(figures.at, &of_pod, &figures.group);
    for metric in INTERFACE {
        for interface in &figures.interfaces {
            let value = (metric.read)(interface);
            metrics.push(sample(
                figures.at,
                &of_pod,
                metric,
                &[&interface.name],
                value,
            ));
        }
    }
    let containers = figures.running().map(|(container, stats)| {
        let metadata = container.config.metadata.clone().unwrap_or_default();
        let image = container.config.image.clone().unwrap_or_default();
        let who = who(&metadata.name, &container.id, &image.image, &container.id);
        let group = stats.group.unwrap_or_default();
        let mut metrics = of_group(figures.at, &who, &group);
        for metric in CONTAINER {
            let value = (metric.read)(container, stats);
            metrics.extend(value.map(|value| sample(figures.at, &who, metric, &[], value)));
        }
        cri::ContainerMetrics {
            container_id: container.id.clone(),
            metrics,
        }
    });
    cri::PodSandboxMetrics {
        pod_sandbox_id: record.id.clone(),
        container_metrics: containers.collect(),
        metrics,
    }
}

fn of_group(at: i64, who: &[String], group: &GroupStats) -> Vec<cri::Metric> {
    let read = |metric: &'static Metric<OfGroup>| {
        let values = (metric.read)(group).into_iter();
        values.map(move |(labels, value)| sample(at, who, metric, labels, value))
    };
    GROUP.iter().flat_map(read).collect()
}

fn sample<F>(
    at: i64,
    who: &[String],
    metric: &Metric<F>,
    labels: &[&str],
    value: u64,
) -> cri::Metric {
    let labels = labels.iter().map(|&label| label.to_owned());
    cri::Metric {
        name: metric.name.to_owned(),
        timestamp: at,
        metric_type: metric.kind.into(),
        label_values: who.iter().cloned().chain(labels).collect(),
        value: Some(cri::UInt64Value { value }),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use bulkhead_agent_api::v1::{CpuStats, IoStats, Pressure};

    use super::*;

    #[test]
    fn no_two_metrics_have_one_name() {
        let all = descriptors();
        let names: HashSet<_> = all.iter().map(|descriptor| &descriptor.name).collect();
        assert_eq!(names.len(), all.len());
        assert!(names.iter().all(|name| name.starts_with("container_")));
    }

    #[test]
    fn every_metric_of_a_group_has_as_many_labels_as_it_says() {
        let pressure = Pressure {
            some: Some(Stall::default()),
            full: Some(Stall::default()),
        };
        let group = GroupStats {
            cpu: Some(CpuStats {
                microseconds: 2_500_000,
                ..CpuStats::default()
            }),
            memory: Some(MemoryStats {
                swap: Some(0),
                ..MemoryStats::default()
            }),
            io: Some(IoStats::default()),
            tasks: Some(1),
            tasks_limit: None,
            cpu_pressure: Some(pressure),
            memory_pressure: Some(pressure),
            io_pressure: Some(pressure),
        };
        let who = WHO.map(str::to_owned);
        let samples = of_group(7, &who, &group);
        let descriptors = descriptors();
        for metric in GROUP {
            let mut found = samples
                .iter()
                .filter(|sample| sample.name == metric.name)
                .peekable();
            assert!(found.peek().is_some(), "{}", metric.name);
            let says = descriptors
                .iter()
                .find(|says| says.name == metric.name)
                .unwrap();
            assert!(found.all(|sample| sample.label_values.len() == says.label_keys.len()));
        }
        assert_eq!(samples[0].value.unwrap().value, 2);
        assert!(of_group(7, &who, &GroupStats::default()).is_empty());
    }
}

//! The CRI's messages of figures.

use bulkhead_agent_api::v1::{
    ContainerStats, CpuStats, GroupStats, InterfaceStats, MemoryStats, Pressure, Stall,
};
use bulkhead_cri_api::v1 as cri;

use super::Figures;
use super::rate::Rates;
use crate::sandbox::Container;

/// A pod's figures.
pub fn pod(figures: &Figures, rates: &Rates) -> cri::PodSandboxStats {
    let record = figures.view.record();
    let (at, group) = (figures.at, &figures.group);
    let containers = figures.running();
    let mut interfaces = figures.interfaces.iter().map(interface);
    cri::PodSandboxStats {
        attributes: Some(cri::PodSandboxAttributes {
            id: record.id.clone(),
            metadata: record.config.metadata.clone(),
            labels: record.config.labels.clone(),
            annotations: record.config.annotations.clone(),
        }),
        linux: Some(cri::LinuxPodSandboxStats {
            cpu: cpu(&record.id, at, group, rates),
            memory: memory(at, group),
            network: Some(cri::NetworkUsage {
                timestamp: at,
                default_interface: interfaces.next(),
                interfaces: interfaces.collect(),
            }),
            process: Some(cri::ProcessUsage {
                timestamp: at,
                process_count: number(figures.tasks),
            }),
            containers: containers
                .map(|(known, stats)| container(figures, known, stats, rates))
                .collect(),
            io: io(at, group),
        }),
        windows: None,
    }
}

/// A running container's figures.
pub fn container(
    figures: &Figures,
    container: &Container,
    stats: &ContainerStats,
    rates: &Rates,
) -> cri::ContainerStats {
    let at = figures.at;
    let group = stats.group.unwrap_or_default();
    cri::ContainerStats {
        cpu: cpu(&container.id, at, &group, rates),
        memory: memory(at, &group),
        writable_layer: stats.layer.map(|layer| cri::FilesystemUsage {
            timestamp: at,
            fs_id: Some(cri::FilesystemIdentifier {
                mountpoint: figures.writable.display().to_string(),
            }),
            used_bytes: number(layer.bytes),
            inodes_used: number(layer.inodes),
        }),
        swap: group.memory.and_then(|memory| swap(at, &memory)),
        io: io(at, &group),
        ..absent(container)
    }
}

/// Who a container is, without figures.
pub fn absent(container: &Container) -> cri::ContainerStats {
    cri::ContainerStats {
        attributes: Some(cri::ContainerAttributes {
            id: container.id.clone(),
            metadata: container.config.metadata.clone(),
            labels: container.config.labels.clone(),
            annotations: container.config.annotations.clone(),
        }),
        ..Default::default()
    }
}

fn cpu(id: &str, at: i64, group: &GroupStats, rates: &Rates) -> Option<cri::CpuUsage> {
    let CpuStats { microseconds, .. } = group.cpu?;
    let used = microseconds.saturating_mul(1000);
    Some(cri::CpuUsage {
        timestamp: at,
        usage_core_nano_seconds: number(used),
        usage_nano_cores: rates.of(id, at, used).and_then(number),
        psi: group.cpu_pressure.as_ref().map(psi),
    })
}

/// What cannot be reclaimed, as the kubelet reckons it.
pub fn working_set(memory: &MemoryStats) -> u64 {
    memory.current.saturating_sub(memory.inactive_file)
}

fn memory(at: i64, group: &GroupStats) -> Option<cri::MemoryUsage> {
    let memory = group.memory.as_ref()?;
    let working_set = working_set(memory);
    Some(cri::MemoryUsage {
        timestamp: at,
        working_set_bytes: number(working_set),
        available_bytes: memory
            .limit
            .and_then(|limit| number(limit.saturating_sub(working_set))),
        usage_bytes: number(memory.current),
        rss_bytes: number(memory.anonymous),
        page_faults: number(memory.page_faults),
        major_page_faults: number(memory.major_page_faults),
        psi: group.memory_pressure.as_ref().map(psi),
    })
}

fn swap(at: i64, memory: &MemoryStats) -> Option<cri::SwapUsage> {
    let used = memory.swap?;
    Some(cri::SwapUsage {
        timestamp: at,
        swap_available_bytes: memory
            .swap_limit
            .and_then(|limit| number(limit.saturating_sub(used))),
        swap_usage_bytes: number(used),
    })
}

fn io(at: i64, group: &GroupStats) -> Option<cri::IoUsage> {
    group.io_pressure.as_ref().map(|pressure| cri::IoUsage {
        timestamp: at,
        psi: Some(psi(pressure)),
    })
}

fn psi(pressure: &Pressure) -> cri::PsiStats {
    let data = |stall: &Stall| cri::PsiData {
        total: stall.microseconds,
        avg10: stall.average_10,
        avg60: stall.average_60,
        avg300: stall.average_300,
    };
    cri::PsiStats {
        full: pressure.full.as_ref().map(data),
        some: pressure.some.as_ref().map(data),
    }
}

fn interface(stats: &InterfaceStats) -> cri::NetworkInterfaceUsage {
    cri::NetworkInterfaceUsage {
        name: stats.name.clone(),
        rx_bytes: number(stats.received_bytes),
        rx_errors: number(stats.received_errors),
        tx_bytes: number(stats.sent_bytes),
        tx_errors: number(stats.sent_errors),
    }
}

fn number(value: u64) -> Option<cri::UInt64Value> {
    Some(cri::UInt64Value { value })
}

//! What pods and containers use, as a table.

use std::io::IsTerminal;
use std::time::Duration;

use bulkhead_cri_api::v1::{
    ContainerStats, CpuUsage, ListPodSandboxStatsRequest, MemoryUsage, NetworkInterfaceUsage,
    PodSandboxStats, UInt64Value,
};
use indicatif::HumanBytes;

use super::client::Client;
use super::failure::Failure;
use super::print;
use super::table::{Row, head, render, short};

/// Between two looks: CPU in use is what was used between them.
const PAUSE: Duration = Duration::from_millis(1500);
/// Clears the terminal.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// Prints the table, on a terminal again and again.
pub async fn stats(client: &Client) -> Result<u8, Failure> {
    look(client).await?;
    loop {
        tokio::time::sleep(PAUSE).await;
        let text = render(&rows(&look(client).await?));
        if !std::io::stdout().is_terminal() {
            return print(&text);
        }
        print(&format!("{CLEAR}{text}"))?;
    }
}

async fn look(client: &Client) -> Result<Vec<PodSandboxStats>, Failure> {
    let request = ListPodSandboxStatsRequest::default();
    let answer = client.runtime.clone().list_pod_sandbox_stats(request).await;
    let answer = answer.map_err(|status| Failure::call("ask for figures", &status))?;
    Ok(answer.into_inner().stats)
}

fn rows(pods: &[PodSandboxStats]) -> Vec<Row> {
    let titles = [
        "ID", "NAME", "CPU", "MEMORY", "WRITTEN", "TASKS", "RECEIVED", "SENT",
    ];
    let mut rows = vec![head(&titles)];
    for pod in pods {
        let attributes = pod.attributes.clone().unwrap_or_default();
        let name = attributes.metadata.unwrap_or_default().name;
        let linux = pod.linux.clone().unwrap_or_default();
        let network = linux.network.unwrap_or_default();
        let all: Vec<NetworkInterfaceUsage> = network
            .default_interface
            .into_iter()
            .chain(network.interfaces)
            .collect();
        let sum = |read: fn(&NetworkInterfaceUsage) -> Option<UInt64Value>| {
            let values = all.iter().filter_map(read).map(|value| value.value);
            HumanBytes(values.fold(0, u64::saturating_add)).to_string()
        };
        let tasks = linux.process.and_then(|process| process.process_count);
        rows.push(vec![
            short(&attributes.id),
            name.clone(),
            cpu(linux.cpu.as_ref()),
            memory(linux.memory.as_ref()),
            "-".into(),
            tasks.map_or("-".into(), |tasks| tasks.value.to_string()),
            sum(|interface| interface.rx_bytes),
            sum(|interface| interface.tx_bytes),
        ]);
        rows.extend(linux.containers.iter().map(|one| container(&name, one)));
    }
    rows
}

fn container(pod: &str, stats: &ContainerStats) -> Row {
    let attributes = stats.attributes.clone().unwrap_or_default();
    let name = attributes.metadata.unwrap_or_default().name;
    let layer = stats.writable_layer.as_ref();
    let none = || "-".to_owned();
    vec![
        short(&attributes.id),
        format!("{pod}/{name}"),
        cpu(stats.cpu.as_ref()),
        memory(stats.memory.as_ref()),
        bytes(layer.and_then(|layer| layer.used_bytes)),
        none(),
        none(),
        none(),
    ]
}

/// Percent of one CPU.
fn cpu(usage: Option<&CpuUsage>) -> String {
    match usage.and_then(|usage| usage.usage_nano_cores) {
        Some(rate) => format!("{:.1} %", rate.value as f64 / 1e7),
        None => "-".to_owned(),
    }
}

fn memory(usage: Option<&MemoryUsage>) -> String {
    bytes(usage.and_then(|usage| usage.working_set_bytes))
}

fn bytes(value: Option<UInt64Value>) -> String {
    value.map_or("-".to_owned(), |value| HumanBytes(value.value).to_string())
}

#[cfg(test)]
mod tests {
    use bulkhead_cri_api::v1::{LinuxPodSandboxStats, NetworkUsage, PodSandboxAttributes};

    use super::*;

    #[test]
    fn a_pod_is_followed_by_its_containers_and_what_is_unknown_is_a_dash() {
        let number = |value| Some(UInt64Value { value });
        let interface = NetworkInterfaceUsage {
            rx_bytes: number(2048),
            ..Default::default()
        };
        let pod = PodSandboxStats {
            attributes: Some(PodSandboxAttributes {
                id: "0123456789abcdef".into(),
                ..Default::default()
            }),
            linux: Some(LinuxPodSandboxStats {
                cpu: Some(CpuUsage {
                    usage_nano_cores: number(1_500_000_000),
                    ..Default::default()
                }),
                network: Some(NetworkUsage {
                    default_interface: Some(interface),
                    ..Default::default()
                }),
                containers: vec![ContainerStats::default()],
                ..Default::default()
            }),
            windows: None,
        };
        let rows = rows(&[pod]);
        assert_eq!(rows.len(), 3);
        assert_eq!(rows[1][0], "0123456789ab");
        assert_eq!(rows[1][2..], ["150.0 %", "-", "-", "-", "2.00 KiB", "0 B"]);
        assert_eq!(rows[2][2..], ["-"; 6]);
        assert!(rows.iter().all(|row| row.len() == rows[0].len()));
    }
}

//! `cargo xtask bench network`.

use std::process::ExitCode;

use anyhow::{Context, Result};

use super::TIMES;
use super::clock::{Clocks, NETWORK_RUNS};
use super::table::{Figures, Table, Unit};

/// What passes between pods and the host, as the clock names it.
const MOVED: [(&str, &str); 8] = [
    ("  16 MiB, pod → pod", "pod to pod"),
    ("  16 MiB, pod → host", "pod to host"),
    ("  16 MiB, host → pod", "host to pod"),
    ("  pod → host, 8 connections", "pod to host by 8"),
    ("  host → pod, 8 connections", "host to pod by 8"),
    ("  1 byte and back, pod asks pod", "pod asks pod"),
    ("  1 byte and back, pod asks host", "pod asks host"),
    ("  1 byte and back, host asks pod", "host asks pod"),
];

/// What a device counted, as the clock names it: the transfer and the queue that its bytes pass.
const COUNTED: [(&str, &str, &str); 4] = [
    ("8 MiB, pod → host", "sent", "from guest"),
    ("8 MiB, host → pod", "received", "to guest"),
    (
        "8 MiB, pod → host, 8 connections",
        "sent by 8",
        "from guest",
    ),
    (
        "8 MiB, host → pod, 8 connections",
        "received by 8",
        "to guest",
    ),
];

/// Measures and prints.
pub fn print(clocks: &Clocks) -> Result<ExitCode> {
    println!("Medians of {NETWORK_RUNS} runs, in the nested test machine; ≤, ≥: aim");
    for (clock, words, unit) in TIMES {
        let figures = clocks.network(clock)?;
        println!("\n{words}");
        vms(&figures, unit)?;
        pods(&figures, unit)?;
        counters(&figures)?;
        setup(&figures, unit)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn vms(figures: &Figures, unit: Unit) -> Result<()> {
    let table = Table {
        own: "bulkhead-vmm",
        other: "qemu",
    };
    table.head("A VM on a tap", "bulkhead-vmm", "QEMU microvm");
    table.row("  16 MiB, host → VM", figures, "host to pod", unit)?;
    let asked = "  1 byte and back, host asks (≤ 1.0)";
    table.row(asked, figures, "host asks pod", unit)
}

fn pods(figures: &Figures, unit: Unit) -> Result<()> {
    let table = Table {
        own: "bulkhead",
        other: "reference",
    };
    table.head("Pods", "bulkhead", "containerd and runc");
    MOVED
        .iter()
        .try_for_each(|(words, figure)| table.row(words, figures, figure, unit))
}

/// Sums over all runs, so that the frames of a run's beginning weigh little.
fn counters(figures: &Figures) -> Result<()> {
    println!("\nThe pod's device in bulk (of the queue that carries the bytes; of both queues)");
    for (words, transfer, queue) in COUNTED {
        let sum = |queue: &str, figure: &str| -> Result<f64> {
            let name = format!("bulkhead {transfer}: {queue} {figure}");
            let values = figures
                .get(&name)
                .with_context(|| format!("no figure {name}"))?;
            Ok(values.iter().sum::<u64>() as f64)
        };
        let both = |figure: &str| {
            Ok::<_, anyhow::Error>(sum("to guest", figure)? + sum("from guest", figure)?)
        };
        let frames = sum(queue, "frames")?;
        println!("  {words}");
        println!(
            "    bytes a frame (≥ 16384)           {:>10.0}",
            sum(queue, "bytes")? / frames
        );
        for (words, figure) in [
            ("    frames a notification (≥ 8)       ", "notifications"),
            ("    frames an interrupt (≥ 8)         ", "interrupts"),
        ] {
            println!(
                "{words}{:>10.1}{:>10.1}",
                frames / sum(queue, figure)?,
                both("frames")? / both(figure)?
            );
        }
    }
    Ok(())
}

fn setup(figures: &Figures, unit: Unit) -> Result<()> {
    println!("\nOf RunPodSandbox");
    let median = |name: &str| -> Result<f64> {
        let mut values = figures
            .get(name)
            .with_context(|| format!("no figure {name}"))?
            .clone();
        values.sort_unstable();
        let middle = values.get(values.len() / 2).copied();
        Ok(middle.with_context(|| format!("no figure {name}"))? as f64)
    };
    for (words, part, whole) in [
        (
            "  network, embedded bridge (≤ 0.05)",
            "bulkhead network",
            "bulkhead start",
        ),
        (
            "  network with CNI ÷ its plugins (≤ 1.10)",
            "cni network",
            "cni plugins",
        ),
    ] {
        let (part, whole) = (median(part)?, median(whole)?);
        println!(
            "{words:<42}{:>9.2} {name}{:>9.2} {name}{:>8.3}",
            part / unit.size,
            whole / unit.size,
            part / whole,
            name = unit.name
        );
    }
    Ok(())
}

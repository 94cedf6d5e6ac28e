//! Measures how a VM starts: bulkhead-vmm beside QEMU's microvm, with the same kernel and initramfs.
//!
//! `start-clock DIRECTORY RUNS`; the directory holds `bulkhead-vmm`, `vmlinux`, `ready` (an initramfs
//! whose init says READY) and `first` (a kernel that says READY with its first instructions).
//! Prints one JSON object at the end, and nothing before: output would disturb the clock.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use bulkhead_tests::hypervisor::{Hypervisor, MEMORY, Machine, Setup};

fn main() -> Result<()> {
    println!("{}", measure()?);
    Ok(())
}

fn measure() -> Result<serde_json::Value> {
    let mut arguments = std::env::args().skip(1);
    let (Some(directory), Some(runs)) = (arguments.next(), arguments.next()) else {
        bail!("usage: start-clock DIRECTORY RUNS");
    };
    let directory = PathBuf::from(directory);
    let runs: u32 = runs.parse().context("RUNS is not a number")?;

    let setup = |kernel, words| Setup {
        directory: &directory,
        kernel,
        initramfs: "ready",
        words,
        tap: None,
    };

    let mut figures: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for run in 0..=runs {
        // Both in turn, so that a change of the machine's speed meets both alike.
        for hypervisor in [Hypervisor::Bulkhead, Hypervisor::Qemu] {
            for (figure, kernel) in [("first instruction", "first"), ("init", "vmlinux")] {
                let mut machine = Machine::start(hypervisor, &setup(kernel, ""))?;
                let ready = machine.ready()?;
                machine.end()?;
                // The first run fills caches.
                if run > 0 {
                    let name = format!("{} {figure}", hypervisor.name());
                    figures.entry(name).or_default().push(ready);
                }
            }
        }
    }
    for hypervisor in [Hypervisor::Bulkhead, Hypervisor::Qemu] {
        let mut machine = Machine::start(hypervisor, &setup("vmlinux", "-- hold"))?;
        machine.ready()?;
        let (own, guest) = memory(machine.pid())?;
        machine.kill();
        for (figure, kib) in [("own memory", own), ("guest memory", guest)] {
            figures.insert(format!("{} {figure}", hypervisor.name()), vec![kib]);
        }
    }
    Ok(serde_json::to_value(figures)?)
}

/// The proportional memory of a process in KiB: its own, and that of the guest's RAM (the mapping that
/// is at least as large as the guest).
fn memory(pid: u32) -> Result<(u64, u64)> {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut own, mut guest) = (0, 0);
    let mut size = 0;
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (name, figure) = (words.next(), words.next());
        let kib = || figure.unwrap_or_default().parse::<u64>();
        match name {
            // The first figure of each mapping.
            Some("Size:") => size = kib()?,
            Some("Pss:") if size >= u64::from(MEMORY) << 10 => guest += kib()?,
            Some("Pss:") => own += kib()?,
            _ => {}
        }
    }
    Ok((own, guest))
}

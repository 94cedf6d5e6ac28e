//! `cargo xtask bench`: figures, as tables. Nothing here fails because something is slow.

mod clock;
mod network;
mod table;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};

use crate::artefacts;
use crate::bed::Clock;
use clock::{Clocks, RUNS};
use table::{Figures, MIB, Table, Unit};

/// Arguments of `cargo xtask bench`.
#[derive(Args)]
pub struct Arguments {
    #[command(subcommand)]
    subject: Subject,
}

#[derive(Subcommand)]
enum Subject {
    /// How a VM starts, beside Debian's QEMU microvm with the same kernel and initramfs, and how a
    /// pod does, beside Debian's containerd and runc with the same image
    Start {
        /// Start VMs only, and with this kernel (an uncompressed ELF)
        #[arg(long, value_name = "FILE")]
        kernel: Option<PathBuf>,
    },
    /// How a pod that runs takes a second container and commands, beside containerd and runc
    Exec,
    /// How frames pass between pods and the host, beside containerd and runc; how a VM answers on a
    /// tap, beside QEMU's microvm; and what the network takes of a pod's start
    Network,
}

/// `cargo xtask bench`.
pub fn command(arguments: &Arguments) -> Result<ExitCode> {
    match &arguments.subject {
        Subject::Start { kernel } => start(kernel.as_deref()),
        Subject::Exec => exec(),
        Subject::Network => network::print(&Clocks::prepare(None)?),
    }
}

/// A kind of time, what is said of it, and its unit.
const TIMES: [(Clock, &str, Unit); 2] = [
    (
        Clock::Instructions,
        "by the instruction clock (M: a million instructions, of host and guest together)",
        Unit {
            name: "M",
            size: 1e6,
        },
    ),
    (
        Clock::Real,
        "in real time",
        Unit {
            name: "ms",
            size: 1e6,
        },
    ),
];

fn start(kernel: Option<&Path>) -> Result<ExitCode> {
    let clocks = Clocks::prepare(kernel)?;
    let (mut vms, mut pods) = (Vec::new(), Vec::new());
    for (clock, words, unit) in TIMES {
        vms.push((words, unit, clocks.vms(clock)?));
        if kernel.is_none() {
            pods.push((words, unit, clocks.pods(clock)?));
        }
    }
    println!(
        "Medians of {RUNS} runs (largest less smallest, in % of the median), in the nested \
         test machine; ≤: aim"
    );
    print_vms(&vms)?;
    if kernel.is_none() {
        print_pods(&pods)?;
        print_sizes(&clocks)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn exec() -> Result<ExitCode> {
    let clocks = Clocks::prepare(None)?;
    println!("Medians of {RUNS} runs, in the nested test machine; ≤: aim");
    let table = Table {
        own: "bulkhead",
        other: "reference",
    };
    table.head("In a pod that runs", "bulkhead", "containerd and runc");
    for (clock, words, unit) in TIMES {
        let figures = clocks.pods(clock)?;
        println!("{words}");
        table.row("  ExecSync of true (≤ 0.5)", &figures, "exec", unit)?;
        let second = "  create + start a container (≤ 0.5)";
        table.row(second, &figures, "second container", unit)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn print_vms(measured: &[(&str, Unit, Figures)]) -> Result<()> {
    let table = Table {
        own: "bulkhead-vmm",
        other: "qemu",
    };
    table.head(
        "A VM, from its process's start to the guest's word",
        "bulkhead-vmm",
        "QEMU microvm",
    );
    for (time, unit, figures) in measured {
        println!("{time}");
        table.row("  first instruction", figures, "first instruction", *unit)?;
        table.row("  kernel's init runs (≤ 0.52)", figures, "init", *unit)?;
    }
    let memory = Unit {
        name: "MiB",
        size: 1024.0,
    };
    if let Some((_, _, figures)) = measured.last() {
        println!("memory (PSS) when init runs, of a guest of 256 MiB");
        table.row(
            "  hypervisor's own (≤ 4.3 MiB)",
            figures,
            "own memory",
            memory,
        )?;
        table.row("  touched by the guest", figures, "guest memory", memory)?;
    }
    Ok(())
}

fn print_pods(measured: &[(&str, Unit, Figures)]) -> Result<()> {
    let table = Table {
        own: "bulkhead",
        other: "reference",
    };
    table.head(
        "A pod, from the call of RunPodSandbox",
        "bulkhead",
        "containerd and runc",
    );
    for (time, unit, figures) in measured {
        println!("{time}");
        for (words, figure) in [
            ("  RunPodSandbox answers", "sandbox"),
            ("  CreateContainer answers", "created"),
            ("  StartContainer answers", "started"),
            ("  first output byte is in the log", "first byte"),
        ] {
            table.row(words, figures, figure, *unit)?;
        }
        println!("  of RunPodSandbox:");
        for (words, figure) in [
            ("    until the VMM starts", "host"),
            ("    until the agent is READY", "guest"),
            ("    until the sandbox is prepared", "prepare"),
        ] {
            table.own_row(words, figures, figure, *unit)?;
        }
    }
    Ok(())
}

fn print_sizes(clocks: &Clocks) -> Result<()> {
    println!("\nSizes");
    let beside = |name: &str| clocks.artefacts.join(name);
    let sizes: [(&str, PathBuf, &str); 5] = [
        ("agent", artefacts::agent_executable(), "≤ 3 MiB"),
        ("initramfs", beside("initramfs"), ""),
        ("kernel's ELF", beside("vmlinux"), "≤ 20 MiB"),
        ("bulkhead-vmm", beside("bulkhead-vmm"), ""),
        ("bulkhead", beside("bulkhead"), ""),
    ];
    for (words, path, target) in sizes {
        let file = fs::metadata(&path);
        let bytes = file.with_context(|| path.display().to_string())?.len();
        println!("{words:<36}{:>20.2} MiB  {target}", bytes as f64 / MIB);
    }
    Ok(())
}

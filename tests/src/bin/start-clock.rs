//! Measures how a VM starts: bulkhead-vmm beside QEMU's microvm, with the same kernel and initramfs.
//!
//! `start-clock DIRECTORY RUNS`; the directory holds `bulkhead-vmm`, `vmlinux`, `ready` (an initramfs
//! whose init says READY) and `first` (a kernel that says READY with its first instructions).
//! Prints one JSON object at the end, and nothing before: output would disturb the clock.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use bulkhead_vmm_api::{Control, Launch, Vmm};

/// Guest memory, MiB.
const MEMORY: u32 = 256;

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

    let mut figures: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for run in 0..=runs {
        // Both in turn, so that a change of the machine's speed meets both alike.
        for hypervisor in [Hypervisor::Bulkhead, Hypervisor::Qemu] {
            for (figure, kernel) in [("first instruction", "first"), ("init", "vmlinux")] {
                let mut machine = Machine::start(hypervisor, &directory, kernel, "")?;
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
        let mut machine = Machine::start(hypervisor, &directory, "vmlinux", "-- hold")?;
        machine.ready()?;
        let (own, guest) = memory(machine.pid())?;
        machine.kill();
        for (figure, kib) in [("own memory", own), ("guest memory", guest)] {
            figures.insert(format!("{} {figure}", hypervisor.name()), vec![kib]);
        }
    }
    Ok(serde_json::to_value(figures)?)
}

#[derive(Clone, Copy)]
enum Hypervisor {
    Bulkhead,
    Qemu,
}

impl Hypervisor {
    fn name(self) -> &'static str {
        match self {
            Self::Bulkhead => "bulkhead-vmm",
            Self::Qemu => "qemu",
        }
    }
}

/// A VM that was started, and its console.
struct Machine {
    process: Process,
    console: BufReader<File>,
    started: Instant,
    record: Option<File>,
}

enum Process {
    Vmm(Vmm),
    Qemu(Child),
}

impl Machine {
    fn start(hypervisor: Hypervisor, directory: &Path, kernel: &str, words: &str) -> Result<Self> {
        let (read, write) = std::io::pipe()?;
        let open = |name: &str| {
            let path = directory.join(name);
            File::open(&path).with_context(|| format!("cannot open {}", path.display()))
        };
        let console = BufReader::new(File::from(std::os::fd::OwnedFd::from(read)));
        match hypervisor {
            Hypervisor::Bulkhead => {
                let socket = std::env::temp_dir().join("start-clock.sock");
                let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
                let record = File::options()
                    .read(true)
                    .write(true)
                    .create(true)
                    .truncate(true)
                    .open(std::env::temp_dir().join("start-clock.record"))?;
                let launch = Launch {
                    program: directory.join("bulkhead-vmm"),
                    id: "start-clock".to_owned(),
                    kvm: kvm.into(),
                    kernel: open(kernel)?.into(),
                    initramfs: Some(open("ready")?.into()),
                    command_line: format!("quiet {words}"),
                    memory_mib: MEMORY,
                    vcpus: 1,
                    guest_cid: 3,
                    control: Control::listen(&socket)?,
                    exit_record: record.try_clone()?.into(),
                    console: Some(write.into()),
                    devices: Vec::new(),
                    cgroup_procs: None,
                    messages: None,
                };
                let started = Instant::now();
                let process = Process::Vmm(launch.spawn()?);
                Ok(Self {
                    process,
                    console,
                    started,
                    record: Some(record),
                })
            }
            Hypervisor::Qemu => {
                let mut command = Command::new("qemu-system-x86_64");
                command
                    .args([
                        "-M",
                        "microvm,x-option-roms=off,pit=off,pic=off,rtc=off,acpi=off",
                    ])
                    .args(["-accel", "kvm", "-cpu", "host", "-smp", "1"])
                    .args(["-m", &format!("{MEMORY}M")])
                    .args([
                        "-nodefaults",
                        "-no-user-config",
                        "-display",
                        "none",
                        "-no-reboot",
                    ])
                    .arg("-kernel")
                    .arg(directory.join(kernel))
                    .arg("-initrd")
                    .arg(directory.join("ready"))
                    .args([
                        "-append",
                        &format!("console=ttyS0 reboot=t panic=-1 quiet {words}"),
                    ])
                    .args(["-serial", "stdio"])
                    .stdin(Stdio::null())
                    .stdout(write);
                let started = Instant::now();
                let process = Process::Qemu(command.spawn().context("cannot start QEMU")?);
                Ok(Self {
                    process,
                    console,
                    started,
                    record: None,
                })
            }
        }
    }

    /// Nanoseconds from exec to the guest's READY.
    fn ready(&mut self) -> Result<u64> {
        let mut heard = String::new();
        let mut line = Vec::new();
        while self.console.read_until(b'\n', &mut line)? > 0 {
            let ready = line.windows(5).any(|bytes| bytes == b"READY");
            if ready {
                return Ok(u64::try_from(self.started.elapsed().as_nanos())?);
            }
            heard += &String::from_utf8_lossy(&line);
            line.clear();
        }
        let record = self.record.as_ref().map(bulkhead_vmm_api::ExitRecord::read);
        bail!("the guest never was ready; its console: {heard}\n{record:?}")
    }

    fn pid(&self) -> u32 {
        match &self.process {
            Process::Vmm(vmm) => vmm.pid(),
            Process::Qemu(child) => child.id(),
        }
    }

    fn end(mut self) -> Result<()> {
        match &mut self.process {
            Process::Vmm(vmm) => vmm.wait()?,
            Process::Qemu(child) => child.wait()?,
        };
        Ok(())
    }

    fn kill(mut self) {
        let _ = match &mut self.process {
            Process::Vmm(vmm) => vmm.kill().and_then(|()| vmm.wait()),
            Process::Qemu(child) => child.kill().and_then(|()| child.wait()),
        };
    }
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

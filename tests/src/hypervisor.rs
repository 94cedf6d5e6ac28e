//! VMs alone, without a pod around them: bulkhead-vmm beside QEMU's microvm.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use bulkhead_vmm_api::{Control, Launch, OpenDevice, Vmm};

use crate::sys;

/// Guest memory, MiB.
pub const MEMORY: u32 = 256;
/// The hardware address of a VM's network interface.
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// What a VM is started with.
pub struct Setup<'a> {
    /// Where kernel and initramfs are, and `bulkhead-vmm`.
    pub directory: &'a Path,
    /// A file there.
    pub kernel: &'a str,
    /// Another.
    pub initramfs: &'a str,
    /// Further words of the command line.
    pub words: &'a str,
    /// The tap that is its network interface.
    pub tap: Option<&'a str>,
}

/// Who runs a VM.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Hypervisor {
    /// This project's.
    Bulkhead,
    /// Debian's QEMU, as a microvm.
    Qemu,
}

impl Hypervisor {
    /// As in the figures.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bulkhead => "bulkhead-vmm",
            Self::Qemu => "qemu",
        }
    }
}

/// A VM that was started, and its console.
pub struct Machine {
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
    /// Starts one.
    pub fn start(hypervisor: Hypervisor, setup: &Setup<'_>) -> Result<Self> {
        let Setup {
            directory,
            kernel,
            initramfs,
            words,
            tap,
        } = *setup;
        let (read, write) = std::io::pipe()?;
        let open = |name: &str| {
            let path = directory.join(name);
            File::open(&path).with_context(|| format!("cannot open {}", path.display()))
        };
        let console = BufReader::new(File::from(std::os::fd::OwnedFd::from(read)));
        match hypervisor {
            Hypervisor::Bulkhead => {
                let socket = std::env::temp_dir().join("clock.sock");
                let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
                let record = File::options()
                    .read(true)
                    .write(true)
                    .create(true)
                    .truncate(true)
                    .open(std::env::temp_dir().join("clock.record"))?;
                let cards = tap.map(|name| -> Result<_> {
                    Ok(OpenDevice::net(vec![sys::open_tap(name)?], MAC, 1500))
                });
                let launch = Launch {
                    program: directory.join("bulkhead-vmm"),
                    id: "clock".to_owned(),
                    kvm: kvm.into(),
                    kernel: open(kernel)?.into(),
                    initramfs: Some(open(initramfs)?.into()),
                    command_line: format!("quiet {words}"),
                    memory_mib: MEMORY,
                    vcpus: 1,
                    guest_cid: 3,
                    control: Control::listen(&socket)?,
                    exit_record: record.try_clone()?.into(),
                    console: Some(write.into()),
                    devices: cards.transpose()?.into_iter().collect(),
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
                    .arg(directory.join(initramfs))
                    .args([
                        "-append",
                        &format!("console=ttyS0 reboot=t panic=-1 quiet {words}"),
                    ])
                    .args(["-serial", "stdio"])
                    .stdin(Stdio::null())
                    .stdout(write);
                if let Some(name) = tap {
                    let tap = format!("tap,id=tap,ifname={name},script=no,downscript=no,vhost=off");
                    let mac = MAC.map(|byte| format!("{byte:02x}")).join(":");
                    command
                        // As any guest of today speaks it: virtio 1, not its draft.
                        .args(["-global", "virtio-mmio.force-legacy=false"])
                        .args(["-netdev", &tap])
                        .args([
                            "-device",
                            &format!("virtio-net-device,netdev=tap,mac={mac}"),
                        ]);
                }
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
    pub fn ready(&mut self) -> Result<u64> {
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

    /// Of the hypervisor's process.
    pub fn pid(&self) -> u32 {
        match &self.process {
            Process::Vmm(vmm) => vmm.pid(),
            Process::Qemu(child) => child.id(),
        }
    }

    /// Waits for the VM's own end.
    pub fn end(mut self) -> Result<()> {
        match &mut self.process {
            Process::Vmm(vmm) => vmm.wait()?,
            Process::Qemu(child) => child.wait()?,
        };
        Ok(())
    }

    /// Ends it at once.
    pub fn kill(mut self) {
        let _ = match &mut self.process {
            Process::Vmm(vmm) => vmm.kill().and_then(|()| vmm.wait()),
            Process::Qemu(child) => child.kill().and_then(|()| child.wait()),
        };
    }
}

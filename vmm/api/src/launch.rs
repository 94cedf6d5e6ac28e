//! Starts a VMM.

use std::ffi::CString;
use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};

use crate::{Block, CONFIG_FD, ConfigError, Device, Extent, Fd, Net, VERSION, VmConfig, sys};

/// A device together with its open files, which it names by their index: what an attach sends, and
/// what a VM is started with.
#[derive(Debug)]
pub struct OpenDevice {
    device: Device,
    files: Vec<OwnedFd>,
}

impl OpenDevice {
    /// A disk of `extents`, each a file with offset and length in bytes.
    pub fn disk(serial: &str, read_only: bool, extents: Vec<(OwnedFd, u64, u64)>) -> Self {
        let mut files = Vec::with_capacity(extents.len());
        let extents = (0..)
            .zip(extents)
            .map(|(index, (file, offset, length))| {
                files.push(file);
                Extent {
                    file: Fd(index),
                    offset,
                    length,
                }
            })
            .collect();
        let device = Device::Block(Block {
            serial: serial.to_owned(),
            read_only,
            extents,
        });
        Self { device, files }
    }

    /// A network interface on the queues of a tap, of which there is one at least; see [`Net`].
    pub fn net(taps: Vec<OwnedFd>, mac: [u8; 6], mtu: u16) -> Self {
        Self {
            device: Device::Net(Net {
                tap: Fd(0),
                more_taps: (1..).zip(taps.iter().skip(1)).map(|(i, _)| Fd(i)).collect(),
                mac,
                mtu,
            }),
            files: taps,
        }
    }

    /// The description, for [`crate::control::Action::Attach`].
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The files, to be sent along in this order.
    pub fn files(&self) -> &[OwnedFd] {
        &self.files
    }

    /// The description with the files' numbers in a process that inherits them from `first` on.
    fn inherited_from(&self, first: i32) -> Device {
        let mut device = self.device.clone();
        match &mut device {
            Device::Block(block) => {
                block
                    .extents
                    .iter_mut()
                    .for_each(|extent| extent.file.0 += first);
            }
            Device::Net(net) => {
                net.tap.0 += first;
                net.more_taps.iter_mut().for_each(|tap| tap.0 += first);
            }
        }
        device
    }
}

/// A VM to be started. The fields are those of [`VmConfig`], with open files in place of numbers.
#[derive(Debug)]
pub struct Launch {
    /// The `bulkhead-vmm` binary.
    pub program: PathBuf,
    /// The pod's id.
    pub id: String,
    /// `/dev/kvm`, opened to read and write.
    pub kvm: OwnedFd,
    /// The kernel.
    pub kernel: OwnedFd,
    /// The initramfs.
    pub initramfs: Option<OwnedFd>,
    /// The kernel's command line.
    pub command_line: String,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// vCPUs.
    pub vcpus: u8,
    /// The guest's vsock address.
    pub guest_cid: u32,
    /// What [`crate::Control::listen`] made.
    pub control: OwnedFd,
    /// An empty file, opened to read and write; keep a copy and read it by
    /// [`crate::ExitRecord::read`].
    pub exit_record: OwnedFd,
    /// Where the guest's console also goes.
    pub console: Option<OwnedFd>,
    /// The devices present at boot.
    pub devices: Vec<OpenDevice>,
    /// The open `cgroup.procs` of the cgroup that the VMM shall enter before it does anything else.
    pub cgroup_procs: Option<OwnedFd>,
    /// Where the VMM's own messages go; nowhere if `None`.
    pub messages: Option<OwnedFd>,
}

/// Why a VMM was not started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The description breaks a rule.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The program could not be run.
    #[error("The VMM {program} of pod {id} could not be started while {step}: {source}")]
    Start {
        /// The pod.
        id: String,
        /// The binary.
        program: PathBuf,
        /// What was being done.
        step: &'static str,
        /// The system's error.
        source: std::io::Error,
    },
}

/// A VMM that was started by this process. It runs on when this value is dropped.
#[derive(Debug)]
pub struct Vmm {
    pid: Pid,
    pidfd: OwnedFd,
    /// Once it was waited for.
    status: Option<ExitStatus>,
}

impl Launch {
    /// Starts the VMM. The files are closed here; the VMM has its own copies.
    pub fn spawn(mut self) -> Result<Vmm, LaunchError> {
        let (id, path) = (self.id.clone(), self.program.clone());
        let failed = |step| {
            let (id, program) = (id.clone(), path.clone());
            move |source: std::io::Error| LaunchError::Start {
                id,
                program,
                step,
                source,
            }
        };
        let program = CString::new(path.as_os_str().as_bytes())
            .map_err(|error| failed("executing it")(error.into()))?;
        let nothing = File::options().read(true).write(true).open("/dev/null");
        let nothing = OwnedFd::from(nothing.map_err(failed("opening /dev/null"))?);
        let messages = self.messages.take();
        let (config, files) = self.describe();
        config.validate()?;
        let config = sealed(&config).map_err(failed("writing its configuration"))?;

        // Above all numbers that are given out, so that none is overwritten before it is used.
        let last = CONFIG_FD + 1 + i32::try_from(files.len()).unwrap_or(i32::MAX - CONFIG_FD - 1);
        let above = |file: &OwnedFd| {
            let copy = rustix::io::fcntl_dupfd_cloexec(file, last);
            copy.map_err(|error| failed("copying a descriptor")(error.into()))
        };
        let mut placed = vec![(above(&nothing)?, 0), (above(&nothing)?, 1)];
        placed.push((above(messages.as_ref().unwrap_or(&nothing))?, 2));
        for (number, file) in (CONFIG_FD..).zip(std::iter::once(&config).chain(&files)) {
            placed.push((above(file)?, number));
        }
        let pid = sys::spawn(&program, &placed).map_err(failed("executing it"))?;
        // A child stays on the table of processes until it is waited for, so this is it.
        let process = Pid::from_raw(pid).ok_or(Errno::SRCH).and_then(|pid| {
            let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK)?;
            Ok(Vmm {
                pid,
                pidfd,
                status: None,
            })
        });
        process.map_err(|error| failed("opening its pidfd")(error.into()))
    }

    /// The configuration, and the files in the order of their numbers in it.
    fn describe(self) -> (VmConfig, Vec<OwnedFd>) {
        let mut files = Vec::new();
        let mut number = CONFIG_FD;
        let mut place = |file: OwnedFd| {
            files.push(file);
            number += 1;
            Fd(number)
        };
        let mut config = VmConfig {
            version: VERSION,
            id: self.id,
            kvm: place(self.kvm),
            kernel: place(self.kernel),
            initramfs: self.initramfs.map(&mut place),
            command_line: self.command_line,
            memory_mib: self.memory_mib,
            vcpus: self.vcpus,
            guest_cid: self.guest_cid,
            control: place(self.control),
            exit_record: place(self.exit_record),
            console: self.console.map(&mut place),
            cgroup_procs: self.cgroup_procs.map(&mut place),
            devices: Vec::new(),
        };
        for device in self.devices {
            config.devices.push(device.inherited_from(number + 1));
            number += i32::try_from(device.files.len()).unwrap_or(0);
            files.extend(device.files);
        }
        (config, files)
    }
}

impl Vmm {
    /// The process's id.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Becomes readable when the process has ended; then call [`Vmm::wait`], which takes the
    /// process off the table.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Waits for the process to end.
    pub fn wait(&mut self) -> std::io::Result<ExitStatus> {
        loop {
            if let Some(status) = self.reap(WaitOptions::empty())? {
                return Ok(status);
            }
        }
    }

    /// How the process ended; `None` while it runs.
    pub fn try_wait(&mut self) -> std::io::Result<Option<ExitStatus>> {
        self.reap(WaitOptions::NOHANG)
    }

    /// Kills the process; nothing is flushed and no record is written.
    pub fn kill(&mut self) -> std::io::Result<()> {
        match rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// After the first success the number may be another process's.
    fn reap(&mut self, options: WaitOptions) -> std::io::Result<Option<ExitStatus>> {
        if self.status.is_none() {
            let ended = match rustix::process::waitpid(Some(self.pid), options) {
                Err(Errno::INTR) => None,
                ended => ended?,
            };
            self.status = ended.map(|(_, status)| ExitStatus::from_raw(status.as_raw()));
        }
        Ok(self.status)
    }
}

/// Seals make sure that the VMM reads what was validated.
fn sealed(config: &VmConfig) -> std::io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = File::from(rustix::fs::memfd_create("vm-config", flags)?);
    file.write_all(&serde_json::to_vec(config)?)?;
    file.rewind()?;
    let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals)?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A "VMM" that copies what it inherited as configuration and as kernel to its exit record.
    const PROGRAM: &str = "#!/bin/sh\ncat <&3 >&8; cat <&5 >&8; cat <&9 >&8\n";

    #[test]
    fn the_program_inherits_every_file_under_its_number() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            std::fs::write(directory.path().join(name), text).unwrap();
            OwnedFd::from(File::open(directory.path().join(name)).unwrap())
        };
        let program = directory.path().join("vmm");
        std::fs::write(&program, PROGRAM).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).unwrap();
        let record = directory.path().join("record");
        let launch = Launch {
            program,
            id: "pod".into(),
            kvm: file("kvm", ""),
            kernel: file("kernel", "KERNEL"),
            initramfs: Some(file("initramfs", "")),
            command_line: String::new(),
            memory_mib: 64,
            vcpus: 1,
            guest_cid: 3,
            control: file("control", ""),
            exit_record: File::create(&record).unwrap().into(),
            console: None,
            devices: vec![OpenDevice::disk(
                "d",
                true,
                vec![(file("disk", "DISK"), 0, 512)],
            )],
            cgroup_procs: None,
            messages: None,
        };
        assert!(launch.spawn().unwrap().wait().unwrap().success());
        let text = std::fs::read_to_string(record).unwrap();
        let config = text.strip_suffix("KERNELDISK").unwrap();
        let config = VmConfig::parse(config.as_bytes()).unwrap();
        let Device::Block(block) = &config.devices[0] else {
            unreachable!()
        };
        assert_eq!(block.extents[0].file, Fd(9));
    }
}

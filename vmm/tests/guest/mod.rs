//! Guests for the boot tests: a kernel, busybox and a script as init.
//!
//! `BULKHEAD_BIN_DIR` names the directory with `vmlinux`, and `bulkhead-vmm` where the one that
//! cargo built with the tests is not wanted; `busybox` has to be installed and static.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by them

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use bulkhead_vmm_api::{Control, ExitRecord, Launch, OpenDevice, Vmm};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{MemfdFlags, OFlags};

/// A guest in a nested machine without hardware support is slow; one that hangs shall be noticed.
const PATIENCE: Duration = Duration::from_secs(90);

/// What every script begins with.
const PRELUDE: &str = "#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
exec </dev/console >/dev/console 2>&1
mount -t proc proc /proc
mount -t sysfs sys /sys
drivers=/sys/bus/platform/drivers/virtio-mmio
";

/// A guest to be started.
pub struct Setup {
    /// What init does.
    pub script: &'static str,
    /// MiB.
    pub memory: u32,
    pub vcpus: u8,
    pub command_line: &'static str,
    pub devices: Vec<OpenDevice>,
    /// In place of the kernel.
    pub kernel: Option<File>,
    /// The `cgroup.procs` of a cgroup.
    pub cgroup: Option<File>,
}

impl Setup {
    /// A small guest that runs `script`.
    pub fn new(script: &'static str) -> Self {
        Self {
            script,
            memory: 128,
            vcpus: 1,
            command_line: "quiet",
            devices: Vec::new(),
            kernel: None,
            cgroup: None,
        }
    }

    /// Starts the VMM.
    pub fn start(self) -> Guest {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("control.sock");
        let record = rustix::fs::memfd_create("record", MemfdFlags::CLOEXEC).unwrap();
        let (console, output) = std::io::pipe().unwrap();
        rustix::fs::fcntl_setfl(&output, OFlags::NONBLOCK).unwrap();
        let kernel = self.kernel.unwrap_or_else(|| open(&asset("vmlinux")));
        let launch = Launch {
            program: program(),
            id: "test".into(),
            kvm: File::options()
                .read(true)
                .write(true)
                .open("/dev/kvm")
                .expect("the boot tests need /dev/kvm")
                .into(),
            kernel: kernel.into(),
            initramfs: Some(initramfs(self.script)),
            command_line: self.command_line.into(),
            memory_mib: self.memory,
            vcpus: self.vcpus,
            guest_cid: 3,
            control: Control::listen(&socket).unwrap(),
            exit_record: record.try_clone().unwrap(),
            console: Some(output.into()),
            devices: self.devices,
            cgroup_procs: self.cgroup.map(OwnedFd::from),
            messages: Some(std::io::stderr().as_fd().try_clone_to_owned().unwrap()),
        };
        let vmm = launch.spawn().unwrap();
        let console = File::from(OwnedFd::from(console));
        Guest {
            vmm,
            record,
            console,
            shown: String::new(),
            read: 0,
            socket,
            _directory: directory,
        }
    }
}

/// A guest that runs. It is killed when dropped.
pub struct Guest {
    pub vmm: Vmm,
    record: OwnedFd,
    console: File,
    shown: String,
    /// How much of `shown` was waited for.
    read: usize,
    socket: PathBuf,
    /// Holds the socket.
    _directory: tempfile::TempDir,
}

impl Guest {
    /// Connects to the VMM.
    pub fn control(&self) -> Control {
        Control::connect(&self.socket).unwrap()
    }

    /// Waits for the next line that starts with `mark`, and gives what follows it.
    pub fn line(&mut self, mark: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            while let Some(length) = self.shown[self.read..].find('\n') {
                let line = self.shown[self.read..][..length].trim_end().to_owned();
                self.read += length + 1;
                if let Some(rest) = line.strip_prefix(mark) {
                    return rest.trim().to_owned();
                }
            }
            let mut polled = [PollFd::new(&self.console, PollFlags::IN)];
            let left = end.saturating_duration_since(Instant::now());
            let ready = rustix::event::poll(&mut polled, Some(&left.try_into().unwrap())).unwrap();
            let mut bytes = [0; 4096];
            let count = if ready > 0 {
                self.console.read(&mut bytes).unwrap()
            } else {
                0
            };
            let why = if ready > 0 {
                "the VM ended"
            } else {
                "time is up"
            };
            assert!(
                count > 0,
                "{why} before the line {mark:?}; the console:\n{}",
                self.shown
            );
            self.shown
                .push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
    }

    /// Waits for the VMM's end.
    pub fn end(&mut self) -> (ExitStatus, ExitRecord) {
        let mut polled = [PollFd::from_borrowed_fd(self.vmm.pidfd(), PollFlags::IN)];
        let limit = PATIENCE.try_into().unwrap();
        let ready = rustix::event::poll(&mut polled, Some(&limit)).unwrap();
        assert!(
            ready > 0,
            "the VMM did not end; the console:\n{}",
            self.shown
        );
        let status = self.vmm.wait().unwrap();
        (status, self.record().expect("a record"))
    }

    /// The record, if there is one.
    pub fn record(&self) -> Option<ExitRecord> {
        ExitRecord::read(&self.record).unwrap()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.vmm.kill();
        let _ = self.vmm.wait();
    }
}

/// A disk's file with `bytes`.
pub fn disk_file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// The MD5 sum as busybox prints it.
pub fn md5(bytes: &[u8]) -> String {
    let mut child = Command::new("busybox")
        .arg("md5sum")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("the boot tests need busybox");
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap()[..32].to_owned()
}

fn program() -> PathBuf {
    let given = std::env::var_os("BULKHEAD_BIN_DIR").map(PathBuf::from);
    let built = PathBuf::from(env!("CARGO_BIN_EXE_bulkhead-vmm"));
    given
        .map(|given| given.join("bulkhead-vmm"))
        .filter(|given| given.exists())
        .unwrap_or(built)
}

fn asset(name: &str) -> PathBuf {
    let directory = std::env::var_os("BULKHEAD_BIN_DIR")
        .expect("BULKHEAD_BIN_DIR names the directory with vmlinux");
    PathBuf::from(directory).join(name)
}

fn open(path: &Path) -> File {
    File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// An initramfs with busybox and `script` (kernel: Documentation/driver-api/early-userspace).
fn initramfs(script: &str) -> OwnedFd {
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .find_map(|p| std::fs::read(p).ok());
    let busybox = busybox.expect("the boot tests need Debian's busybox-static");
    let script = format!("{PRELUDE}{script}\nreboot -f\n");
    let (directory, program) = (0o040_755, 0o100_755);
    let mut archive = Vec::new();
    for name in ["bin", "dev", "proc", "sys", "mnt"] {
        entry(&mut archive, name, directory, &[]);
    }
    entry(&mut archive, "bin/busybox", program, &busybox);
    entry(&mut archive, "init", program, script.as_bytes());
    entry(&mut archive, "TRAILER!!!", 0, &[]);
    let mut file = File::from(rustix::fs::memfd_create("initramfs", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(&archive).unwrap();
    file.into()
}

/// One member of a cpio archive in the "newc" format.
fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, bytes: &[u8]) {
    let (length, name_length) = (bytes.len(), name.len() + 1);
    let inode = archive.len() + 1;
    let head = format!(
        "070701{inode:08x}{mode:08x}{:08x}{:08x}{:08x}{:08x}{length:08x}{:08x}{:08x}{:08x}{:08x}{name_length:08x}{:08x}{name}\0",
        0, 0, 1, 0, 0, 0, 0, 0, 0
    );
    for part in [head.as_bytes(), bytes] {
        archive.extend(part);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
}

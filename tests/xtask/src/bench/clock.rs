//! Runs of the clocks, the programs that measure, in the bed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::table::Figures;
use crate::artefacts::{self, Profile, cargo};
use crate::bed::{self, Job, Outcome};
use crate::cpio::Archive;
use crate::{assets, packages, place, process};

/// Runs of each kind that count; one more warms up.
pub const RUNS: u32 = 5;

/// The same of the network's clock, whose runs are long, and whose counters hardly differ.
pub const NETWORK_RUNS: u32 = 3;

/// How long a clock may run.
const LIMIT: Duration = Duration::from_secs(1200);

/// What the VMs' clock needs beside its directory.
const VM_FILES: &[&str] = &[
    "/usr/bin/qemu-system-x86_64",
    "/usr/share/qemu",
    "/usr/share/seabios",
];

/// What the pods' clock needs beside its directory, the artefacts and the images: what the servers
/// and the harness start.
const POD_FILES: &[&str] = &[
    "/etc/group",
    "/etc/hosts",
    "/etc/mke2fs.conf",
    "/etc/passwd",
    "/etc/resolv.conf",
    "/usr/bin/ip",
    "/usr/bin/containerd",
    "/usr/bin/containerd-shim-runc-v2",
    "/usr/bin/docker-registry",
    "/usr/bin/mount",
    "/usr/bin/umount",
    "/usr/lib/cni/bridge",
    "/usr/lib/cni/host-local",
    "/usr/lib/cni/loopback",
    "/usr/sbin/mke2fs",
    "/usr/sbin/nft",
    "/usr/sbin/runc",
];

/// Everything that is measured.
pub struct Clocks {
    /// What a pod needs, as shipped.
    pub artefacts: PathBuf,
    images: PathBuf,
    directory: PathBuf,
}

impl Clocks {
    /// Builds and installs what is missing. The VMs alone boot `kernel`, or else the product's.
    pub fn prepare(kernel: Option<&Path>) -> Result<Self> {
        let artefacts = artefacts::build(Profile::Release, None)?;
        for packages in [
            &["gcc", "libc6-dev"],
            assets::PACKAGES,
            assets::REFERENCE_PACKAGES,
        ] {
            packages::install("the benchmark", packages)?;
        }
        peer()?;
        let images = assets::prepare()?;
        eprintln!("bench: building the clocks");
        process::run(cargo().args([
            "build",
            "--quiet",
            "--release",
            "--package",
            "bulkhead-tests",
            "--bin",
            "start-clock",
            "--bin",
            "pod-clock",
            "--bin",
            "net-clock",
        ]))?;
        let directory = place::target().join("bench");
        fs::create_dir_all(&directory)?;
        let vmm = artefacts.join("bulkhead-vmm");
        let product = artefacts.join("vmlinux");
        for (file, name) in [
            (&*vmm, "bulkhead-vmm"),
            (kernel.unwrap_or(&product), "vmlinux"),
        ] {
            fs::copy(file, directory.join(name)).with_context(|| file.display().to_string())?;
        }
        guests(&directory)?;
        Ok(Self {
            artefacts,
            images,
            directory,
        })
    }

    /// How the VMM and QEMU start a VM.
    pub fn vms(&self, time: bed::Clock) -> Result<Figures> {
        let directory = text(&self.directory)?;
        let files = [VM_FILES, &[directory]].concat();
        self.run("start-clock", RUNS, &[directory], &files, Vec::new(), time)
    }

    /// How this project's server and the reference start a pod.
    pub fn pods(&self, time: bed::Clock) -> Result<Figures> {
        let (artefacts, images) = (text(&self.artefacts)?, text(&self.images)?);
        let files = [POD_FILES, &[artefacts, images]].concat();
        let environment = [
            ("BULKHEAD_BIN_DIR", artefacts),
            ("BULKHEAD_TEST_ASSETS", images),
        ];
        let environment = environment.map(|(name, value)| (name.to_owned(), value.to_owned()));
        self.run("pod-clock", RUNS, &[], &files, environment.into(), time)
    }

    /// How frames pass: VMs alone, and pods of both servers.
    pub fn network(&self, time: bed::Clock) -> Result<Figures> {
        let (artefacts, images) = (text(&self.artefacts)?, text(&self.images)?);
        let directory = text(&self.directory)?;
        let own = &[directory, artefacts, images];
        let files = [VM_FILES, POD_FILES, own].concat();
        let environment = [
            ("BULKHEAD_BIN_DIR", artefacts),
            ("BULKHEAD_TEST_ASSETS", images),
        ];
        let environment = environment.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let arguments = [directory];
        let environment = environment.into();
        self.run(
            "net-clock",
            NETWORK_RUNS,
            &arguments,
            &files,
            environment,
            time,
        )
    }

    /// Runs a clock in the bed, everything it touches in memory.
    fn run(
        &self,
        clock: &str,
        runs: u32,
        arguments: &[&str],
        files: &[&str],
        environment: Vec<(String, String)>,
        time: bed::Clock,
    ) -> Result<Figures> {
        let program = place::target().join("release").join(clock);
        let ram_root = place::checkout().join("tests/perf/ram-root");
        let (program, runs) = (text(&program)?, runs.to_string());
        let command = [
            &["sh", text(&ram_root)?, program],
            files,
            &["--", program],
            arguments,
            &[&runs],
        ];
        let mut job = Job::new(command.concat().into_iter().map(str::to_owned).collect())?;
        let results = self.directory.join(format!("{clock}.json"));
        job.environment = environment;
        job.clock = time;
        job.time_limit = LIMIT;
        job.transcript = Some(results.clone());
        job.shown = false;
        let how = match time {
            bed::Clock::Instructions => "by the instruction clock",
            bed::Clock::Real => "in real time",
        };
        eprintln!("bench: {clock}, {how}");
        match job.run()? {
            Outcome::Exited(0) => read(&results),
            Outcome::Exited(status) => bail!("{clock} failed with status {status}"),
            Outcome::Failed(why) | Outcome::Down(why) => bail!("the bed failed: {why}"),
        }
    }
}

/// Makes the guests that only say READY: a "kernel" and an initramfs.
fn guests(directory: &Path) -> Result<()> {
    let sources = place::checkout().join("tests/perf");
    let gcc = |source: &str, result: &str, options: &[&str]| {
        process::capture(
            Command::new("gcc")
                .args(["-Os", "-static", "-s", "-o"])
                .arg(directory.join(result))
                .arg(sources.join(source))
                .args(options),
        )
    };
    let place = "-Wl,-Ttext=0x1000000,-n,--build-id=none,--no-warn-rwx-segments";
    gcc("first.s", "first", &["-nostdlib", place])?;
    gcc("ready.c", "init", &[])?;
    gcc("net.c", "net", &[])?;
    for (program, result) in [("init", "ready"), ("net", "net-init")] {
        initramfs(directory, program, result)?;
    }
    Ok(())
}

/// Makes an initramfs whose init is `program`.
fn initramfs(directory: &Path, program: &str, result: &str) -> Result<()> {
    let mut initramfs = Archive::new();
    initramfs.directory("dev", 0o755);
    initramfs.character_device("dev/console", 0o600, 5, 1);
    initramfs.directory("proc", 0o755);
    initramfs.file("init", 0o755, &fs::read(directory.join(program))?);
    fs::write(directory.join(result), initramfs.finish())?;
    Ok(())
}

fn read(results: &Path) -> Result<Figures> {
    let bytes = fs::read(results)?;
    serde_json::from_slice(&bytes).context("the clock's figures are not understood")
}

fn text(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("{} is not text", path.display()))
}

/// Installs the QEMU that the VMM is measured beside: Debian 12's own is too old a one.
fn peer() -> Result<()> {
    let names = [
        "qemu-system-x86",
        "qemu-system-common",
        "qemu-system-data",
        "seabios",
    ];
    if names.iter().any(|name| !packages::installed(name)) {
        packages::backports()?;
    }
    let pinned = names.map(|name| format!("{name}/{}", packages::BACKPORTS));
    packages::install("the benchmark", &pinned.each_ref().map(String::as_str))
}

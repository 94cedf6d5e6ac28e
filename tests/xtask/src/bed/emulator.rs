//! The emulator: QEMU out of Debian 13's backports, with everything it is linked with.
//!
//! QEMU before 10.2 changes a CPU's set of pending interrupts without a lock where it enters and
//! leaves a nested guest. One that another thread adds at that moment is lost or repeated: guests
//! stand still. What Debian 12 offers, backports included, is older; so the newer one is unpacked,
//! never installed, and runs with its own C library. One more fault is mended by `tests/bed/vmrun.c`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::{packages, place, process};

const SUITE: &str = "trixie";

/// An unpacked QEMU.
pub struct Emulator {
    root: PathBuf,
    /// `tests/bed/vmrun.c`, compiled.
    mend: PathBuf,
}

impl Emulator {
    /// Finds it in `cache`, or fetches it there.
    pub fn prepare(cache: &Path) -> Result<Self> {
        let root = cache.join("qemu");
        if !root.exists() {
            fetch(cache, &root).context("cannot fetch QEMU 10.2 or newer")?;
        }
        // Replaced in one step: other beds may have it loaded.
        let (fresh, mend) = (cache.join("vmrun.so.new"), cache.join("vmrun.so"));
        process::capture(
            Command::new("cc")
                .args(["-shared", "-fPIC", "-O2", "-Wall", "-o"])
                .args([&fresh, &place::checkout().join("tests/bed/vmrun.c")]),
        )?;
        fs::rename(fresh, &mend)?;
        Ok(Self { root, mend })
    }

    /// The words that start it, the machine's own options to be added.
    pub fn command(&self) -> Vec<String> {
        let path = |name: &str| self.root.join(name).display().to_string();
        vec![
            path("usr/lib64/ld-linux-x86-64.so.2"),
            "--preload".to_owned(),
            self.mend.display().to_string(),
            "--library-path".to_owned(),
            path("usr/lib/x86_64-linux-gnu"),
            path("usr/bin/qemu-system-x86_64"),
            "-L".to_owned(),
            path("usr/share/qemu"),
            "-L".to_owned(),
            path("usr/share/seabios"),
        ]
    }
}

/// Unpacks the packages at `target`, in one step. apt resolves them for a system where nothing is
/// installed, with lists and a state of its own.
fn fetch(cache: &Path, target: &Path) -> Result<()> {
    let mirror = packages::mirror()?;
    let partial = cache.join("partial");
    if partial.exists() {
        fs::remove_dir_all(&partial)?;
    }
    let (apt, root) = (partial.join("apt"), partial.join("root"));
    for directory in [
        "etc/apt",
        "var/lib/apt/lists/partial",
        "var/lib/dpkg",
        "var/cache/apt/archives/partial",
    ] {
        fs::create_dir_all(apt.join(directory))?;
    }
    fs::create_dir_all(&root)?;
    fs::write(apt.join("var/lib/dpkg/status"), "")?;
    fs::write(
        apt.join("etc/apt/sources.list"),
        [SUITE, &format!("{SUITE}-backports")]
            .map(|suite| {
                format!(
                    "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] \
                     {mirror} {suite} main\n"
                )
            })
            .concat(),
    )?;
    let apart = || {
        let mut command = Command::new("apt-get");
        command
            .args(["-qq", "-o", &format!("Dir={}", apt.display())])
            .args([
                "-o",
                &format!(
                    "Dir::State::status={}",
                    apt.join("var/lib/dpkg/status").display()
                ),
            ])
            // As root apt would hand downloads to a user who may not write there.
            .args(["-o", "APT::Sandbox::User=root"]);
        command
    };
    eprintln!("bed: fetching QEMU from {SUITE}-backports");
    process::capture(apart().arg("update"))?;
    let names = [
        "qemu-system-x86",
        "qemu-system-common",
        "qemu-system-data",
        "seabios",
    ];
    process::capture(
        apart()
            .args([
                "install",
                "--download-only",
                "--yes",
                "--no-install-recommends",
            ])
            .args(names.map(|name| format!("{name}/{SUITE}-backports"))),
    )?;
    for entry in fs::read_dir(apt.join("var/cache/apt/archives"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            process::capture(Command::new("dpkg").arg("-x").arg(&path).arg(&root))?;
        }
    }
    fs::rename(&root, target)
        .with_context(|| format!("cannot put QEMU at {}", target.display()))?;
    fs::remove_dir_all(&partial)?;
    Ok(())
}

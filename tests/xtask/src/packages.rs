//! Debian packages a task needs: said aloud, and skipped when they are there.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process;

/// Makes sure that `packages` are installed. A name may carry a release: `seabios/bookworm-backports`.
/// `purpose` ends the sentence "installing … for …".
pub fn install(purpose: &str, packages: &[&str]) -> Result<()> {
    let missing: Vec<&str> = packages
        .iter()
        .copied()
        .filter(|name| !installed(name.split('/').next().unwrap_or(name)))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    if !root() {
        bail!(
            "{purpose} needs Debian packages that are not installed; run as root: \
             apt-get install --no-install-recommends {names}"
        );
    }
    eprintln!("packages: installing {names} for {purpose}");
    update()?;
    apt(&[
        &["install", "--yes", "--no-install-recommends"],
        missing.as_slice(),
    ]
    .concat())
}

/// Whether the package `name` is installed.
pub fn installed(name: &str) -> bool {
    process::capture_text(Command::new("dpkg-query").args([
        "-W",
        "-f",
        "${db:Status-Status}",
        name,
    ]))
    .is_ok_and(|status| status == "installed")
}

/// The version of the installed package `name`.
pub fn version(name: &str) -> Result<String> {
    process::capture_text(Command::new("dpkg-query").args(["-W", "-f", "${Version}", name]))
}

/// Refreshes apt's lists.
pub fn update() -> Result<()> {
    apt(&["update"])
}

/// Downloads the package file of `package` (a name, or `name=version`) into `directory`.
pub fn download(package: &str, directory: &Path) -> Result<()> {
    // As root apt would hand the download to a user who may not write there.
    process::capture(
        Command::new("apt-get")
            .args(["-qq", "-o", "APT::Sandbox::User=root", "download", package])
            .current_dir(directory),
    )
    .with_context(|| format!("cannot download the package {package}"))?;
    Ok(())
}

/// Runs apt-get without questions; its output appears only if it fails.
fn apt(arguments: &[&str]) -> Result<()> {
    process::capture(
        Command::new("apt-get")
            .arg("-qq")
            .args(arguments)
            .env("DEBIAN_FRONTEND", "noninteractive"),
    )?;
    Ok(())
}

/// Whether this process is root.
pub fn root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

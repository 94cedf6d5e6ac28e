//! Debian packages a task needs: said aloud, and skipped when they are there.

use std::fs;
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

/// The release of Debian this project is built and tested on.
const SYSTEM: &str = "bookworm";

/// What it offers of later releases.
pub const BACKPORTS: &str = "bookworm-backports";
const SOURCES: &str = "/etc/apt/sources.list.d/bulkhead-bed.sources";
const PREFERENCES: &str = "/etc/apt/preferences.d/bulkhead-bed";

/// Adds bookworm-backports from the mirror already in use, pinned so low that nothing comes from
/// there unless asked for by name.
pub fn backports() -> Result<()> {
    if mirror_of(BACKPORTS)?.is_none() {
        let mirror = mirror()?;
        eprintln!("packages: adding {BACKPORTS} in {SOURCES}, pinned low in {PREFERENCES}");
        fs::write(
            SOURCES,
            format!(
                "Types: deb\nURIs: {mirror}\nSuites: {BACKPORTS}\nComponents: main\n\
                 Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
            ),
        )?;
        fs::write(
            PREFERENCES,
            format!("Package: *\nPin: release n={BACKPORTS}\nPin-Priority: 60\n"),
        )?;
    }
    update()
}

/// The address of the Debian mirror in use.
pub fn mirror() -> Result<String> {
    mirror_of(SYSTEM)?
        .context("this is not Debian 12 (bookworm), the only system the bed is made for")
}

fn mirror_of(codename: &str) -> Result<Option<String>> {
    let targets = process::capture_text(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(CODENAME) $(REPO_URI)",
        "Created-By: Packages",
    ]))?;
    let found = targets
        .lines()
        .find_map(|line| line.strip_prefix(codename)?.strip_prefix(' '));
    Ok(found.map(str::to_owned))
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

//! What the end-to-end tests and the demo need beside the artefacts: OCI images made on the spot.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::{packages, place, process};

/// Packages the end-to-end tests use on the machine they run on.
pub const PACKAGES: &[&str] = &[
    "busybox-static",
    "containernetworking-plugins",
    "iptables",
    "docker-registry",
    "erofs-utils",
    "openssl",
    "e2fsprogs",
    "iproute2",
    "nftables",
    "python3-kubernetes",
    // What the images are made of and with.
    "bash-static",
    "busybox-static",
    "containernetworking-plugins",
    "iptables",
    "libcap2-bin",
    "mmdebstrap",
    "skopeo",
    "umoci",
];

/// Packages of the reference runtime.
pub const REFERENCE_PACKAGES: &[&str] = &["containerd", "runc"];

/// Makes the images the tests use, if the cache does not have them; the directory they are in.
pub fn prepare() -> Result<PathBuf> {
    let script = place::checkout().join("images/build.sh");
    let printed = process::capture_loud(&mut Command::new(script))?;
    Ok(PathBuf::from(String::from_utf8(printed)?.trim_end()))
}

/// kubectl of Debian's kubernetes-client, unpacked beside what is installed: other packages of
/// kubectl are in its way.
pub fn kubectl() -> Result<PathBuf> {
    let cache = place::cache("kubectl")?;
    let program = cache.join("kubectl");
    if program.is_file() {
        return Ok(program);
    }
    let work = cache.join("work");
    drop(fs::remove_dir_all(&work));
    fs::create_dir(&work)?;
    packages::download("kubernetes-client", &work)?;
    let package = fs::read_dir(&work)?.next();
    let package = package.context("apt-get has downloaded nothing")??;
    process::capture(
        Command::new("dpkg-deb")
            .arg("-x")
            .arg(package.path())
            .arg(&work),
    )?;
    fs::rename(work.join("usr/bin/kubectl"), &program)?;
    fs::remove_dir_all(&work)?;
    Ok(program)
}

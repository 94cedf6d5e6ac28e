//! What the end-to-end tests and the demo need beside the artefacts: OCI images made on the spot.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::{place, process};

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

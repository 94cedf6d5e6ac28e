//! `cargo xtask build`: everything a pod needs, side by side in one directory.
//!
//! The server finds its VMM, kernel and initramfs beside its own executable.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::cpio::Archive;
use crate::{kernel, packages, place, process};

/// The only target, named where programs are linked statically.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Arguments of `cargo xtask build`.
#[derive(Args)]
pub struct Arguments {
    /// Optimise the server and the VMM too; the agent always is
    #[arg(long)]
    release: bool,
    /// Use this kernel source tree instead of Debian's linux-source-6.12
    #[arg(long, value_name = "DIR")]
    kernel_source: Option<PathBuf>,
}

/// How the server and the VMM are compiled.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// Quick to compile.
    Development,
    /// As shipped.
    Release,
}

impl Profile {
    fn apply(self, cargo: &mut Command) -> &mut Command {
        match self {
            Self::Development => cargo,
            Self::Release => cargo.arg("--release"),
        }
    }

    /// Where cargo puts what it builds.
    fn directory(self) -> &'static str {
        match self {
            Self::Development => "debug",
            Self::Release => "release",
        }
    }
}

/// `cargo xtask build`.
pub fn command(arguments: &Arguments) -> Result<ExitCode> {
    let profile = if arguments.release {
        Profile::Release
    } else {
        Profile::Development
    };
    println!(
        "{}",
        build(profile, arguments.kernel_source.as_deref())?.display()
    );
    Ok(ExitCode::SUCCESS)
}

/// Builds all artefacts and returns the directory they are in.
pub fn build(profile: Profile, kernel_source: Option<&Path>) -> Result<PathBuf> {
    packages::install("building", &["gcc", "libc6-dev"])?;
    let target = place::target();
    let directory = target.join("bulkhead");
    fs::create_dir_all(&directory)?;

    eprintln!("build: server");
    let mut cargo = cargo();
    cargo.args(["build", "--package", "bulkhead"]);
    process::run(profile.apply(&mut cargo))?;
    let server = target.join(profile.directory()).join("bulkhead");
    put(&server, &directory.join("bulkhead"))?;
    put(&vmm(&target, profile)?, &directory.join("bulkhead-vmm"))?;

    let agent = agent()?;
    let initramfs = initramfs(&agent)?;
    let partial = directory.join("initramfs.partial");
    fs::write(&partial, initramfs)?;
    fs::rename(partial, directory.join("initramfs"))?;

    put(&kernel::elf(kernel_source)?, &directory.join("vmlinux"))?;
    Ok(directory)
}

/// Builds the VMM and returns the path of its executable: static, because every pod starts one and
/// would link it anew; at a random address, because a guest may attack it.
fn vmm(target: &Path, profile: Profile) -> Result<PathBuf> {
    eprintln!("build: VMM");
    let own_target = target.join("vmm");
    let mut cargo = cargo();
    cargo.args(["build", "--package", "bulkhead-vmm", "--target", TARGET]);
    cargo.arg("--target-dir").arg(&own_target);
    cargo.env("RUSTFLAGS", "-C target-feature=+crt-static");
    process::run(profile.apply(&mut cargo))?;
    let built = own_target.join(TARGET).join(profile.directory());
    Ok(built.join("bulkhead-vmm"))
}

/// Builds the guest agent and returns the path of its executable: static, because it is alone in its
/// file system, and at a fixed address, because nothing would relocate it against an attacker who
/// knows the file. Its own target directory, so that the flags do not rebuild what others share.
fn agent() -> Result<PathBuf> {
    eprintln!("build: agent");
    process::run(
        cargo()
            .args([
                "build",
                "--profile",
                "guest",
                "--package",
                "bulkhead-agent",
                "--target",
                TARGET,
            ])
            .arg("--target-dir")
            .arg(agent_target())
            .env(
                "RUSTFLAGS",
                "-C target-feature=+crt-static -C relocation-model=static",
            ),
    )?;
    Ok(agent_executable())
}

/// Where the guest agent's executable is, once it is built.
pub fn agent_executable() -> PathBuf {
    let profile = agent_target().join(TARGET).join("guest");
    profile.join("bulkhead-agent")
}

fn agent_target() -> PathBuf {
    place::target().join("agent")
}

/// The initramfs of `images/initramfs` with `agent` in it.
fn initramfs(agent: &Path) -> Result<Vec<u8>> {
    let recipe = place::checkout().join("images/initramfs");
    let text =
        fs::read_to_string(&recipe).with_context(|| format!("cannot read {}", recipe.display()))?;
    pack(&text, |artefact| match artefact {
        "bulkhead-agent" => {
            fs::read(agent).with_context(|| format!("cannot read {}", agent.display()))
        }
        other => bail!("images/initramfs: no artefact is named {other}"),
    })
}

fn pack(recipe: &str, read: impl Fn(&str) -> Result<Vec<u8>>) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for line in recipe
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
    {
        let wrong = || format!("images/initramfs: not understood: {line}");
        let mode = |mode: &str| u32::from_str_radix(mode, 8).with_context(wrong);
        match line.split_whitespace().collect::<Vec<_>>().as_slice() {
            ["dir", path, bits] => archive.directory(path, mode(bits)?),
            ["dev", path, bits, major, minor] => archive.character_device(
                path,
                mode(bits)?,
                major.parse().with_context(wrong)?,
                minor.parse().with_context(wrong)?,
            ),
            ["file", path, bits, artefact] => archive.file(path, mode(bits)?, &read(artefact)?),
            _ => bail!(wrong()),
        }
    }
    Ok(archive.finish())
}

/// The cargo that runs this task, in the checkout.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or(OsString::from("cargo")));
    command.current_dir(place::checkout());
    command
}

/// Copies `from` to `to` in one step, so that a running program keeps its file.
fn put(from: &Path, to: &Path) -> Result<()> {
    let mut partial = to.as_os_str().to_owned();
    partial.push(".partial");
    fs::copy(from, &partial)
        .and_then(|_| fs::rename(&partial, to))
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

#[cfg(test)]
mod tests {
    use super::pack;

    #[test]
    fn the_checked_in_recipe_is_understood() {
        let recipe = include_str!("../../../images/initramfs");
        let archive = pack(recipe, |name| Ok(name.as_bytes().to_vec())).unwrap();
        let text = String::from_utf8_lossy(&archive);
        assert!(text.contains("init\0") && text.contains("bulkhead-agent"));
    }

    #[test]
    fn a_line_not_understood_is_named() {
        let error = pack("link a b\n", |_| Ok(Vec::new())).unwrap_err();
        assert!(error.to_string().contains("link a b"));
        assert!(pack("dir dev 9\n", |_| Ok(Vec::new())).is_err());
    }
}

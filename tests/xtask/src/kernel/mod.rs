//! The guest kernel: fragments in `kernel-config/` over `allnoconfig`, built into an uncompressed ELF.
//!
//! The result is cached by what it was made of: fragments, source and compiler.

mod fragments;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::Args;
use sha2::{Digest, Sha256};

use crate::{packages, place, process};
use fragments::Fragments;

/// Debian's package of the kernel's source.
const SOURCE_PACKAGE: &str = "linux-source-6.12";

/// What the kernel's own build needs beside its source.
const BUILD_PACKAGES: &[&str] = &[
    "gcc",
    "make",
    "flex",
    "bison",
    "bc",
    "libelf-dev",
    "libssl-dev",
    "xz-utils",
];

/// Arguments of `cargo xtask kernel`.
#[derive(Args)]
pub struct Arguments {
    /// Use this kernel source tree instead of Debian's linux-source-6.12
    #[arg(long, value_name = "DIR")]
    source: Option<PathBuf>,
    /// Only make the configuration and check that every option asked for is in it
    #[arg(long)]
    check: bool,
}

/// `cargo xtask kernel`.
pub fn command(arguments: &Arguments) -> Result<ExitCode> {
    let source = arguments.source.as_deref();
    if arguments.check {
        let recipe = Recipe::new(source)?;
        let directory = place::cache("kernel")?.join("check");
        let options = recipe.configure(&directory)?;
        eprintln!("kernel: all {options} options are as asked for");
        fs::remove_dir_all(&directory)?;
    } else {
        println!("{}", elf(source)?.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// The path of the guest kernel's ELF, built if the cache does not have it, from `source` or else
/// from Debian's.
pub fn elf(source: Option<&Path>) -> Result<PathBuf> {
    Recipe::new(source)?.obtain()
}

/// What the kernel is made of.
struct Recipe {
    source: Source,
    /// First line of `gcc --version`.
    compiler: String,
    fragments: Fragments,
}

enum Source {
    /// Debian's package in this version.
    Package(String),
    /// A tree somebody named, of this version.
    Tree(PathBuf, String),
}

impl Recipe {
    fn new(tree: Option<&Path>) -> Result<Self> {
        packages::install("building the guest kernel", BUILD_PACKAGES)?;
        let source = match tree {
            Some(tree) => {
                let tree = fs::canonicalize(tree)
                    .with_context(|| format!("no kernel source at {}", tree.display()))?;
                let version = process::capture_text(
                    Command::new("make")
                        .arg("-sC")
                        .arg(&tree)
                        .arg("kernelversion"),
                )?;
                Source::Tree(tree, version)
            }
            None => {
                packages::install("building the guest kernel", &[SOURCE_PACKAGE])?;
                Source::Package(packages::version(SOURCE_PACKAGE)?)
            }
        };
        let compiler = process::capture_text(Command::new("gcc").arg("--version"))?;
        Ok(Self {
            source,
            compiler: compiler.lines().next().unwrap_or_default().to_owned(),
            fragments: Fragments::read(&place::checkout().join("kernel-config"))?,
        })
    }

    /// The name of this recipe's result: a hash of everything it depends on.
    fn key(&self) -> String {
        let source = match &self.source {
            Source::Package(version) => format!("{SOURCE_PACKAGE} {version}"),
            Source::Tree(tree, version) => format!("{} {version}", tree.display()),
        };
        let mut hash = Sha256::new();
        for part in [source.as_str(), &self.compiler, &self.fragments.text()] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        hash.finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    fn obtain(&self) -> Result<PathBuf> {
        let cache = place::cache("kernel")?;
        let result = cache.join(self.key());
        let elf = result.join("vmlinux");
        if elf.exists() {
            return Ok(elf);
        }
        let lock = File::create(cache.join("lock"))?;
        lock.lock().context("cannot lock the kernel cache")?;
        if elf.exists() {
            return Ok(elf);
        }
        let build = cache.join("build");
        if build.exists() {
            fs::remove_dir_all(&build)?;
        }
        let options = self.configure(&build)?;
        let cpus = place::cpus();
        eprintln!("kernel: building with {options} options on {cpus} CPUs (some minutes)");
        process::capture(self.make(&build)?.arg(format!("-j{cpus}")).arg("vmlinux"))?;

        let partial = cache.join("partial");
        if partial.exists() {
            fs::remove_dir_all(&partial)?;
        }
        fs::create_dir(&partial)?;
        process::run(
            Command::new("strip")
                .arg("--strip-all")
                .arg("-o")
                .arg(partial.join("vmlinux"))
                .arg(build.join("vmlinux")),
        )?;
        for name in [".config", "System.map"] {
            fs::copy(build.join(name), partial.join(name))?;
        }
        fs::rename(&partial, &result)?;
        fs::remove_dir_all(&build)?;
        let size = fs::metadata(&elf)?.len();
        eprintln!("kernel: built, {:.1} MiB", size as f64 / f64::from(1 << 20));
        Ok(elf)
    }

    /// Makes `.config` in `directory` and checks it; returns how many options were asked for.
    fn configure(&self, directory: &Path) -> Result<usize> {
        fs::create_dir_all(directory)?;
        let wanted = directory.join("wanted.config");
        fs::write(&wanted, self.fragments.text())?;
        let mut variable = std::ffi::OsString::from("KCONFIG_ALLCONFIG=");
        variable.push(&wanted);
        process::capture(self.make(directory)?.arg(variable).arg("allnoconfig"))?;
        let config = fs::read_to_string(directory.join(".config"))?;
        let broken = self.fragments.broken_promises(&config);
        if !broken.is_empty() {
            bail!(
                "the kernel's configuration does not keep {} of the options asked for \
                 (a dependency is missing, or the option is gone):\n  {}",
                broken.len(),
                broken.join("\n  ")
            );
        }
        Ok(self.fragments.len())
    }

    /// make(1) for the kernel, building in `directory`, with nothing of this machine in the result.
    fn make(&self, directory: &Path) -> Result<Command> {
        let source = match &self.source {
            Source::Tree(tree, _) => tree.clone(),
            Source::Package(version) => unpacked(version)?,
        };
        let released = fs::metadata(source.join("Makefile"))
            .with_context(|| format!("{} is no kernel source", source.display()))?
            .mtime();
        let date = process::capture_text(
            Command::new("date")
                .args(["-u", "-d", &format!("@{released}")])
                .env("LC_ALL", "C"),
        )?;
        let mut make = Command::new("make");
        make.arg("-s").arg("-C").arg(&source).arg("ARCH=x86_64");
        let mut output = std::ffi::OsString::from("O=");
        output.push(directory);
        make.arg(output);
        make.env("KBUILD_BUILD_TIMESTAMP", date)
            .env("KBUILD_BUILD_VERSION", "1")
            .env("KBUILD_BUILD_USER", "bulkhead")
            .env("KBUILD_BUILD_HOST", "bulkhead")
            .env("LC_ALL", "C");
        Ok(make)
    }
}

/// The unpacked source of Debian's package in `version`.
fn unpacked(version: &str) -> Result<PathBuf> {
    let cache = place::cache("kernel")?;
    let tree = cache.join(format!("source-{version}"));
    if tree.exists() {
        return Ok(tree);
    }
    eprintln!("kernel: unpacking {SOURCE_PACKAGE} {version}");
    let partial = cache.join(format!("unpacking-{}", std::process::id()));
    fs::create_dir(&partial)?;
    process::capture(
        Command::new("tar")
            .arg("-xf")
            .arg(format!("/usr/src/{SOURCE_PACKAGE}.tar.xz"))
            .arg("--strip-components=1")
            .arg("-C")
            .arg(&partial),
    )?;
    if fs::rename(&partial, &tree).is_err() {
        // Somebody else was faster.
        fs::remove_dir_all(&partial)?;
    }
    Ok(tree)
}

//! `cargo xtask fuzz`: the fuzz targets, with libFuzzer and the compiler there is.

use std::fs;
use std::process::{Command, ExitCode};

use anyhow::{Result, ensure};
use clap::Args;

use crate::artefacts::cargo;
use crate::{packages, place, process};

/// What is fuzzed: programs of `cri-server/fuzz`.
const TARGETS: [&str; 4] = ["header", "layers", "spdy", "websocket"];
/// The only platform. Naming it keeps the flags from build scripts.
const PLATFORM: &str = "x86_64-unknown-linux-gnu";
/// What lets libFuzzer see which way the program goes. The code has no `unsafe`, so there is
/// nothing for sanitizers, which a stable compiler has not, to find.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Ccodegen-units=1 \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares";

/// Arguments of `cargo xtask fuzz`.
#[derive(Args)]
pub struct Arguments {
    /// Only this one
    #[arg(value_parser = TARGETS)]
    target: Option<String>,
    /// How long for each, in seconds
    #[arg(long, default_value_t = 60)]
    seconds: u32,
}

/// `cargo xtask fuzz`. An input that fails is left in `target/fuzz`, and named.
pub fn command(arguments: &Arguments) -> Result<ExitCode> {
    packages::install("the fuzzer", &["g++"])?;
    let (project, results) = (
        place::checkout().join("cri-server/fuzz"),
        place::target().join("fuzz"),
    );
    fs::create_dir_all(&results)?;
    process::run(
        cargo()
            .args(["build", "--quiet", "--release", "--locked"])
            .args(["--target", PLATFORM])
            .arg("--manifest-path")
            .arg(project.join("Cargo.toml"))
            .arg("--target-dir")
            .arg(&results)
            .env("RUSTFLAGS", FLAGS),
    )?;
    let wanted = |target: &&str| arguments.target.as_deref().is_none_or(|one| one == *target);
    for target in TARGETS.into_iter().filter(wanted) {
        let corpus = results.join("corpus").join(target);
        fs::create_dir_all(&corpus)?;
        let mut fuzzer = Command::new(results.join(PLATFORM).join("release").join(target));
        fuzzer
            .arg(&corpus)
            .arg(project.join("seeds").join(target))
            .arg(format!("-max_total_time={}", arguments.seconds))
            .arg(format!("-artifact_prefix={}/{target}-", results.display()))
            .args(["-max_len=8192", "-len_control=20", "-timeout=10"])
            .args(["-rss_limit_mb=1024", "-print_final_stats=1"]);
        let status = fuzzer.status()?;
        ensure!(status.success(), "{target} has found something: {status}");
    }
    Ok(ExitCode::SUCCESS)
}

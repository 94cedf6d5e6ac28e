//! `cargo xtask test`: builds everything, then runs every suite where it can run.

mod report;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;

use crate::artefacts::{self, Profile, cargo};
use crate::bed::{Job, Outcome};
use crate::ground::{self, Ground};
use crate::{assets, packages, place, process};
use report::{Count, Report};

/// How long the end-to-end suite may take in the bed.
const BED_LIMIT: Duration = Duration::from_secs(55 * 60);

/// How long a soak may take there.
const SOAK_LIMIT: Duration = Duration::from_secs(6 * 60 * 60);

/// Memory of the bed for the end-to-end suite, MiB: several pods at once, and their state on tmpfs.
const BED_MEMORY: u32 = 6144;

/// Arguments of `cargo xtask test`.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    ground: ground::Choice,
    /// Run the end-to-end suite against Debian's containerd and runc instead of Bulkhead
    #[arg(long)]
    reference: bool,
    /// Only tests whose names contain this
    filter: Option<String>,
}

/// Arguments of `cargo xtask soak`.
#[derive(Args)]
pub struct Soak {
    #[command(flatten)]
    ground: ground::Choice,
    /// How many times as often as in the tests
    #[arg(long, default_value_t = 10)]
    times: u32,
    /// Only tests whose names contain this
    filter: Option<String>,
}

/// The suite that a soak runs.
const SOAKED: &str = "cri_growth";

/// `cargo xtask test`.
pub fn command(arguments: &Arguments) -> Result<ExitCode> {
    let mut report = Report::default();
    let filter = arguments.filter.as_deref();
    let directory = report.timed("build", || artefacts::build(Profile::Release, None))?;
    // The server's unit tests use a registry, nft and the like, too.
    packages::install("the tests", assets::PACKAGES)?;
    if !arguments.reference {
        let (count, time) = measured(|| unit_tests(filter))?;
        report.suite("unit tests", time, count);
    }
    if arguments.reference {
        packages::install("the reference runtime", assets::REFERENCE_PACKAGES)?;
    }
    let assets = report.timed("test images", assets::prepare)?;
    let ground = arguments.ground.make(&directory)?;
    if ground == Ground::Bed && !arguments.reference {
        let (count, time) = measured(|| bed_tests(filter))?;
        report.suite("the bed itself", time, count);
    }
    let runtime = if arguments.reference {
        "reference"
    } else {
        "bulkhead"
    };
    let suite = EndToEnd {
        binaries: report.timed("build of the end-to-end tests", || {
            end_to_end_binaries(arguments.reference)
        })?,
        environment: environment(&directory, &assets, runtime)?,
        filter,
        bed_limit: BED_LIMIT,
    };
    let (count, time) = measured(|| suite.run(ground))?;
    report.suite("end to end", time, count);
    Ok(report.close())
}

/// `cargo xtask soak`: what the tests do many times, many times as often.
pub fn soak(arguments: &Soak) -> Result<ExitCode> {
    let mut report = Report::default();
    let directory = report.timed("build", || artefacts::build(Profile::Release, None))?;
    packages::install("the soak", assets::PACKAGES)?;
    let assets = report.timed("test images", assets::prepare)?;
    let ground = arguments.ground.make(&directory)?;
    let mut environment = environment(&directory, &assets, "bulkhead")?;
    environment.push((
        "BULKHEAD_TEST_FACTOR".to_owned(),
        arguments.times.to_string(),
    ));
    let suite = EndToEnd {
        binaries: report.timed("build of the soak", || {
            compiled(&["--package", "bulkhead-tests", "--test", SOAKED], "")
        })?,
        environment,
        filter: arguments.filter.as_deref(),
        bed_limit: SOAK_LIMIT,
    };
    let (count, time) = measured(|| suite.run(ground))?;
    report.suite("soak", time, count);
    Ok(report.close())
}

/// What the end-to-end tests are told of what was built in `directory`.
fn environment(directory: &Path, assets: &Path, runtime: &str) -> Result<Vec<(String, String)>> {
    Ok(vec![
        ("BULKHEAD_BIN_DIR".to_owned(), text(directory)?),
        ("BULKHEAD_TEST_ASSETS".to_owned(), text(assets)?),
        (
            "BULKHEAD_TEST_KUBECTL".to_owned(),
            text(&assets::kubectl()?)?,
        ),
        ("BULKHEAD_TEST_RUNTIME".to_owned(), runtime.to_owned()),
        // Pods share the host's network and cgroup roots: one test at a time.
        ("RUST_TEST_THREADS".to_owned(), "1".to_owned()),
    ])
}

fn measured<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, Duration)> {
    let start = Instant::now();
    let value = work()?;
    Ok((value, start.elapsed()))
}

fn text(path: &Path) -> Result<String> {
    Ok(path
        .to_str()
        .with_context(|| format!("{} is not text", path.display()))?
        .to_owned())
}

/// What the bed does with a command, on this machine.
fn bed_tests(filter: Option<&str>) -> Result<Count> {
    eprintln!("test: the bed itself");
    let mut command = cargo();
    command.args(["test", "--package", "xtask", "--bins", "--"]);
    counted(command.args(["--ignored"]).args(filter))
}

/// The tests inside the crates, on this machine.
fn unit_tests(filter: Option<&str>) -> Result<Count> {
    eprintln!("test: unit tests");
    let mut command = cargo();
    let nextest = process::capture(cargo().args(["nextest", "--version"])).is_ok();
    if nextest {
        command.args(["nextest", "run", "--no-fail-fast", "--no-tests", "pass"]);
    } else {
        command.args(["test", "--no-fail-fast"]);
    }
    // The end-to-end crate's own modules are unit tests as well; its test binaries are not. What
    // holds the CRI's interface, and what reads file systems back, need no virtual machine.
    command.args([
        "--workspace",
        "--lib",
        "--bins",
        "--test",
        "services",
        "--test",
        "reading",
    ]);
    counted(command.args(filter))
}

/// Runs tests on this machine and counts them; a program that could not be made is one that failed.
fn counted(command: &mut Command) -> Result<Count> {
    command
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .stdout(Stdio::piped());
    let (status, words) = report::streamed(command)?;
    let mut count = report::count(&words);
    if !status.success() && count.failed == 0 {
        count.failed = 1;
    }
    Ok(count)
}

/// A program of tests.
struct Binary {
    name: String,
    path: PathBuf,
    /// Arguments beside the filter.
    arguments: &'static str,
}

/// Compiles what runs where pods can: the end-to-end tests, the VMM's boot tests, and the server's
/// unit tests that an ordinary machine leaves out. The reference has only the CRI to be tested.
fn end_to_end_binaries(reference: bool) -> Result<Vec<Binary>> {
    let mut binaries = compiled(&["--package", "bulkhead-tests", "--test", "*"], "")?;
    if reference {
        binaries.retain(|binary| binary.name != "agent");
    } else {
        binaries.extend(compiled(&["--package", "bulkhead-vmm", "--test", "*"], "")?);
        binaries.extend(compiled(&["--package", "bulkhead", "--bins"], "--ignored")?);
    }
    Ok(binaries)
}

/// Compiles the tests that `targets` names.
fn compiled(targets: &[&str], arguments: &'static str) -> Result<Vec<Binary>> {
    let messages = process::capture_loud(cargo().arg("test").args(targets).args([
        "--no-run",
        "--message-format",
        "json-render-diagnostics",
    ]))?;
    let mut binaries = Vec::new();
    for line in String::from_utf8_lossy(&messages).lines() {
        let message: serde_json::Value = serde_json::from_str(line)?;
        // Programs that a test runs are built along with it.
        if let (Some(name), Some(path), Some(true)) = (
            message["target"]["name"].as_str(),
            message["executable"].as_str(),
            message["profile"]["test"].as_bool(),
        ) {
            binaries.push(Binary {
                name: name.to_owned(),
                path: PathBuf::from(path),
                arguments,
            });
        }
    }
    binaries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(binaries)
}

/// The tests of the whole, through the server's CRI socket.
struct EndToEnd<'a> {
    binaries: Vec<Binary>,
    environment: Vec<(String, String)>,
    filter: Option<&'a str>,
    bed_limit: Duration,
}

impl EndToEnd<'_> {
    fn run(&self, ground: Ground) -> Result<Count> {
        if self.binaries.is_empty() {
            eprintln!("test: there are no end-to-end tests");
            return Ok(Count::default());
        }
        match ground {
            Ground::Plain => {
                let mut command = Command::new("sh");
                command
                    .arg("-c")
                    .arg(self.script(&self.binaries)?)
                    .envs(self.environment.iter().cloned());
                command
                    .stdin(Stdio::null())
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped());
                let (status, words) = report::streamed(&mut command)?;
                Ok(report::checked(&words, status.code(), self.binaries.len()))
            }
            Ground::Bed => self.run_in_bed(),
        }
    }

    /// Runs every binary in the bed. An emulated machine can go down through no fault of ours: what
    /// it had not ended is then run in a second one, and said aloud. A third there is not.
    fn run_in_bed(&self) -> Result<Count> {
        let transcript = place::target().join("bulkhead/end-to-end.log");
        let mut words = String::new();
        let mut left = self.binaries.as_slice();
        let mut spare = true;
        let status = loop {
            let command = ["sh".to_owned(), "-c".to_owned(), self.script(left)?];
            let mut job = Job::new(command.to_vec())?;
            job.environment.clone_from(&self.environment);
            job.environment
                .push(("BULKHEAD_TEST_AGAIN".to_owned(), "yes".to_owned()));
            job.memory = BED_MEMORY;
            job.time_limit = self.bed_limit;
            job.transcript = Some(transcript.clone());
            let outcome = job.run()?;
            let said = fs::read_to_string(&transcript).unwrap_or_default();
            words += &said;
            match outcome {
                Outcome::Exited(status) => break Some(i32::from(status)),
                Outcome::Down(why) if spare => {
                    eprintln!("bed: {why}");
                    spare = false;
                    left = left.get(report::ended(&said)..).unwrap_or_default();
                    let Some(first) = left.first() else {
                        break None;
                    };
                    eprintln!(
                        "THE BED WENT DOWN, and the tests from {} on are run in a new one",
                        first.name
                    );
                }
                Outcome::Failed(why) | Outcome::Down(why) => {
                    eprintln!("bed: {why}");
                    break None;
                }
            }
        };
        Ok(report::checked(&words, status, self.binaries.len()))
    }

    /// A shell script that runs `binaries`, also after a failure.
    fn script(&self, binaries: &[Binary]) -> Result<String> {
        let mut script = "status=0\n".to_owned();
        let filter = self.filter.unwrap_or_default().replace('\'', "");
        for binary in binaries {
            let (name, path, arguments) = (&binary.name, text(&binary.path)?, binary.arguments);
            script += &format!("echo 'test: end to end: {name}'\n");
            script += &format!("'{path}' '{filter}' {arguments} || status=1\n");
        }
        script += "exit $status\n";
        Ok(script)
    }
}

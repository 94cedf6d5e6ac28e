//! The bed: a machine with working KVM inside any machine.
//!
//! QEMU in pure emulation, with a CPU that has AMD's virtualisation; in it a Debian kernel with the
//! real `kvm_amd`, and this machine's root directory read-only under an overlay. The command runs
//! there as root; what it writes vanishes with the machine.

mod emulator;
mod machine;
mod setup;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;

/// The exit status that says: not the command but the bed itself failed.
const BED_FAILED: u8 = 200;

/// Arguments of `cargo xtask bed`. Exits with the command's status; 200 means that the bed itself failed.
#[derive(Args)]
pub struct Arguments {
    /// Let one instruction be one nanosecond, on one CPU: a clock that repeats, for benchmarks
    #[arg(long)]
    bench: bool,
    /// Number of CPUs
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=16))]
    smp: u32,
    /// Memory, MiB
    #[arg(long, value_name = "MiB", default_value_t = 4096,
          value_parser = clap::value_parser!(u32).range(512..=65536))]
    memory: u32,
    /// Switch the machine off after this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout: u64,
    /// Bring back what the command leaves in $BED_OUT
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// What to run in the bed, and on what kind of machine.
pub struct Job {
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Where it runs.
    pub directory: PathBuf,
    /// Variables beside PATH, HOME, LC_ALL, TMPDIR (a tmpfs) and BED_OUT.
    pub environment: Vec<(String, String)>,
    /// Number of CPUs; the instruction clock has only one.
    pub cpus: u32,
    /// Memory, MiB.
    pub memory: u32,
    /// What time is in the machine.
    pub clock: Clock,
    /// How long the machine may run.
    pub time_limit: Duration,
    /// Where to put what the command leaves in $BED_OUT.
    pub results: Option<PathBuf>,
    /// A file to which the command's standard output goes as well.
    pub transcript: Option<PathBuf>,
    /// Whether the command's standard output appears on this process's.
    pub shown: bool,
}

/// What time is in the machine.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// The host's.
    Real,
    /// One instruction is one nanosecond, in the machine and in guests of it alike.
    Instructions,
}

/// How a run ended.
pub enum Outcome {
    /// The command ended with this status; 128 + n for signal n.
    Exited(u8),
    /// The bed did not come up, or was switched off at its time limit or by a signal: why, and the
    /// end of its console.
    Failed(String),
    /// The bed's machine went down with the command: the end of its console.
    Down(String),
}

impl Job {
    /// A job with two CPUs, 4 GiB and ten minutes, in the current directory.
    pub fn new(command: Vec<String>) -> Result<Self> {
        Ok(Self {
            command,
            directory: std::env::current_dir().context("no current directory")?,
            environment: Vec::new(),
            cpus: 2,
            memory: 4096,
            clock: Clock::Real,
            time_limit: Duration::from_secs(600),
            results: None,
            transcript: None,
            shown: true,
        })
    }

    /// Runs the job; its output appears on this process's standard output and error as it comes.
    pub fn run(&self) -> Result<Outcome> {
        machine::run(self, &setup::prepare()?)
    }
}

/// `cargo xtask bed`.
pub fn command(arguments: Arguments) -> Result<ExitCode> {
    let mut job = Job::new(arguments.command)?;
    job.memory = arguments.memory;
    job.time_limit = Duration::from_secs(arguments.timeout);
    job.results = arguments.out;
    job.cpus = arguments.smp;
    if arguments.bench {
        job.clock = Clock::Instructions;
    }
    let outcome = job
        .run()
        .unwrap_or_else(|error| Outcome::Failed(format!("{error:#}")));
    Ok(match outcome {
        Outcome::Exited(status) => ExitCode::from(status),
        Outcome::Failed(why) | Outcome::Down(why) => {
            eprintln!("bed: {why}");
            ExitCode::from(BED_FAILED)
        }
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn run(line: &str, limit: u64, transcript: &std::path::Path) -> Outcome {
        let command = ["sh", "-c", line].map(str::to_owned);
        let mut job = Job::new(command.to_vec()).unwrap();
        job.time_limit = Duration::from_secs(limit);
        job.memory = 512;
        job.transcript = Some(transcript.to_owned());
        job.environment = vec![("WORD".to_owned(), "it's".to_owned())];
        job.run().unwrap()
    }

    fn machines() -> usize {
        let name = format!("bulkhead-bed.{}", std::process::id());
        assert!(!std::env::temp_dir().join(&name).exists());
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let lines = processes.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
        lines
            .filter(|line| String::from_utf8_lossy(line).contains(&name))
            .count()
    }

    #[test]
    #[ignore = "boots the bed, twice"]
    fn a_command_is_run_and_bounded_and_leaves_nothing() {
        let transcript = std::env::temp_dir().join(format!("bed-test.{}", std::process::id()));
        let line = "echo $WORD; uname -r; ls Cargo.toml /dev/kvm; touch here; exit 7";
        let outcome = run(line, 300, &transcript);
        assert!(matches!(outcome, Outcome::Exited(7)));
        let said = fs::read_to_string(&transcript).unwrap();
        let said: Vec<&str> = said.lines().collect();
        let host = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        assert_eq!(
            [said[0], said[2], said[3]],
            ["it's", "/dev/kvm", "Cargo.toml"]
        );
        assert_ne!(said[1], host.trim());
        assert!(!std::path::Path::new("here").exists());
        assert_eq!(machines(), 0);

        let Outcome::Failed(why) = run("echo up; sleep 3600", 30, &transcript) else {
            panic!("an endless command ends");
        };
        assert!(why.starts_with("time limit of 30 s reached"), "{why}");
        assert_eq!(fs::read_to_string(&transcript).unwrap(), "up\n");
        assert_eq!(machines(), 0);
        fs::remove_file(transcript).unwrap();
    }
}

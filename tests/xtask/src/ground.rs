//! Where tests that need virtual machines run: this machine, if it can, else the bed.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use clap::Args;

/// Where to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ground {
    /// This machine.
    Plain,
    /// The nested test machine.
    Bed,
}

/// Flags that force the choice.
#[derive(Args)]
pub struct Choice {
    /// Run in the nested test machine, whatever this machine can do
    #[arg(long, conflicts_with = "no_bed")]
    bed: bool,
    /// Run on this machine, whatever it can do
    #[arg(long)]
    no_bed: bool,
}

impl Choice {
    /// Chooses, and says why. `artefacts` holds the `bulkhead` that examines this machine.
    pub fn make(&self, artefacts: &Path) -> Result<Ground> {
        if self.bed {
            eprintln!("ground: the bed, as asked for");
            return Ok(Ground::Bed);
        }
        if self.no_bed {
            eprintln!("ground: this machine, as asked for");
            return Ok(Ground::Plain);
        }
        eprintln!("ground: can a pod run on this machine?");
        let findings = Command::new(artefacts.join("bulkhead"))
            .args(["doctor", "--machine-check"])
            .stdin(Stdio::null())
            .output()
            .context("cannot start bulkhead doctor")?;
        let ground = judge(findings.status.code(), &findings.stdout);
        for line in String::from_utf8_lossy(&findings.stdout).lines() {
            eprintln!("ground:   {line}");
        }
        match ground {
            Some(Ground::Plain) => eprintln!("ground: yes: this machine"),
            Some(Ground::Bed) => eprintln!("ground: no: the bed"),
            None => {
                let words = String::from_utf8_lossy(&findings.stderr);
                let first = words.lines().find(|line| !line.trim().is_empty());
                eprintln!(
                    "ground: the examination itself failed ({}: {}): the bed",
                    findings.status,
                    first.unwrap_or("no message")
                );
            }
        }
        Ok(ground.unwrap_or(Ground::Bed))
    }
}

/// What the examination means: it exits with 0 if a pod can run, and prints a line per finding
/// (`ok …` or `FAIL …`). None if it did not take place.
fn judge(status: Option<i32>, findings: &[u8]) -> Option<Ground> {
    let text = String::from_utf8_lossy(findings);
    let failures = text
        .lines()
        .filter(|line| line.starts_with("FAIL "))
        .count();
    let passes = text.lines().filter(|line| line.starts_with("ok ")).count();
    match (status, passes, failures) {
        (Some(0), 1.., 0) => Some(Ground::Plain),
        (Some(_), _, 1..) => Some(Ground::Bed),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::{Ground, judge};

    #[test]
    fn only_findings_without_a_failure_allow_this_machine() {
        assert_eq!(
            judge(Some(0), b"ok kvm: works\nok tun: there\n"),
            Some(Ground::Plain)
        );
        assert_eq!(
            judge(Some(1), b"ok kvm: works\nFAIL tun: missing\n"),
            Some(Ground::Bed)
        );
        assert_eq!(judge(Some(0), b"FAIL tun: missing\n"), Some(Ground::Bed));
    }

    #[test]
    fn a_missing_or_killed_examination_is_no_finding() {
        assert_eq!(judge(Some(2), b""), None);
        assert_eq!(judge(Some(0), b""), None);
        assert_eq!(judge(None, b"ok kvm: works\n"), None);
    }
}

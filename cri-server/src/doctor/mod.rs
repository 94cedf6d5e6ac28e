//! `bulkhead doctor`: whether pods can run on this machine, and what to do where they cannot.

mod check;
mod microguest;
mod sys;

pub use check::examine;
pub use microguest::run_here as micro_guest;

use std::fmt;

/// How serious a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grade {
    /// As it should be.
    Good,
    /// Pods run, though worse than they could.
    Warning,
    /// Pods cannot run.
    Failure,
}

/// One thing looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How serious it is.
    pub grade: Grade,
    /// What was looked at, in a word or two.
    pub name: &'static str,
    /// What was found, in a clause.
    pub found: String,
    /// What to do about it.
    pub advice: Option<String>,
}

impl Finding {
    fn good(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            grade: Grade::Good,
            name,
            found: found.into(),
            advice: None,
        }
    }

    fn warning(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            grade: Grade::Warning,
            name,
            found: found.into(),
            advice: Some(advice.into()),
        }
    }

    fn failure(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            grade: Grade::Failure,
            name,
            found: found.into(),
            advice: Some(advice.into()),
        }
    }
}

/// Everything that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// In the order in which things are needed.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Whether pods can run here.
    pub fn can_run_pods(&self) -> bool {
        !self
            .findings
            .iter()
            .any(|finding| finding.grade == Grade::Failure)
    }

    /// The report for a program: a line for each finding, `ok`, `warn` or `FAIL` its first word.
    pub fn lines(&self) -> String {
        let lines = self.findings.iter().map(|finding| {
            Line {
                finding: &Finding {
                    advice: None,
                    ..finding.clone()
                },
                colours: false,
            }
            .to_string()
        });
        lines.collect()
    }

    /// The report for a reader, in colours if wanted.
    pub fn show(&self, colours: bool) -> String {
        let mut text = String::new();
        for finding in &self.findings {
            text.push_str(&Line { finding, colours }.to_string());
        }
        text.push_str(if self.can_run_pods() {
            "Pods can run on this machine.\n"
        } else {
            "Pods cannot run on this machine: see FAIL above.\n"
        });
        text
    }
}

struct Line<'a> {
    finding: &'a Finding,
    colours: bool,
}

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (word, colour) = match self.finding.grade {
            Grade::Good => ("ok", "\x1b[32m"),
            Grade::Warning => ("warn", "\x1b[33m"),
            Grade::Failure => ("FAIL", "\x1b[31m"),
        };
        let (colour, end) = if self.colours {
            (colour, "\x1b[0m")
        } else {
            ("", "")
        };
        let Finding {
            name,
            found,
            advice,
            ..
        } = self.finding;
        writeln!(f, "{colour}{word:<4}{end}  {name}: {found}")?;
        match advice {
            Some(advice) => writeln!(f, "      {advice}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_failure_keeps_pods_from_running() {
        let mut report = Report {
            findings: vec![Finding::good("a", "x"), Finding::warning("b", "y", "do z")],
        };
        assert!(report.can_run_pods());
        assert_eq!(
            report.show(false),
            "ok    a: x\nwarn  b: y\n      do z\nPods can run on this machine.\n"
        );
        report
            .findings
            .push(Finding::failure("c", "broken", "mend it"));
        assert!(!report.can_run_pods());
        assert!(
            report
                .show(false)
                .contains("FAIL  c: broken\n      mend it\n")
        );
        assert_eq!(report.lines(), "ok    a: x\nwarn  b: y\nFAIL  c: broken\n");
    }
}

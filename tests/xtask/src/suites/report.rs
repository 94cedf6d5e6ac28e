//! Counting what test programs print, and the closing words.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::process::{Command, ExitCode, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// How many tests passed and failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Tests that passed.
    pub passed: u64,
    /// Tests that failed, and programs that did not come to their end.
    pub failed: u64,
}

/// The lines of the closing table.
#[derive(Default)]
pub struct Report {
    lines: Vec<(String, Duration, Option<Count>)>,
}

impl Report {
    /// Does `work`, which is no suite, and notes its time.
    pub fn timed<T>(&mut self, name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let start = Instant::now();
        let value = work()?;
        self.lines.push((name.to_owned(), start.elapsed(), None));
        Ok(value)
    }

    /// Notes a suite.
    pub fn suite(&mut self, name: &str, time: Duration, count: Count) {
        self.lines.push((name.to_owned(), time, Some(count)));
    }

    /// Prints the table and the closing line; the exit status is a success only if nothing failed
    /// and something passed.
    pub fn close(&self) -> ExitCode {
        let mut sum = Count::default();
        for (name, time, count) in &self.lines {
            let seconds = time.as_secs();
            match count {
                None => println!("{seconds:>6} s  {name}"),
                Some(Count { passed, failed }) => {
                    println!("{seconds:>6} s  {name}: {passed} passed, {failed} failed");
                    sum.passed += passed;
                    sum.failed += failed;
                }
            }
        }
        println!("{} passed, {} failed", sum.passed, sum.failed);
        if sum.failed == 0 && sum.passed > 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

/// Runs `command`, whose output and error streams are pipes, shows both as they come, and returns
/// all of both.
pub fn streamed(command: &mut Command) -> Result<(ExitStatus, String)> {
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot start {}", command.get_program().display()))?;
    let output = child.stdout.take().context("no pipe")?;
    let errors = child.stderr.take().context("no pipe")?;
    let words = thread::scope(|scope| {
        let errors = scope.spawn(|| show(errors, io::stderr()));
        let output = show(output, io::stdout());
        output + &errors.join().unwrap_or_default()
    });
    Ok((child.wait()?, words))
}

fn show(from: impl Read, mut to: impl Write) -> String {
    let mut all = String::new();
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    while let Ok(1..) = from.read_until(b'\n', &mut line) {
        // A reader that has gone does not end the tests.
        let _ = to.write_all(&line).and_then(|()| to.flush());
        all += &String::from_utf8_lossy(&line);
        line.clear();
    }
    all
}

/// What the summaries in `words` add up to, of libtest (`test result: ok. 3 passed; 0 failed; …`)
/// and of nextest (`Summary [ 1.2s] 5 tests run: 4 passed, 1 failed, 0 skipped`).
pub fn count(words: &str) -> Count {
    let mut sum = Count::default();
    for line in words.lines() {
        let line = line.trim_start();
        if !line.starts_with("test result: ") && !line.starts_with("Summary [") {
            continue;
        }
        sum.passed += number_before(line, "passed");
        sum.failed += number_before(line, "failed") + number_before(line, "timed");
    }
    sum
}

/// [`count`] of `programs` libtest programs that ended with `status` together. One that printed no
/// summary has failed, and so has the whole if it says so.
pub fn checked(words: &str, status: Option<i32>, programs: usize) -> Count {
    let mut sum = count(words);
    sum.failed += programs.saturating_sub(ended(words)) as u64;
    if status != Some(0) && sum.failed == 0 {
        sum.failed = 1;
    }
    sum
}

/// How many libtest programs came to their end, by their summaries in `words`.
pub fn ended(words: &str) -> usize {
    words
        .lines()
        .filter(|line| line.starts_with("test result: "))
        .count()
}

fn number_before(line: &str, word: &str) -> u64 {
    let mut last = "";
    for part in line.split_whitespace() {
        if part.trim_end_matches([',', ';']) == word {
            return last.parse().unwrap_or(0);
        }
        last = part;
    }
    0
}

#[cfg(test)]
mod tests {
    use super::{Count, checked, count};

    const LIBTEST: &str = "running 3 tests\ntest a ... ok\n\
        test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.0s\n\
        test result: FAILED. 1 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out\n";

    #[test]
    fn summaries_of_both_kinds_are_added() {
        assert_eq!(
            count(LIBTEST),
            Count {
                passed: 3,
                failed: 3
            }
        );
        let nextest = "     Summary [   1.234s] 5 tests run: 3 passed (1 slow), 1 failed, 1 timed out, 2 skipped";
        assert_eq!(
            count(nextest),
            Count {
                passed: 3,
                failed: 2
            }
        );
    }

    #[test]
    fn a_test_that_prints_the_word_is_not_counted() {
        assert_eq!(count("we saw 9 passed, 2 failed\n"), Count::default());
    }

    #[test]
    fn a_program_without_a_summary_has_failed() {
        assert_eq!(
            checked(LIBTEST, Some(1), 3),
            Count {
                passed: 3,
                failed: 4
            }
        );
        assert_eq!(
            checked("", None, 2),
            Count {
                passed: 0,
                failed: 2
            }
        );
    }

    #[test]
    fn a_failing_status_is_a_failure() {
        let fine = "test result: ok. 2 passed; 0 failed; 0 ignored\n";
        assert_eq!(
            checked(fine, Some(0), 1),
            Count {
                passed: 2,
                failed: 0
            }
        );
        assert_eq!(
            checked(fine, Some(1), 1),
            Count {
                passed: 2,
                failed: 1
            }
        );
    }
}

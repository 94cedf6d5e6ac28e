//! Running other programs, with errors that say which program failed and how.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};

/// Runs `command` with this process's standard streams; fails unless it exits with 0.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot start {}", shown(command)))?;
    if !status.success() {
        bail!("{} failed: {status}", shown(command));
    }
    Ok(())
}

/// Runs `command` quietly and returns its standard output; on failure the error carries the end of
/// its standard error.
pub fn capture(command: &mut Command) -> Result<Vec<u8>> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {}", shown(command)))?;
    checked(command, output)
}

/// [`capture`], with the command's standard error shown as it comes.
pub fn capture_loud(command: &mut Command) -> Result<Vec<u8>> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start {}", shown(command)))?;
    checked(command, output)
}

/// [`capture`], as text without the last newline.
pub fn capture_text(command: &mut Command) -> Result<String> {
    let text = String::from_utf8(capture(command)?)
        .with_context(|| format!("{} printed something that is not text", shown(command)))?;
    Ok(text.trim_end().to_owned())
}

/// Runs `command` as a filter: feeds it `input` and returns its standard output.
pub fn filter(command: &mut Command, input: &[u8]) -> Result<Vec<u8>> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", shown(command)))?;
    let mut stdin = child.stdin.take().context("no pipe to the filter")?;
    let output = std::thread::scope(|scope| {
        // A filter that stops reading early closes its end: its exit status says whether that is a failure.
        scope.spawn(move || stdin.write_all(input));
        child.wait_with_output()
    })?;
    checked(command, output)
}

fn checked(command: &Command, output: Output) -> Result<Vec<u8>> {
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        let tail: Vec<&str> = words.lines().rev().take(20).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        bail!(
            "{} failed: {}\n{}",
            shown(command),
            output.status,
            tail.join("\n")
        );
    }
    Ok(output.stdout)
}

fn shown(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|a| a.to_string_lossy().into_owned()));
    let mut line = words.join(" ");
    if let Some((cut, _)) = line.char_indices().nth(200) {
        line.truncate(cut);
        line.push('…');
    }
    format!("`{line}`")
}

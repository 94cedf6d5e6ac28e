//! A container's log file, in the format every kubelet reads: one line per write,
//! `TIME stdout|stderr P|F TEXT`.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

/// Longest text of one line, in bytes; what is longer is continued after a `P`.
pub const LINE_BYTES: usize = 16 << 10;

/// Which of a process's outputs a line came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// One line of a log.
#[derive(Clone, Debug)]
pub struct Line {
    /// When it was written, RFC 3339 with nanoseconds.
    pub time: String,
    /// Where it came from.
    pub stream: Stream,
    /// Whether the container's line ends here (`F`) or goes on (`P`).
    pub complete: bool,
    /// What the container wrote, without its newline.
    pub text: Vec<u8>,
}

/// Reads a log and fails on anything that is not in the format.
pub fn read(path: &Path) -> Result<Vec<Line>> {
    let bytes = std::fs::read(path).with_context(|| format!("log {}", path.display()))?;
    parse(&bytes).with_context(|| format!("log {}", path.display()))
}

/// Waits until a container has said exactly this to its standard output.
pub fn wait_for(path: &Path, wanted: &str) -> Result<()> {
    for _ in 0..600 {
        let said = read(path).map(|lines| text(&lines, Stream::Stdout));
        if said.as_deref().is_ok_and(|said| said == wanted) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    bail!("{} does not say {wanted:?}", path.display())
}

/// What one stream said: complete lines joined by newlines, parts joined as they are.
pub fn text(lines: &[Line], stream: Stream) -> String {
    let mut text = Vec::new();
    for line in lines.iter().filter(|line| line.stream == stream) {
        text.extend_from_slice(&line.text);
        if line.complete {
            text.push(b'\n');
        }
    }
    String::from_utf8_lossy(&text).into_owned()
}

fn parse(bytes: &[u8]) -> Result<Vec<Line>> {
    let Some(bytes) = bytes.strip_suffix(b"\n") else {
        ensure!(bytes.is_empty(), "the last line has no end");
        return Ok(Vec::new());
    };
    bytes.split(|&byte| byte == b'\n').map(line).collect()
}

fn line(bytes: &[u8]) -> Result<Line> {
    let shown = String::from_utf8_lossy(bytes.get(..80).unwrap_or(bytes)).into_owned();
    let mut parts = bytes.splitn(4, |&byte| byte == b' ');
    let (Some(time), Some(stream), Some(tag), Some(text)) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        bail!("fewer than four fields: {shown:?}");
    };
    let time = String::from_utf8(time.to_vec())?;
    ensure!(is_time(&time), "not a time: {shown:?}");
    let stream = match stream {
        b"stdout" => Stream::Stdout,
        b"stderr" => Stream::Stderr,
        _ => bail!("neither stdout nor stderr: {shown:?}"),
    };
    let complete = match tag {
        b"F" => true,
        b"P" => false,
        _ => bail!("neither F nor P: {shown:?}"),
    };
    ensure!(text.len() <= LINE_BYTES, "a line of {} bytes", text.len());
    Ok(Line {
        time,
        stream,
        complete,
        text: text.to_vec(),
    })
}

/// `YYYY-MM-DDTHH:MM:SS[.fraction](Z|±HH:MM)`.
fn is_time(text: &str) -> bool {
    let matches = |text: &str, pattern: &str| {
        text.len() == pattern.len()
            && text
                .bytes()
                .zip(pattern.bytes())
                .all(|(byte, wanted)| match wanted {
                    b'0' => byte.is_ascii_digit(),
                    b'+' => byte == b'+' || byte == b'-',
                    _ => byte == wanted,
                })
    };
    let Some((date, rest)) = text.split_at_checked(19) else {
        return false;
    };
    let fraction = rest.strip_prefix('.').map_or(0, |digits| {
        1 + digits.bytes().take_while(u8::is_ascii_digit).count()
    });
    let zone = &rest[fraction..];
    matches(date, "0000-00-00T00:00:00")
        && fraction <= 10
        && fraction != 1
        && (zone == "Z" || matches(zone, "+00:00"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_both_streams_are_told_apart() {
        let log = b"2026-11-21T07:28:34.123456789Z stdout P abc\n\
                    2026-11-21T07:28:34.2+01:00 stdout F def\n\
                    2026-11-21T07:28:35Z stderr F  two  spaces \n";
        let lines = parse(log).unwrap();
        assert_eq!(text(&lines, Stream::Stdout), "abcdef\n");
        assert_eq!(text(&lines, Stream::Stderr), " two  spaces \n");
    }

    #[test]
    fn what_is_not_in_the_format_is_refused() {
        for log in [
            "2026-11-21T07:28:34Z stdout F no newline",
            "2026-11-21 07:28:34Z stdout F time\n",
            "2026-11-21T07:28:34.Z stdout F fraction\n",
            "2026-11-21T07:28:34Z stdin F stream\n",
            "2026-11-21T07:28:34Z stdout X tag\n",
            "2026-11-21T07:28:34Z stdout F\n",
        ] {
            assert!(parse(log.as_bytes()).is_err(), "{log}");
        }
    }
}

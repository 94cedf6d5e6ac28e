//! The lines of a log: `<RFC 3339 time> <stream> <P|F> <text>` (CRI, "container logging").

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The longest text of one line, in bytes; a longer one is continued (`P`).
pub const LINE_BYTES: usize = 16 << 10;

/// Which of the two output streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// Cuts the bytes of one stream into log lines.
#[derive(Debug)]
pub struct Splitter {
    stream: Stream,
    /// The start of a line whose end has not come yet; at most [`LINE_BYTES`].
    partial: Vec<u8>,
    /// Bytes of the stream that are in lines given out.
    emitted: u64,
}

impl Splitter {
    /// Starts at `offset` of the stream.
    pub fn new(stream: Stream, offset: u64) -> Self {
        Self {
            stream,
            partial: Vec::new(),
            emitted: offset,
        }
    }

    /// Takes bytes that came at `time` and appends the lines they complete to `lines`.
    pub fn push(&mut self, mut bytes: &[u8], time: SystemTime, lines: &mut Vec<u8>) {
        let head = self.head(time);
        while !bytes.is_empty() {
            let room = LINE_BYTES - self.partial.len();
            let within = bytes.get(..room.min(bytes.len())).unwrap_or(bytes);
            // A newline just behind a full text still ends it, so look one byte further.
            let seen = bytes.get(..(room + 1).min(bytes.len())).unwrap_or(bytes);
            if let Some(end) = seen.iter().position(|&byte| byte == b'\n') {
                let (text, rest) = bytes.split_at(end);
                self.partial.extend_from_slice(text);
                self.emit(&head, b'F', lines);
                self.emitted += 1;
                bytes = rest.get(1..).unwrap_or_default();
            } else {
                self.partial.extend_from_slice(within);
                bytes = bytes.get(within.len()..).unwrap_or_default();
                // A text that is exactly full may still be followed by its newline.
                if !bytes.is_empty() {
                    self.emit(&head, b'P', lines);
                }
            }
        }
    }

    /// The stream has ended: a text without newline is given out as it is.
    pub fn end(&mut self, time: SystemTime, lines: &mut Vec<u8>) {
        if !self.partial.is_empty() {
            self.emit(&self.head(time), b'P', lines);
        }
    }

    /// How far into the stream the lines given out reach.
    pub fn emitted(&self) -> u64 {
        self.emitted
    }

    /// What all lines of one moment begin with.
    fn head(&self, time: SystemTime) -> String {
        format!("{} {} ", rfc3339(time), self.stream.name())
    }

    fn emit(&mut self, head: &str, tag: u8, lines: &mut Vec<u8>) {
        lines.extend_from_slice(head.as_bytes());
        lines.extend_from_slice(&[tag, b' ']);
        lines.extend_from_slice(&self.partial);
        lines.push(b'\n');
        self.emitted += self.partial.len() as u64;
        self.partial.clear();
    }
}

/// `2006-01-02T15:04:05.999999999Z`, always with nine digits, in UTC.
fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Days since 0000-03-01, so that the leap day is a year's last.
    let days = days + 719_468;
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z",
        second / 3600,
        second / 60 % 60,
        second % 60,
        since.subsec_nanos()
    )
}

/// Of bytes that begin with a line: the stream whose bytes it holds, how many they are, and what
/// follows it. None where it is not whole, or none of ours.
pub fn take(log: &[u8]) -> Option<(Stream, u64, &[u8])> {
    let end = log.iter().position(|&byte| byte == b'\n')?;
    let (line, rest) = (log.get(..end)?, log.get(end + 1..)?);
    let mut parts = line.splitn(4, |&byte| byte == b' ').skip(1);
    let stream = match parts.next()? {
        b"stdout" => Stream::Stdout,
        b"stderr" => Stream::Stderr,
        _ => return None,
    };
    let newline = match parts.next()? {
        b"F" => 1,
        b"P" => 0,
        _ => return None,
    };
    Some((stream, parts.next()?.len() as u64 + newline, rest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a reader of the log makes of it: the stream's bytes.
    fn joined(log: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for line in log.split_inclusive(|&byte| byte == b'\n') {
            let mut parts = line.splitn(4, |&byte| byte == b' ');
            let (_, stream) = (parts.next().unwrap(), parts.next().unwrap());
            assert_eq!(stream, b"stdout");
            let tag = parts.next().unwrap();
            let text = parts.next().unwrap();
            assert!(text.len() <= LINE_BYTES + 1);
            match tag {
                b"F" => bytes.extend_from_slice(text),
                b"P" => bytes.extend_from_slice(&text[..text.len() - 1]),
                other => panic!("tag {other:?}"),
            }
        }
        bytes
    }

    fn split(chunks: &[Vec<u8>]) -> (Vec<u8>, u64) {
        let mut splitter = Splitter::new(Stream::Stdout, 0);
        let mut lines = Vec::new();
        for chunk in chunks {
            splitter.push(chunk, UNIX_EPOCH, &mut lines);
        }
        splitter.end(UNIX_EPOCH, &mut lines);
        (lines, splitter.emitted())
    }

    #[test]
    fn a_line_has_the_form_the_cri_asks_for() {
        let (lines, _) = split(&[b"hello\n".to_vec()]);
        assert_eq!(lines, b"1970-01-01T00:00:00.000000000Z stdout F hello\n");
    }

    #[test]
    fn a_long_line_is_continued_and_an_exact_one_is_not() {
        let tags = |length: usize| {
            let mut text = vec![b'x'; length];
            text.push(b'\n');
            let (lines, _) = split(&[text]);
            lines
                .split_inclusive(|&byte| byte == b'\n')
                .map(|line| char::from(line.splitn(4, |&b| b == b' ').nth(2).unwrap()[0]))
                .collect::<String>()
        };
        assert_eq!(tags(LINE_BYTES), "F");
        assert_eq!(tags(LINE_BYTES + 1), "PF");
        assert_eq!(tags(2 * LINE_BYTES), "PF");
        assert_eq!(tags(2 * LINE_BYTES + 1), "PPF");
    }

    #[test]
    fn what_is_held_back_does_not_count_as_given_out() {
        let mut splitter = Splitter::new(Stream::Stdout, 100);
        let mut lines = Vec::new();
        splitter.push(b"a\nbc", UNIX_EPOCH, &mut lines);
        assert_eq!(splitter.emitted(), 102);
        splitter.end(UNIX_EPOCH, &mut lines);
        assert_eq!(splitter.emitted(), 104);
    }

    #[test]
    fn times_are_written_as_calendars_say() {
        let at = |seconds, nanos| rfc3339(UNIX_EPOCH + Duration::new(seconds, nanos));
        assert_eq!(at(951_782_400, 5), "2000-02-29T00:00:00.000000005Z");
        assert_eq!(at(1_709_251_199, 0), "2024-02-29T23:59:59.000000000Z");
        assert_eq!(at(4_107_542_400, 0), "2100-03-01T00:00:00.000000000Z");
        assert_eq!(
            at(1_767_225_599, 999_999_999),
            "2025-12-31T23:59:59.999999999Z"
        );
    }

    proptest! {
        #[test]
        fn no_byte_is_lost_or_doubled_however_the_stream_is_cut(
            lengths in prop::collection::vec(0usize..40_000, 0..8),
            cuts in prop::collection::vec(1usize..20_000, 1..40),
        ) {
            let mut stream = Vec::new();
            for length in lengths {
                stream.extend(std::iter::repeat_n(b'x', length));
                stream.push(b'\n');
            }
            stream.extend_from_slice(b"tail");
            let mut chunks = Vec::new();
            let mut rest = stream.as_slice();
            for cut in cuts.iter().cycle() {
                let (chunk, after) = rest.split_at((*cut).min(rest.len()));
                chunks.push(chunk.to_vec());
                rest = after;
                if rest.is_empty() {
                    break;
                }
            }
            let (lines, emitted) = split(&chunks);
            prop_assert_eq!(joined(&lines), stream.clone());
            prop_assert_eq!(emitted, stream.len() as u64);
        }
    }
}

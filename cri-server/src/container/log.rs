//! The container's log in the CRI's format: `<RFC 3339 time> <stream> <P|F> <text>`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::{mpsc, oneshot};

/// The longest text of one line, in bytes; a longer one is continued (`P`).
pub const LINE_BYTES: usize = 16 << 10;
/// Requests that wait for the writer, at most.
const QUEUE: usize = 16;

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
        while !bytes.is_empty() {
            let room = LINE_BYTES - self.partial.len();
            let within = bytes.get(..room.min(bytes.len())).unwrap_or(bytes);
            // A newline just behind a full text still ends it, so look one byte further.
            let seen = bytes.get(..(room + 1).min(bytes.len())).unwrap_or(bytes);
            if let Some(end) = seen.iter().position(|&byte| byte == b'\n') {
                let (text, rest) = bytes.split_at(end);
                self.partial.extend_from_slice(text);
                self.emit('F', time, lines);
                self.emitted += 1;
                bytes = rest.get(1..).unwrap_or_default();
            } else {
                self.partial.extend_from_slice(within);
                bytes = bytes.get(within.len()..).unwrap_or_default();
                // A text that is exactly full may still be followed by its newline.
                if !bytes.is_empty() {
                    self.emit('P', time, lines);
                }
            }
        }
    }

    /// The stream has ended: a text without newline is given out as it is.
    pub fn end(&mut self, time: SystemTime, lines: &mut Vec<u8>) {
        if !self.partial.is_empty() {
            self.emit('P', time, lines);
        }
    }

    /// How far into the stream the lines given out reach.
    pub fn emitted(&self) -> u64 {
        self.emitted
    }

    fn emit(&mut self, tag: char, time: SystemTime, lines: &mut Vec<u8>) {
        let head = format!("{} {} {tag} ", rfc3339(time), self.stream.name());
        lines.extend_from_slice(head.as_bytes());
        lines.extend_from_slice(&self.partial);
        lines.push(b'\n');
        self.emitted += self.partial.len() as u64;
        self.partial.clear();
    }
}

/// `2006-01-02T15:04:05.999999999Z`, always with nine digits, in UTC.
pub fn rfc3339(time: SystemTime) -> String {
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

/// Why a log cannot be kept.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LogError {
    /// The file does not take the bytes.
    #[error("The container's log {path} cannot be written: {reason}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's error.
        reason: String,
    },
    /// The writer has ended.
    #[error("The container's log is closed")]
    Closed,
}

/// A container's log file, written by a task of its own until the last copy of this is dropped.
#[derive(Debug, Clone)]
pub struct Log(mpsc::Sender<Request>);

enum Request {
    Append(Vec<u8>, oneshot::Sender<Result<(), LogError>>),
    Reopen(oneshot::Sender<Result<(), LogError>>),
}

/// Nobody may ask for a log.
enum Target {
    Nowhere,
    /// It cannot be had before it is made anew.
    Missing(PathBuf),
    File {
        path: PathBuf,
        file: std::fs::File,
    },
}

impl Log {
    /// Opens the log at `path`, appending; `None` drops everything.
    pub async fn open(path: Option<PathBuf>) -> Result<Self, LogError> {
        let target = blocking(move || match path {
            None => Ok(Target::Nowhere),
            Some(path) => open(path),
        })
        .await?;
        Ok(Self::of(target))
    }

    /// A log that drops everything until [`Log::reopen`] succeeds.
    pub fn missing(path: Option<PathBuf>) -> Self {
        Self::of(path.map_or(Target::Nowhere, Target::Missing))
    }

    fn of(target: Target) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE);
        tokio::spawn(write(target, receiver));
        Self(sender)
    }

    /// Writes whole lines; returns when the file has them.
    pub async fn append(&self, lines: Vec<u8>) -> Result<(), LogError> {
        self.ask(|reply| Request::Append(lines, reply)).await
    }

    /// Makes the file anew after it was renamed (CRI `ReopenContainerLog`).
    pub async fn reopen(&self) -> Result<(), LogError> {
        self.ask(Request::Reopen).await
    }

    async fn ask(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<(), LogError>>) -> Request,
    ) -> Result<(), LogError> {
        let (reply, answer) = oneshot::channel();
        let sent = self.0.send(request(reply)).await;
        sent.map_err(|_| LogError::Closed)?;
        answer.await.map_err(|_| LogError::Closed)?
    }
}

async fn write(mut target: Target, mut requests: mpsc::Receiver<Request>) {
    while let Some(request) = requests.recv().await {
        let (done, reply) = match request {
            Request::Append(lines, reply) => {
                let job = move || {
                    let result = append(&mut target, &lines);
                    (target, result)
                };
                (tokio::task::spawn_blocking(job).await, reply)
            }
            Request::Reopen(reply) => {
                let job = move || {
                    let fresh = match &target {
                        Target::Nowhere => Ok(Target::Nowhere),
                        Target::Missing(path) | Target::File { path, .. } => open(path.clone()),
                    };
                    match fresh {
                        Ok(fresh) => (fresh, Ok(())),
                        Err(error) => (target, Err(error)),
                    }
                };
                (tokio::task::spawn_blocking(job).await, reply)
            }
        };
        let Ok((back, result)) = done else {
            return;
        };
        target = back;
        // Whoever asked may be gone.
        let _ = reply.send(result);
    }
}

fn append(target: &mut Target, lines: &[u8]) -> Result<(), LogError> {
    match target {
        Target::Nowhere | Target::Missing(_) => Ok(()),
        Target::File { path, file } => {
            let before = file.metadata().map(|metadata| metadata.len());
            file.write_all(lines).map_err(|error| {
                // The lines are written again later; half of them must not stay.
                if let Ok(length) = before {
                    let _ = file.set_len(length);
                }
                failed(path, &error)
            })
        }
    }
}

fn open(path: PathBuf) -> Result<Target, LogError> {
    use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
    let make = || {
        if let Some(directory) = path.parent() {
            let mut builder = std::fs::DirBuilder::new();
            builder.recursive(true).mode(0o755).create(directory)?;
        }
        let mut options = std::fs::OpenOptions::new();
        // Group-readable as other runtimes' logs are: collectors run under a group of their own.
        options.append(true).create(true).mode(0o640).open(&path)
    };
    match make() {
        Ok(file) => Ok(Target::File { path, file }),
        Err(error) => Err(failed(&path, &error)),
    }
}

fn failed(path: &Path, error: &std::io::Error) -> LogError {
    LogError::Write {
        path: path.to_owned(),
        reason: error.to_string(),
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, LogError> + Send + 'static,
) -> Result<T, LogError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(_) => Err(LogError::Closed),
    }
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

    #[tokio::test]
    async fn a_reopened_log_leaves_the_renamed_file_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pod/0.log");
        let log = Log::open(Some(path.clone())).await.unwrap();
        log.append(b"one\n".to_vec()).await.unwrap();
        let rotated = directory.path().join("pod/0.log.1");
        std::fs::rename(&path, &rotated).unwrap();
        log.reopen().await.unwrap();
        assert!(path.exists());
        log.append(b"two\n".to_vec()).await.unwrap();
        assert_eq!(std::fs::read(&rotated).unwrap(), b"one\n");
        assert_eq!(std::fs::read(&path).unwrap(), b"two\n");
    }

    #[tokio::test]
    async fn a_log_without_a_path_drops_everything() {
        let log = Log::open(None).await.unwrap();
        log.append(b"one\n".to_vec()).await.unwrap();
        log.reopen().await.unwrap();
    }

    #[tokio::test]
    async fn a_missing_log_drops_everything_until_it_is_reopened() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pod/0.log");
        std::fs::write(directory.path().join("pod"), "in the way").unwrap();
        let log = Log::missing(Some(path.clone()));
        log.append(b"one\n".to_vec()).await.unwrap();
        assert!(log.reopen().await.is_err());
        std::fs::remove_file(directory.path().join("pod")).unwrap();
        log.append(b"two\n".to_vec()).await.unwrap();
        log.reopen().await.unwrap();
        log.append(b"three\n".to_vec()).await.unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"three\n");
    }
}

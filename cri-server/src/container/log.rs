//! The container's log in the CRI's format, and how far the output is in it.

mod line;
mod offset;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use tokio::sync::{mpsc, oneshot};

pub use line::{Splitter, Stream};
pub use offset::Offsets;
use offset::Record;

/// Requests that wait for the writer, at most.
const QUEUE: usize = 16;

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
    Append(Lines, oneshot::Sender<Result<(), LogError>>),
    Reopen(oneshot::Sender<Result<(), LogError>>),
}

/// Whole lines of a stream.
#[derive(Debug, Clone)]
pub struct Lines {
    /// Whose they are.
    pub stream: Stream,
    /// The lines.
    pub text: Vec<u8>,
    /// How far into the stream they reach.
    pub until: u64,
}

/// Where a container's log is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The log; nobody may ask for one.
    pub log: Option<PathBuf>,
    /// How far the output is in it.
    pub record: PathBuf,
}

/// What becomes of output that the log does not take, for want of space perhaps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WhenFull {
    /// After 10 seconds it is lost, and counted in the container's status.
    #[default]
    Lose,
    /// It is kept, and the container waits when it writes more.
    Wait,
}

enum Target {
    Nowhere,
    /// It cannot be had before it is made anew.
    Missing(PathBuf, Option<Record>),
    File {
        path: PathBuf,
        file: File,
        /// None where it cannot be kept: then a server that is killed is followed by one that may
        /// repeat lines.
        record: Option<Record>,
    },
}

impl Log {
    /// Opens the log of a container that is about to start, appending to what there is.
    pub async fn open(place: Place) -> Result<Self, LogError> {
        let target = blocking(move || match place.log {
            None => Ok(Target::Nowhere),
            Some(path) => {
                let record = record(&place.record, Offsets::default());
                open(&path).map(|file| begin(path, file, record))
            }
        });
        Ok(Self::of(target.await?))
    }

    /// Opens the log of a container that runs already, and says how far its output is in it. A log
    /// that cannot be opened drops everything until [`Log::reopen`] succeeds.
    pub async fn resume(place: Place) -> Result<(Self, Offsets), LogError> {
        let found = blocking(move || {
            let recovered = offset::recover(&place.record, place.log.as_deref());
            let offsets = recovered.unwrap_or_else(|error| {
                let record = place.record.display();
                tracing::error!(%record, %error, "a log may repeat its last lines");
                Offsets::default()
            });
            let Some(path) = place.log else {
                return Ok((Target::Nowhere, offsets));
            };
            let record = record(&place.record, offsets);
            let target = match open(&path) {
                Ok(file) => begin(path, file, record),
                Err(error) => {
                    tracing::error!(%error, "output is dropped until the log is reopened");
                    Target::Missing(path, record)
                }
            };
            Ok((target, offsets))
        });
        let (target, offsets) = found.await?;
        Ok((Self::of(target), offsets))
    }

    fn of(target: Target) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE);
        tokio::spawn(write(target, receiver));
        Self(sender)
    }

    /// Writes lines; returns when the file has them.
    pub async fn append(&self, lines: Lines) -> Result<(), LogError> {
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
            Request::Reopen(reply) => (tokio::task::spawn_blocking(|| reopen(target)).await, reply),
        };
        let Ok((back, result)) = done else {
            return;
        };
        target = back;
        // Whoever asked may be gone.
        let _ = reply.send(result);
    }
}

fn append(target: &mut Target, lines: &Lines) -> Result<(), LogError> {
    let Target::File { path, file, record } = target else {
        return Ok(());
    };
    let before = file.metadata().map(|metadata| metadata.len());
    file.write_all(&lines.text).map_err(|error| {
        // The lines are written again later; half of them must not stay.
        if let Ok(length) = before {
            let _ = file.set_len(length);
        }
        failed(path, &error)
    })?;
    if let Some(kept) = record {
        kept.advance(lines.stream, lines.until);
        if let Err(error) = kept.write(file) {
            tracing::error!(log = %path.display(), %error, "the log's offsets are no longer kept");
            *record = None;
        }
    }
    Ok(())
}

fn reopen(target: Target) -> (Target, Result<(), LogError>) {
    match target {
        Target::Nowhere => (Target::Nowhere, Ok(())),
        Target::Missing(path, record) => match open(&path) {
            Ok(file) => (begin(path, file, record), Ok(())),
            Err(error) => (Target::Missing(path, record), Err(error)),
        },
        Target::File { path, file, record } => match open(&path) {
            Ok(fresh) => (begin(path, fresh, record), Ok(())),
            Err(error) => (Target::File { path, file, record }, Err(error)),
        },
    }
}

/// Goes on in a file that was just opened.
fn begin(path: PathBuf, file: File, mut record: Option<Record>) -> Target {
    if let Some(Err(error)) = record.as_ref().map(|record| record.write(&file)) {
        tracing::error!(log = %path.display(), %error, "the log's offsets are not kept");
        record = None;
    }
    Target::File { path, file, record }
}

fn record(path: &Path, offsets: Offsets) -> Option<Record> {
    let created = Record::create(path, offsets);
    let failed =
        |error| tracing::error!(record = %path.display(), %error, "a log's offsets are not kept");
    created.map_err(failed).ok()
}

fn open(path: &Path) -> Result<File, LogError> {
    use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
    let make = || {
        if let Some(directory) = path.parent() {
            let mut builder = std::fs::DirBuilder::new();
            builder.recursive(true).mode(0o755).create(directory)?;
        }
        let mut options = std::fs::OpenOptions::new();
        // Group-readable as other runtimes' logs are: collectors run under a group of their own.
        options.append(true).create(true).mode(0o640).open(path)
    };
    make().map_err(|error| failed(path, &error))
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
    use super::*;

    fn place(directory: &tempfile::TempDir) -> Place {
        Place {
            log: Some(directory.path().join("pod/0.log")),
            record: directory.path().join("offsets"),
        }
    }

    fn lines(text: &str, until: u64) -> Lines {
        Lines {
            stream: Stream::Stdout,
            text: text.into(),
            until,
        }
    }

    #[tokio::test]
    async fn a_reopened_log_leaves_the_renamed_file_alone() {
        let directory = tempfile::tempdir().unwrap();
        let place = place(&directory);
        let path = place.log.clone().unwrap();
        let log = Log::open(place.clone()).await.unwrap();
        log.append(lines("t stdout F one\n", 4)).await.unwrap();
        let rotated = directory.path().join("pod/0.log.1");
        std::fs::rename(&path, &rotated).unwrap();
        log.reopen().await.unwrap();
        assert!(path.exists());
        log.append(lines("t stdout F two\n", 8)).await.unwrap();
        assert_eq!(std::fs::read(&rotated).unwrap(), b"t stdout F one\n");
        assert_eq!(std::fs::read(&path).unwrap(), b"t stdout F two\n");
        let (_, offsets) = Log::resume(place).await.unwrap();
        assert_eq!((offsets.stdout, offsets.stderr), (8, 0));
    }

    #[tokio::test]
    async fn a_log_without_a_path_drops_everything() {
        let directory = tempfile::tempdir().unwrap();
        let log = None;
        let log = Log::open(Place {
            log,
            ..place(&directory)
        })
        .await
        .unwrap();
        log.append(lines("t stdout F one\n", 4)).await.unwrap();
        log.reopen().await.unwrap();
    }

    #[tokio::test]
    async fn a_missing_log_drops_everything_until_it_is_reopened() {
        let directory = tempfile::tempdir().unwrap();
        let place = place(&directory);
        let path = place.log.clone().unwrap();
        std::fs::write(directory.path().join("pod"), "in the way").unwrap();
        let (log, _) = Log::resume(place).await.unwrap();
        log.append(lines("t stdout F one\n", 4)).await.unwrap();
        assert!(log.reopen().await.is_err());
        std::fs::remove_file(directory.path().join("pod")).unwrap();
        log.append(lines("t stdout F two\n", 8)).await.unwrap();
        log.reopen().await.unwrap();
        log.append(lines("t stdout F three\n", 14)).await.unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"t stdout F three\n");
    }
}

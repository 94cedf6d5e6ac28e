//! A container's output streams on their way from the guest to the log.

use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use bulkhead_agent_api::v1::Stdio;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::attach::{self, Outlet};
use super::log::{Lines, LogError, Splitter, Stream, WhenFull};
use crate::streaming::Writer;

/// Bytes taken from a stream at a time.
const CHUNK: usize = 64 << 10;
/// Between attempts to write a log that cannot be written, for want of space perhaps.
const RETRY: Duration = Duration::from_secs(1);
/// Attempts before lines are given up, where a full disk is not to hold a container for ever.
const ATTEMPTS: usize = 10;

/// The agent's name of a stream.
pub fn stdio(stream: Stream) -> Stdio {
    match stream {
        Stream::Stdout => Stdio::Stdout,
        Stream::Stderr => Stdio::Stderr,
    }
}

/// Writes the stream into the log until it ends, and shows it to those who watch. The guest keeps
/// what is not acknowledged, and a byte is acknowledged when the log has it.
pub async fn write_log(mut source: UnixStream, stream: Stream, offset: u64, outlet: Outlet) {
    let mut splitter = Splitter::new(stream, offset);
    let mut buffer = vec![0; CHUNK];
    let mut ended = false;
    while !ended {
        let mut lines = Vec::new();
        let written = splitter.emitted();
        let count = match source.read(&mut buffer).await {
            Ok(count) => count,
            Err(error) => {
                tracing::debug!(%error, "a container's output broke off");
                0
            }
        };
        let bytes = buffer.get(..count).unwrap_or_default();
        match bytes.is_empty() {
            false => splitter.push(bytes, SystemTime::now(), &mut lines),
            true => {
                splitter.end(SystemTime::now(), &mut lines);
                ended = true;
            }
        }
        let until = splitter.emitted();
        if until > written {
            let lines = Lines {
                stream,
                text: lines,
                until,
            };
            match append(&outlet, lines).await {
                Ok(true) => {}
                Ok(false) => outlet.lose(until - written),
                Err(_) => return,
            }
        }
        outlet.audience.tell(stream, bytes).await;
        if until > written && source.write_all(&until.to_le_bytes()).await.is_err() && !ended {
            // The guest is gone; what it has sent is still read to its end.
            tracing::debug!("an acknowledgement of output was not taken");
        }
    }
}

/// Returns whether the log has the lines; an error when there is no log any more.
async fn append(outlet: &Outlet, lines: Lines) -> Result<bool, LogError> {
    let mut attempts = 0;
    loop {
        attempts += 1;
        match outlet.log.append(lines.clone()).await {
            Ok(()) => {
                outlet.losing.store(false, Ordering::Relaxed);
                return Ok(true);
            }
            Err(LogError::Closed) => return Err(LogError::Closed),
            // What follows lost output is not waited for again.
            Err(error)
                if outlet.when_full == WhenFull::Lose
                    && (attempts == ATTEMPTS || outlet.losing.load(Ordering::Relaxed)) =>
            {
                outlet.losing.store(true, Ordering::Relaxed);
                tracing::error!(%error, bytes = lines.text.len(), "output of a container is lost");
                return Ok(false);
            }
            Err(error) => {
                tracing::warn!(%error, "a container's output waits for its log");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// Carries the stream to a client until it ends; what the client does not want is dropped. A byte
/// is acknowledged when the client's connection has it, so that a slow client slows the process.
pub async fn give(mut source: UnixStream, offset: u64, mut target: Option<Writer>) {
    let mut total = offset;
    let mut buffer = vec![0; CHUNK];
    loop {
        let count = match source.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(count) => count,
        };
        attach::write(&mut target, buffer.get(..count).unwrap_or_default()).await;
        total = total.saturating_add(count as u64);
        if source.write_all(&total.to_le_bytes()).await.is_err() {
            tracing::debug!("an acknowledgement of output was not taken");
        }
    }
    if let Some(mut writer) = target {
        // A client that is gone is seen elsewhere.
        let _ = writer.shutdown().await;
    }
}

/// Collects the stream, keeping its first `limit` bytes and dropping the rest.
pub async fn collect(mut source: UnixStream, offset: u64, limit: usize) -> Vec<u8> {
    let mut kept = Vec::new();
    let mut total = offset;
    let mut buffer = vec![0; CHUNK];
    loop {
        let count = match source.read(&mut buffer).await {
            Ok(0) | Err(_) => return kept,
            Ok(count) => count,
        };
        let room = limit.saturating_sub(kept.len());
        kept.extend_from_slice(buffer.get(..count.min(room)).unwrap_or_default());
        total = total.saturating_add(count as u64);
        if source.write_all(&total.to_le_bytes()).await.is_err() {
            tracing::debug!("an acknowledgement of output was not taken");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::log::{Log, Place};
    use super::*;

    #[tokio::test]
    async fn bytes_are_acknowledged_when_the_log_has_them() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("0.log");
        let place = Place {
            log: Some(path.clone()),
            record: directory.path().join("offsets"),
        };
        let log = Log::open(place).await.unwrap();
        let (mut guest, host) = UnixStream::pair().unwrap();
        let outlet = Outlet::new(log, WhenFull::Lose);
        let writer = tokio::spawn(write_log(host, Stream::Stdout, 10, outlet));
        guest.write_all(b"one\ntw").await.unwrap();
        assert_eq!(guest.read_u64_le().await.unwrap(), 14);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.ends_with(" stdout F one\n"), "{text}");
        guest.shutdown().await.unwrap();
        assert_eq!(guest.read_u64_le().await.unwrap(), 16);
        writer.await.unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.ends_with(" stdout P tw\n"), "{text}");
    }

    #[tokio::test]
    async fn what_is_over_the_limit_is_drained_and_dropped() {
        let (mut guest, host) = UnixStream::pair().unwrap();
        let collector = tokio::spawn(collect(host, 0, 3));
        guest.write_all(b"abcdef").await.unwrap();
        assert_eq!(guest.read_u64_le().await.unwrap(), 6);
        guest.shutdown().await.unwrap();
        assert_eq!(collector.await.unwrap(), b"abc");
    }
}

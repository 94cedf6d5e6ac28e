//! A container's output, read from its log as the server writes it.
//!
//! The log's lines have the CRI's form: `TIME stdout|stderr F|P TEXT`, P for a part of a line.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::inotify;
use tokio::io::unix::AsyncFd;

use super::failure::Failure;

/// Lines carry at most 16 KiB of text; one that goes on for longer than this is no log line.
const LINE_BYTES: usize = 64 << 10;

/// One line's text, with its line end when it has one.
#[derive(Debug, PartialEq, Eq)]
enum Output<'a> {
    Out(&'a [u8]),
    Error(&'a [u8]),
}

/// The follower of one log.
pub struct Log {
    path: PathBuf,
    changes: AsyncFd<OwnedFd>,
    file: Option<File>,
    /// What was read behind the last line end.
    rest: Vec<u8>,
}

impl Log {
    /// Follows `path`, which need not exist yet; its directory must. Needs a runtime.
    pub fn open(path: &Path) -> io::Result<Self> {
        let directory = path.parent().ok_or(ErrorKind::InvalidInput)?;
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        let watch = inotify::init(flags)?;
        let events = inotify::WatchFlags::CREATE
            | inotify::WatchFlags::MODIFY
            | inotify::WatchFlags::MOVED_TO;
        inotify::add_watch(&watch, directory, events)?;
        Ok(Self {
            path: path.to_owned(),
            changes: super::sys::readable(watch)?,
            file: None,
            rest: Vec::new(),
        })
    }

    /// Waits until the log may have changed. Nothing is lost when the future is dropped.
    pub async fn changed(&mut self) -> io::Result<()> {
        let mut ready = self.changes.readable().await?;
        let mut events = [0; 4096];
        loop {
            match rustix::io::read(ready.get_inner(), &mut events) {
                Ok(count) if count == events.len() => {}
                Ok(_) | Err(rustix::io::Errno::AGAIN) => {
                    ready.clear_ready();
                    return Ok(());
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Copies what the log has gained to this process's own output. The exit status, or the
    /// failure, where the command has to end.
    pub fn show(&mut self) -> Result<(), Result<u8, Failure>> {
        let result = self.copy(&mut io::stdout().lock(), &mut io::stderr().lock());
        result.map_err(|error| match error.kind() {
            // The reader has gone, as in `bulkhead run … | head`: end as if by SIGPIPE.
            ErrorKind::BrokenPipe => Ok(128 + 13),
            _ => Err(Failure::own(format!(
                "cannot copy the container's output: {error}"
            ))),
        })
    }

    /// Copies what the log has gained since the last call. One that was renamed is read to its end,
    /// then the one in its place.
    fn copy(&mut self, out: &mut impl Write, error: &mut impl Write) -> io::Result<()> {
        loop {
            self.copy_file(out, error)?;
            let Some(file) = &self.file else {
                return Ok(());
            };
            let is = file.metadata()?.ino();
            match std::fs::metadata(&self.path) {
                Ok(named) if named.ino() != is => self.file = None,
                _ => return Ok(()),
            }
        }
    }

    fn copy_file(&mut self, out: &mut impl Write, error: &mut impl Write) -> io::Result<()> {
        if self.file.is_none() {
            match File::open(&self.path) {
                Ok(file) => self.file = Some(file),
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        let Some(file) = &mut self.file else {
            return Ok(());
        };
        let mut buffer = [0; 32 << 10];
        loop {
            let count = file.read(&mut buffer)?;
            let Some(new) = buffer.get(..count).filter(|new| !new.is_empty()) else {
                break;
            };
            self.rest.extend_from_slice(new);
            let mut start = 0;
            while let Some(line) = line_at(&self.rest, start) {
                match parse(line) {
                    Some(Output::Out(text)) => out.write_all(text)?,
                    Some(Output::Error(text)) => error.write_all(text)?,
                    None => {}
                }
                start += line.len();
            }
            self.rest.drain(..start);
            if self.rest.len() > LINE_BYTES {
                return Err(io::Error::other(format!(
                    "{} is not a container's log: a line has no end",
                    self.path.display()
                )));
            }
        }
        out.flush()?;
        error.flush()
    }
}

/// The line that starts at `start`, with its end; `None` when it has none yet.
fn line_at(bytes: &[u8], start: usize) -> Option<&[u8]> {
    let rest = bytes.get(start..)?;
    let end = rest.iter().position(|byte| *byte == b'\n')?;
    rest.get(..=end)
}

/// The text of a line; `None` for one that has not the log's form.
fn parse(line: &[u8]) -> Option<Output<'_>> {
    let mut fields = line.splitn(4, |byte| *byte == b' ');
    let (_time, stream, tags, text) = (
        fields.next()?,
        fields.next()?,
        fields.next()?,
        fields.next()?,
    );
    // Tags are separated by colons; the first says whether the line goes on.
    let text = match tags.split(|byte| *byte == b':').next()? {
        b"F" => text,
        b"P" => text.strip_suffix(b"\n")?,
        _ => return None,
    };
    match stream {
        b"stdout" => Some(Output::Out(text)),
        b"stderr" => Some(Output::Error(text)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use super::*;

    fn append(path: &Path, text: &[u8]) {
        let mut file = OpenOptions::new()
            .append(true)
            .create(true)
            .open(path)
            .unwrap();
        file.write_all(text).unwrap();
    }

    #[test]
    fn parts_are_joined_and_streams_kept_apart() {
        assert_eq!(parse(b"t stdout F a b\n"), Some(Output::Out(b"a b\n")));
        assert_eq!(parse(b"t stderr P half\n"), Some(Output::Error(b"half")));
        assert_eq!(parse(b"t stdout F \n"), Some(Output::Out(b"\n")));
        assert_eq!(parse(b"t stdout P:x y\n"), Some(Output::Out(b"y")));
        for bad in [
            &b"\n"[..],
            b"t stdout\n",
            b"t stdin F x\n",
            b"t stdout Q x\n",
        ] {
            assert_eq!(parse(bad), None);
        }
    }

    #[tokio::test]
    async fn output_arrives_as_it_is_written_even_from_torn_lines() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut log = Log::open(&path).unwrap();
        let (mut out, mut error) = (Vec::new(), Vec::new());
        log.copy(&mut out, &mut error).unwrap();
        append(
            &path,
            b"t stdout P one \nt stderr F bad\nt stdout F two\nt std",
        );
        log.changed().await.unwrap();
        log.copy(&mut out, &mut error).unwrap();
        assert_eq!(
            (out.as_slice(), error.as_slice()),
            (&b"one two\n"[..], &b"bad\n"[..])
        );
        append(&path, b"out F three\n");
        log.changed().await.unwrap();
        log.copy(&mut out, &mut error).unwrap();
        assert_eq!(out, b"one two\nthree\n");
    }

    #[tokio::test]
    async fn a_log_that_is_rotated_is_read_to_its_end_and_then_the_new_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        append(&path, b"t stdout F one\n");
        let mut log = Log::open(&path).unwrap();
        let mut out = Vec::new();
        log.copy(&mut out, &mut Vec::new()).unwrap();
        append(&path, b"t stdout F two\n");
        let old = directory.path().join("log.1");
        std::fs::rename(&path, &old).unwrap();
        append(&old, b"t stdout F three\n");
        append(&path, b"t stdout F four\n");
        log.copy(&mut out, &mut Vec::new()).unwrap();
        assert_eq!(out, b"one\ntwo\nthree\nfour\n");
    }

    #[tokio::test]
    async fn nothing_is_lost_of_a_log_that_grows_fast() {
        const LINES: usize = 50_000;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut log = Log::open(&path).unwrap();
        let writer = std::thread::spawn(move || {
            for number in 0..LINES {
                append(&path, format!("t stdout F {number}\n").as_bytes());
            }
        });
        let mut out = Vec::new();
        while !out.ends_with(format!("\n{}\n", LINES - 1).as_bytes()) {
            log.changed().await.unwrap();
            log.copy(&mut out, &mut Vec::new()).unwrap();
        }
        writer.join().unwrap();
        let expected: String = (0..LINES).map(|number| format!("{number}\n")).collect();
        assert!(out == expected.as_bytes());
    }

    #[tokio::test]
    async fn a_line_without_end_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        append(&path, &vec![b'x'; LINE_BYTES + 1]);
        let mut log = Log::open(&path).unwrap();
        assert!(log.copy(&mut Vec::new(), &mut Vec::new()).is_err());
    }
}

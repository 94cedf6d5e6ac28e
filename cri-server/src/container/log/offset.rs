//! How far each output stream is in a log: kept beside it, so that a server that is killed at any
//! instant is followed by one that neither loses nor repeats a byte.
//!
//! Lines are appended to the log first, then the record says how long it is. What lies behind that
//! length was written by a server that was killed before it could say so: it is counted line by
//! line, and half a line is cut off, for the guest still has its bytes.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::line::{self, Stream};

/// Device, inode, length, and an offset for each stream; 8 bytes each, little endian. So short
/// that it is written in one piece.
const RECORD_BYTES: usize = 40;
/// The most that can lie behind a record's length, in bytes. One append is far less.
const TAIL_BYTES: u64 = 16 << 20;
/// The most files of a log directory that are looked at to find one that was renamed.
const MOST_FILES: usize = 10_000;

/// Bytes of each stream that are in the log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offsets {
    /// Of standard output.
    pub stdout: u64,
    /// Of standard error.
    pub stderr: u64,
}

impl Offsets {
    fn of(&mut self, stream: Stream) -> &mut u64 {
        match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        }
    }
}

/// The record of a log.
#[derive(Debug)]
pub struct Record {
    file: File,
    offsets: Offsets,
}

impl Record {
    /// Begins a record, with so much of the streams in the log already.
    pub fn create(path: &Path, offsets: Offsets) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let options = options.write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(path)?;
        Ok(Self { file, offsets })
    }

    /// The stream is in lines up to `offset`.
    pub fn advance(&mut self, stream: Stream, offset: u64) {
        *self.offsets.of(stream) = offset;
    }

    /// Says that all of this is in `log` as it is now.
    pub fn write(&self, log: &File) -> io::Result<()> {
        let log = log.metadata()?;
        let Offsets { stdout, stderr } = self.offsets;
        let words = [log.dev(), log.ino(), log.len(), stdout, stderr];
        self.file
            .write_all_at(words.map(u64::to_le_bytes).as_flattened(), 0)
    }
}

/// How far the streams are in the log that the record tells of, be it at `log` or renamed. Cuts
/// half a line off.
pub fn recover(record: &Path, log: Option<&Path>) -> io::Result<Offsets> {
    let mut bytes = [0; RECORD_BYTES];
    match File::open(record).and_then(|file| file.read_exact_at(&mut bytes, 0)) {
        Ok(()) => {}
        // A container that was about to start has written nothing yet.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof
            ) =>
        {
            return Ok(Offsets::default());
        }
        Err(error) => return Err(error),
    }
    let (words, _) = bytes.as_chunks::<8>();
    let mut words = words.iter().map(|&word| u64::from_le_bytes(word));
    let mut word = || words.next().unwrap_or_default();
    let (device, inode, length) = (word(), word(), word());
    let mut offsets = Offsets {
        stdout: word(),
        stderr: word(),
    };
    let Some(file) = log
        .map(|log| find(log, device, inode))
        .transpose()?
        .flatten()
    else {
        return Ok(offsets);
    };
    let behind = file.metadata()?.len().saturating_sub(length);
    // No tail of ours is as long.
    if behind == 0 || behind > TAIL_BYTES {
        return Ok(offsets);
    }
    let mut tail = vec![0; usize::try_from(behind).unwrap_or_default()];
    file.read_exact_at(&mut tail, length)?;
    let mut rest = tail.as_slice();
    while let Some((stream, count, next)) = line::take(rest) {
        *offsets.of(stream) += count;
        rest = next;
    }
    if !rest.is_empty() && !rest.contains(&b'\n') {
        file.set_len(length + behind - rest.len() as u64)?;
    }
    Ok(offsets)
}

/// The file with this inode: at `log`, or beside it, since a log is renamed before the server is
/// told (CRI `ReopenContainerLog`).
fn find(log: &Path, device: u64, inode: u64) -> io::Result<Option<File>> {
    let beside = log.parent().map(std::fs::read_dir).transpose();
    let beside = match beside {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let beside = beside.into_iter().flatten().take(MOST_FILES);
    let names = beside.filter_map(|entry| Some(entry.ok()?.path()));
    for path in std::iter::once(log.to_owned()).chain(names) {
        let mut options = OpenOptions::new();
        // Nothing that is no file can hold the open up.
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let opened = options
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path);
        let Ok(file) = opened else { continue };
        let metadata = file.metadata()?;
        if metadata.is_file() && (metadata.dev(), metadata.ino()) == (device, inode) {
            return Ok(Some(file));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use proptest::prelude::*;

    use super::super::line::Splitter;
    use super::*;

    struct Scene {
        directory: tempfile::TempDir,
    }

    impl Scene {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            Self { directory }
        }

        fn log(&self) -> std::path::PathBuf {
            self.directory.path().join("0.log")
        }

        fn record(&self) -> std::path::PathBuf {
            self.directory.path().join("offsets")
        }

        fn recover(&self) -> Offsets {
            recover(&self.record(), Some(&self.log())).unwrap()
        }
    }

    #[test]
    fn a_renamed_log_is_found_and_a_removed_one_is_done_without() {
        let scene = Scene::new();
        std::fs::write(scene.log(), "").unwrap();
        let offsets = Offsets {
            stdout: 7,
            stderr: 9,
        };
        let record = Record::create(&scene.record(), offsets).unwrap();
        record.write(&File::open(scene.log()).unwrap()).unwrap();
        let more = "t stdout F 345\nt stderr P 12\nt stdout F ha";
        std::fs::write(scene.log(), more).unwrap();
        let renamed = scene.directory.path().join("0.log.1");
        std::fs::rename(scene.log(), &renamed).unwrap();
        std::fs::write(scene.log(), "another\n").unwrap();
        let found = Offsets {
            stdout: 11,
            stderr: 11,
        };
        assert_eq!(scene.recover(), found);
        let whole = "t stdout F 345\nt stderr P 12\n";
        assert_eq!(std::fs::read_to_string(&renamed).unwrap(), whole);
        std::fs::remove_file(&renamed).unwrap();
        assert_eq!(scene.recover(), offsets);
    }

    #[test]
    fn without_a_record_nothing_is_in_the_log() {
        let scene = Scene::new();
        std::fs::write(scene.log(), "t stdout F of an earlier attempt\n").unwrap();
        assert_eq!(scene.recover(), Offsets::default());
    }

    proptest! {
        // Each writes files.
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_server_killed_at_any_byte_is_followed_without_loss_or_repetition(
            output in prop::collection::vec(prop::sample::select(b"ab \n".to_vec()), 0..400),
            chunk in 1usize..50,
            kill in 0usize..4000,
        ) {
            let scene = Scene::new();
            let lines = |from: usize, to: usize| {
                let mut splitter = Splitter::new(Stream::Stdout, from as u64);
                let mut lines = Vec::new();
                splitter.push(&output[from..to], UNIX_EPOCH, &mut lines);
                if to == output.len() {
                    splitter.end(UNIX_EPOCH, &mut lines);
                }
                (lines, usize::try_from(splitter.emitted()).unwrap())
            };
            std::fs::write(scene.log(), "").unwrap();
            let mut record = Record::create(&scene.record(), Offsets::default()).unwrap();
            record.write(&File::open(scene.log()).unwrap()).unwrap();
            let (mut given, mut written, mut bytes) = (0, 0, Vec::new());
            while given < output.len() {
                let to = (given + chunk).min(output.len());
                let (lines, emitted) = lines(written, to);
                given = to;
                let room = kill.saturating_sub(bytes.len());
                bytes.extend_from_slice(&lines[..lines.len().min(room)]);
                std::fs::write(scene.log(), &bytes).unwrap();
                if bytes.len() >= kill {
                    break;
                }
                record.advance(Stream::Stdout, emitted as u64);
                record.write(&File::open(scene.log()).unwrap()).unwrap();
                written = emitted;
            }
            let from = usize::try_from(scene.recover().stdout).unwrap();
            let mut log = std::fs::read(scene.log()).unwrap();
            log.extend(lines(from, output.len()).0);
            let mut joined = Vec::new();
            for line in log.split_inclusive(|&byte| byte == b'\n') {
                let text = line.splitn(4, |&byte| byte == b' ').collect::<Vec<_>>();
                let whole = text[2] == b"F";
                joined.extend_from_slice(&text[3][..text[3].len() - usize::from(!whole)]);
            }
            prop_assert_eq!(joined, output);
        }
    }
}

//! Layers at rest: fetched once, kept packed under the digest of their packed bytes.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::digest::{Digest, Hasher};
use super::error::ImageError;
use super::manifest::{Layer, Packing};
use super::progress::{Progress, ProgressSender, tell};
use super::source::Source;

/// How often a broken connection is taken up again for one layer.
const RESUMES_MAX: u32 = 5;
/// Pieces of a layer under way from the network to the disk.
const PIECES: usize = 16;
/// The largest window a zstd stream may ask for, as a power of two (RFC 8878, 3.1.1.1.2,
/// recommends 8 MiB; `zstd --ultra --long` makes 128 MiB).
const ZSTD_WINDOW_LOG: u32 = 27;

/// What the thread that writes a layer is told.
enum Piece {
    Bytes(Bytes),
    /// The server cannot go on where it stopped: begin anew.
    Restart,
    End,
}

/// Fetches a layer to `to`, through `partial`, which does not outlive the call. The digest and
/// the size have been verified when this returns; until then nothing is at `to`.
pub(super) async fn fetch(
    source: &Source,
    reference: &str,
    layer: &Layer,
    partial: PathBuf,
    to: PathBuf,
    progress: Option<&ProgressSender>,
) -> Result<(), ImageError> {
    let content = layer.content.clone();
    let (pieces, inbox) = mpsc::channel(PIECES);
    let writer = {
        let (reference, digest) = (reference.to_string(), content.digest);
        tokio::task::spawn_blocking(move || write(&reference, digest, inbox, &partial, &to))
    };
    let received = receive(source, reference, layer, &pieces, progress).await;
    drop(pieces);
    let written = writer.await.map_err(|_| ImageError::Stopped)?;
    match (received, written) {
        (Ok(()), written) => written,
        // The writer's reason, say a full disk, explains why the reader had to stop.
        (Err(Stop::WriterEnded), Err(error)) | (Err(Stop::Failed(error)), _) => Err(error),
        (Err(Stop::WriterEnded), Ok(())) => Err(ImageError::Stopped),
    }
}

enum Stop {
    WriterEnded,
    Failed(ImageError),
}

async fn receive(
    source: &Source,
    reference: &str,
    layer: &Layer,
    pieces: &mpsc::Sender<Piece>,
    progress: Option<&ProgressSender>,
) -> Result<(), Stop> {
    let digest = layer.content.digest;
    let size = layer.content.size;
    let send = |piece| async { pieces.send(piece).await.map_err(|_| Stop::WriterEnded) };
    let corrupt = |reason: String| {
        let reference = reference.to_string();
        Stop::Failed(ImageError::Corrupt {
            reference,
            reason: format!("layer {digest}: {reason}"),
        })
    };
    let mut have = 0;
    for resumes in 0.. {
        let mut body = source.blob(&digest, have).await.map_err(Stop::Failed)?;
        if body.offset != have {
            send(Piece::Restart).await?;
            have = body.offset;
        }
        let broken = loop {
            match body.chunk().await {
                Ok(Some(bytes)) => {
                    have = have.saturating_add(bytes.len() as u64);
                    if have > size {
                        return Err(corrupt(format!(
                            "it is longer than the {size} bytes the manifest says"
                        )));
                    }
                    send(Piece::Bytes(bytes)).await?;
                    tell(
                        progress,
                        Progress::Fetched {
                            layer: digest,
                            bytes: have,
                        },
                    );
                }
                Ok(None) => break None,
                Err(broken) => break Some(broken),
            }
        };
        if have == size {
            return send(Piece::End).await;
        }
        if resumes < RESUMES_MAX {
            continue;
        }
        let host = body.host();
        return Err(match broken {
            Some(broken) if broken.silent => Stop::Failed(ImageError::TimedOut {
                reference: reference.to_string(),
                reason: format!(
                    "layer {digest}: {host} stopped sending after {have} of {size} bytes"
                ),
            }),
            Some(broken) => corrupt(format!(
                "{host} broke off after {have} of {size} bytes: {}",
                broken.reason
            )),
            None => corrupt(format!("{host} sent only {have} of {size} bytes")),
        });
    }
    Err(Stop::WriterEnded)
}

/// A file that is removed again unless it is kept.
pub(super) struct Partial {
    path: PathBuf,
    kept: bool,
}

impl Partial {
    pub fn new(path: &Path) -> Partial {
        Partial {
            path: path.to_path_buf(),
            kept: false,
        }
    }

    /// Gives the file its final name, durably.
    pub fn keep(mut self, to: &Path) -> Result<(), ImageError> {
        std::fs::rename(&self.path, to).map_err(|e| ImageError::io("create", to, e))?;
        self.kept = true;
        sync_directory_of(to)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.kept {
            std::fs::remove_file(&self.path).ok();
        }
    }
}

/// Makes the names in the directory of `path` durable.
pub(super) fn sync_directory_of(path: &Path) -> Result<(), ImageError> {
    let Some(directory) = path.parent() else {
        return Ok(());
    };
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| ImageError::io("make durable", directory, error))
}

fn write(
    reference: &str,
    digest: Digest,
    mut inbox: mpsc::Receiver<Piece>,
    partial: &Path,
    to: &Path,
) -> Result<(), ImageError> {
    let failed = |error| ImageError::io("write", to, error);
    let create = || {
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(partial)
    };
    let guard = Partial::new(partial);
    let mut file = create().map_err(failed)?;
    let mut hasher = Hasher::new();
    loop {
        match inbox.blocking_recv() {
            Some(Piece::Bytes(bytes)) => {
                hasher.update(&bytes);
                file.write_all(&bytes).map_err(failed)?;
            }
            Some(Piece::Restart) => {
                file = create().map_err(failed)?;
                hasher = Hasher::new();
            }
            Some(Piece::End) => break,
            // The pull was given up.
            None => return Err(ImageError::Stopped),
        }
    }
    let found = hasher.finish();
    if found != digest {
        return Err(ImageError::Corrupt {
            reference: reference.to_string(),
            reason: format!("layer {digest}: the registry sent content with the digest {found}"),
        });
    }
    file.sync_all().map_err(failed)?;
    guard.keep(to)
}

/// A layer's tar stream: unpacked, bounded and hashed while it is read.
pub(super) struct Unpacked {
    stream: Box<dyn Read>,
    hasher: Hasher,
    left: u64,
    limit: u64,
}

impl Unpacked {
    /// Opens the layer at `path`. The tar stream may have `limit` bytes; one more is an error.
    pub fn open(path: &Path, packing: Packing, limit: u64) -> io::Result<Unpacked> {
        let file = BufReader::with_capacity(256 << 10, File::open(path)?);
        let stream: Box<dyn Read> = match packing {
            Packing::Plain => Box::new(file),
            // Several members one after another are one stream (RFC 1952, 2.2).
            Packing::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
            Packing::Zstd => {
                let mut decoder = zstd::Decoder::with_buffer(file)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG)?;
                Box::new(decoder)
            }
        };
        Ok(Unpacked {
            stream,
            hasher: Hasher::new(),
            left: limit,
            limit,
        })
    }

    /// The digest of what has been read: at the end, the layer's diffID.
    pub fn digest(self) -> Digest {
        self.hasher.finish()
    }
}

impl Read for Unpacked {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.stream.read(buffer)?;
        self.left = self.left.checked_sub(read as u64).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("it unpacks to more than {} bytes", self.limit),
            )
        })?;
        self.hasher.update(buffer.get(..read).unwrap_or_default());
        Ok(read)
    }
}

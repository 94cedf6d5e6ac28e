//! The disk of an image: one EROFS file system made of its layers.

use std::fs::{File, OpenOptions, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::runtime::Handle;

use super::ImageId;
use super::digest::Digest;
use super::error::ImageError;
use super::layer::{Partial, Unpacked};
use super::manifest::Packing;
use super::progress::{Progress, ProgressSender, tell};
use super::tree::{Tree, TreeError, TreeLimits};

const PROGRAM: &str = "mkfs.erofs";
const PACKAGE: &str = "erofs-utils";
/// Block size of the file system, and what the disk's length is a multiple of, in bytes.
pub(super) const BLOCK: u64 = 4096;
/// The end of the program's messages that goes into an error, in bytes.
const MESSAGES_MAX: usize = 2048;

/// A packed layer and what it must unpack to.
#[derive(Clone, Debug)]
pub(super) struct Ingredient {
    pub path: PathBuf,
    pub digest: Digest,
    pub packing: Packing,
    pub diff_id: Digest,
}

/// What a disk is made from, and where.
pub(super) struct Recipe {
    /// For messages.
    pub reference: String,
    pub id: ImageId,
    /// From the lowest to the uppermost.
    pub layers: Vec<Ingredient>,
    /// A path for temporary files; names are made by adding to it.
    pub scratch: PathBuf,
    pub limits: TreeLimits,
    /// Bytes of one layer's tar stream.
    pub stream_limit: u64,
    /// How long the program may take.
    pub time: Duration,
}

/// A directory tree that is removed in the end.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

/// A tree that may have to go while its maker is given up: not on the async threads.
struct Waiting(Option<Scratch>);

impl Drop for Waiting {
    fn drop(&mut self) {
        if let (Some(scratch), Ok(runtime)) = (self.0.take(), Handle::try_current()) {
            runtime.spawn_blocking(move || drop(scratch));
        }
    }
}

/// Says "stop" to a blocking task when the future that waits for it goes away.
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A disk that has no name in the store yet.
pub(super) struct NewDisk {
    pub file: Partial,
    /// Bytes.
    pub length: u64,
}

/// Makes the disk. Every layer's diffID has been verified when this returns.
pub(super) async fn make(
    recipe: Recipe,
    progress: Option<&ProgressSender>,
) -> Result<NewDisk, ImageError> {
    let recipe = Arc::new(recipe);
    let tree = {
        let recipe = Arc::clone(&recipe);
        let progress = progress.cloned();
        let stop = StopOnDrop(Arc::new(AtomicBool::new(false)));
        let flag = Arc::clone(&stop.0);
        let unpack = move || unpack(&recipe, progress.as_ref(), &|| flag.load(Ordering::Relaxed));
        tokio::task::spawn_blocking(unpack)
            .await
            .map_err(|_| ImageError::Stopped)??
    };
    tell(progress, Progress::Disk);
    let file = recipe.scratch.with_extension("erofs");
    let guard = Partial::new(&file);
    let path = tree.0.join("root");
    let mut tree = Waiting(Some(tree));
    let written = write_erofs(&recipe, &path, &file).await;
    let tree = tree.0.take();
    let finish = move || {
        drop(tree);
        written?;
        let length = settle(&file)?;
        Ok(NewDisk {
            file: guard,
            length,
        })
    };
    tokio::task::spawn_blocking(finish)
        .await
        .map_err(|_| ImageError::Stopped)?
}

fn unpack(
    recipe: &Recipe,
    progress: Option<&ProgressSender>,
    stop: &dyn Fn() -> bool,
) -> Result<Scratch, ImageError> {
    let path = recipe.scratch.with_extension("tree");
    std::fs::create_dir(&path).map_err(|error| ImageError::io("create", &path, error))?;
    let scratch = Scratch(path);
    let path = &scratch.0;
    // The image's root gets its own mode from the layers; nobody else looks inside meanwhile.
    std::fs::set_permissions(path, Permissions::from_mode(0o700))
        .map_err(|error| ImageError::io("create", path, error))?;
    let root = path.join("root");
    std::fs::create_dir(&root).map_err(|error| ImageError::io("create", &root, error))?;
    let mut tree = Tree::new(&root, recipe.limits)
        .map_err(|error| tree_error(recipe, &recipe_digest(recipe), error))?;
    for (index, layer) in recipe.layers.iter().enumerate() {
        let stream = Unpacked::open(&layer.path, layer.packing, recipe.stream_limit)
            .map_err(|error| ImageError::io("read", &layer.path, error))?;
        let stream = tree
            .apply(stream, stop)
            .map_err(|error| tree_error(recipe, &layer.digest, error))?;
        let found = stream.digest();
        if found != layer.diff_id {
            // What is kept may have rotted since it was verified: fetch it anew next time.
            std::fs::remove_file(&layer.path).ok();
            return Err(ImageError::Corrupt {
                reference: recipe.reference.clone(),
                reason: format!(
                    "layer {} unpacks to {found}, but the configuration says {}",
                    layer.digest, layer.diff_id
                ),
            });
        }
        tell(progress, Progress::Unpacked { layers: index + 1 });
    }
    tree.finish()
        .map_err(|error| tree_error(recipe, &recipe_digest(recipe), error))?;
    Ok(scratch)
}

/// The layer an error without one is put down to: the uppermost.
fn recipe_digest(recipe: &Recipe) -> Digest {
    recipe
        .layers
        .last()
        .map_or(*recipe.id.digest(), |layer| layer.digest)
}

fn tree_error(recipe: &Recipe, layer: &Digest, error: TreeError) -> ImageError {
    use super::archive::ArchiveError;
    let reference = recipe.reference.clone();
    match error {
        TreeError::Io {
            action,
            path,
            source,
        } => ImageError::io(action, path, source),
        TreeError::TooLarge(reason) => ImageError::TooLarge {
            reference,
            reason: format!("layer {layer}: {reason}"),
        },
        TreeError::Archive(ArchiveError::Read(error))
            if error.kind() == std::io::ErrorKind::FileTooLarge =>
        {
            ImageError::TooLarge {
                reference,
                reason: format!("layer {layer}: {error}"),
            }
        }
        TreeError::Archive(error) => ImageError::BadLayer {
            reference,
            layer: *layer,
            reason: error.to_string(),
        },
        TreeError::Refused(reason) => ImageError::BadLayer {
            reference,
            layer: *layer,
            reason,
        },
    }
}

/// Runs the program on the tree. Extended inodes hold large owners and times; the UUID is the
/// image's own because overlayfs tells lower file systems apart by it.
async fn write_erofs(recipe: &Recipe, tree: &Path, file: &Path) -> Result<(), ImageError> {
    let failed = |reason: String| ImageError::Program {
        program: PROGRAM,
        id: recipe.id.to_string(),
        reason,
    };
    let mut child = tokio::process::Command::new(PROGRAM)
        .args([
            "--quiet",
            "-d1",
            "--preserve-mtime",
            "-Eforce-inode-extended",
            "-U",
        ])
        .arg(uuid(&recipe.id))
        .arg(file)
        .arg(tree)
        .env_clear()
        .env(
            "PATH",
            std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin".into()),
        )
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => ImageError::MissingProgram {
                program: PROGRAM,
                package: PACKAGE,
            },
            _ => failed(format!("it cannot be started: {error}")),
        })?;
    let stderr = child.stderr.take();
    let run = async {
        let messages = match stderr {
            Some(stderr) => tail(stderr).await,
            None => String::new(),
        };
        child.wait().await.map(|status| (status, messages))
    };
    match tokio::time::timeout(recipe.time, run).await {
        Ok(Ok((status, _))) if status.success() => Ok(()),
        Ok(Ok((_, messages))) if messages.contains("No space left") => Err(ImageError::DiskFull {
            action: "write",
            path: file.to_path_buf(),
        }),
        Ok(Ok((status, messages))) => Err(failed(format!("{status}: {messages}"))),
        Ok(Err(error)) => Err(failed(error.to_string())),
        Err(_) => Err(failed(format!("it took longer than {:?}", recipe.time))),
    }
}

/// Reads all of a stream and keeps its end.
async fn tail(mut stream: impl tokio::io::AsyncRead + Unpin) -> String {
    let mut end = Vec::new();
    let mut buffer = [0u8; 4096];
    while let Ok(read @ 1..) = stream.read(&mut buffer).await {
        end.extend_from_slice(buffer.get(..read).unwrap_or_default());
        end.drain(..end.len().saturating_sub(MESSAGES_MAX));
    }
    String::from_utf8_lossy(&end).trim().to_string()
}

/// Rounds the file up to whole blocks and makes it durable; returns its length.
fn settle(path: &Path) -> Result<u64, ImageError> {
    let failed = |error| ImageError::io("write", path, error);
    let file: File = OpenOptions::new().write(true).open(path).map_err(failed)?;
    let length = file
        .metadata()
        .map_err(failed)?
        .len()
        .next_multiple_of(BLOCK);
    file.set_len(length).map_err(failed)?;
    file.set_permissions(Permissions::from_mode(0o600))
        .map_err(failed)?;
    file.sync_all().map_err(failed)?;
    Ok(length)
}

/// A UUID made from the image's id (RFC 9562, version 8).
fn uuid(id: &ImageId) -> String {
    let mut hex: Vec<u8> = id.digest().hex().into_bytes();
    hex.truncate(32);
    if let Some(version) = hex.get_mut(12) {
        *version = b'8';
    }
    if let Some(variant) = hex.get_mut(16) {
        *variant = b'8';
    }
    for dash in [8, 13, 18, 23] {
        hex.insert(dash, b'-');
    }
    String::from_utf8_lossy(&hex).into_owned()
}

//! The disk of an image: one EROFS file system made of its layers.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::ImageId;
use super::bodies::{Bodies, DiskError};
use super::digest::Digest;
use super::error::ImageError;
use super::layer::{Partial, Unpacked};
use super::manifest::Packing;
use super::progress::{Progress, ProgressSender, tell};
use super::tree::{Tree, TreeError, TreeLimits};

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
    let progress = progress.cloned();
    let stop = StopOnDrop(Arc::new(AtomicBool::new(false)));
    let flag = Arc::clone(&stop.0);
    let write = move || write(&recipe, progress.as_ref(), &|| flag.load(Ordering::Relaxed));
    tokio::task::spawn_blocking(write)
        .await
        .map_err(|_| ImageError::Stopped)?
}

fn write(
    recipe: &Recipe,
    progress: Option<&ProgressSender>,
    stop: &dyn Fn() -> bool,
) -> Result<NewDisk, ImageError> {
    let path = recipe.scratch.with_extension("erofs");
    let file = Partial::new(&path);
    let mut bodies =
        Bodies::create(&path).map_err(|error| ImageError::io("create", &path, error))?;
    let mut tree = Tree::new(recipe.limits);
    for (index, layer) in recipe.layers.iter().enumerate() {
        let stream = Unpacked::open(&layer.path, layer.packing, recipe.stream_limit)
            .map_err(|error| ImageError::io("read", &layer.path, error))?;
        let stream = tree
            .apply(Watched { stream, stop }, &mut bodies)
            .map_err(|error| tree_error(recipe, &layer.digest, error))?;
        let found = stream.stream.digest();
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
    tell(progress, Progress::Disk);
    let length = bodies
        .finish(&tree.finish(), uuid(&recipe.id))
        .map_err(|error| disk_error(recipe, &path, error))?;
    Ok(NewDisk { file, length })
}

/// A stream that ends with an error when its reader is to stop.
struct Watched<'a, R> {
    stream: R,
    stop: &'a dyn Fn() -> bool,
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if (self.stop)() {
            return Err(io::Error::other("the pull was given up"));
        }
        self.stream.read(buffer)
    }
}

fn disk_error(recipe: &Recipe, path: &Path, error: DiskError) -> ImageError {
    match error {
        DiskError::Write(source) => ImageError::io("write", path, source),
        DiskError::Layout(error) => ImageError::BadLayer {
            reference: recipe.reference.clone(),
            layer: recipe_digest(recipe),
            reason: error.to_string(),
        },
    }
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
        TreeError::Write { path, source } => ImageError::io("write", path, source),
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

/// A UUID made from the image's id (RFC 9562, version 8): overlayfs tells lower file systems apart
/// by it.
fn uuid(id: &ImageId) -> [u8; 16] {
    let mut uuid = [0; 16];
    for (to, from) in uuid.iter_mut().zip(id.digest().bytes()) {
        *to = *from;
    }
    for (at, mask, value) in [(6, 0x0f, 0x80), (8, 0x3f, 0x80)] {
        if let Some(byte) = uuid.get_mut(at) {
            *byte = *byte & mask | value;
        }
    }
    uuid
}

//! Where the store keeps what, and its index. Under `images/`:
//!
//! | path | contents |
//! |---|---|
//! | `index.json` | names, layers and disk of every image; replaced as a whole by rename |
//! | `configs/sha256/<hex>` | the configuration, whose digest is the image's id |
//! | `layers/sha256/<hex>` | packed layers, by the digest of the packed bytes |
//! | `disks/<hex>.erofs` | one disk per image, by image id |
//! | `tmp/` | what is being made; emptied at start |
//! | `lock` | held by the process that has the store open |
//!
//! The index is the truth: a file it does not name is rubbish, and is swept away. So a kill at
//! any instant leaves either the old state or the new one.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Serialize};

use super::ImageId;
use super::digest::Digest;
use super::error::ImageError;
use super::layer::{Partial, sync_directory_of};
use super::manifest::Content;

/// The layout described above.
const VERSION: u32 = 1;

/// Where the store's files are.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    root: PathBuf,
}

impl Layout {
    pub fn new(root: &Path) -> Layout {
        Layout {
            root: root.to_path_buf(),
        }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn index(&self) -> PathBuf {
        self.root.join("index.json")
    }

    pub fn configs(&self) -> PathBuf {
        self.root.join("configs/sha256")
    }

    pub fn layers(&self) -> PathBuf {
        self.root.join("layers/sha256")
    }

    pub fn disks(&self) -> PathBuf {
        self.root.join("disks")
    }

    pub fn config(&self, id: &ImageId) -> PathBuf {
        self.configs().join(id.digest().hex())
    }

    pub fn layer(&self, digest: &Digest) -> PathBuf {
        self.layers().join(digest.hex())
    }

    pub fn disk(&self, id: &ImageId) -> PathBuf {
        self.disks().join(disk_name(id))
    }

    pub fn temporary(&self, name: &str) -> PathBuf {
        self.root.join("tmp").join(name)
    }
}

pub(super) fn disk_name(id: &ImageId) -> String {
    format!("{}.erofs", id.digest().hex())
}

#[derive(Serialize, Deserialize)]
struct Index {
    version: u32,
    images: Vec<Record>,
}

/// One image in the index.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub id: ImageId,
    pub tags: BTreeSet<String>,
    pub digests: BTreeSet<String>,
    pub layers: Vec<RecordedLayer>,
    /// Length of the disk in bytes.
    pub disk: u64,
    #[serde(default)]
    pub state: State,
}

/// A layer of an image, from the lowest to the uppermost.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct RecordedLayer {
    pub digest: Digest,
    /// Packed bytes.
    pub size: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum State {
    /// To be seen by all.
    #[default]
    Listed,
    /// Removed by its user; the disk stays for those who hold a lease.
    Removed,
}

pub(super) fn lock(path: &Path) -> Result<File, ImageError> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|error| ImageError::io("open", path, error))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(ImageError::InUse(
            path.parent().unwrap_or(path).to_path_buf(),
        )),
        Err(errno) => Err(ImageError::io("lock", path, errno.into())),
    }
}

pub(super) fn read_index(path: &Path) -> Result<Vec<Record>, ImageError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(ImageError::io("read", path, error)),
    };
    let index: Index = serde_json::from_slice(&bytes)
        .map_err(|error| ImageError::io("understand", path, error.into()))?;
    if index.version != VERSION {
        let reason = format!(
            "its version is {}, this program knows {VERSION}",
            index.version
        );
        return Err(ImageError::io(
            "understand",
            path,
            std::io::Error::other(reason),
        ));
    }
    Ok(index.images)
}

/// Replaces the index.
pub(super) fn write_index(layout: &Layout, images: Vec<Record>) -> Result<(), ImageError> {
    let path = layout.index();
    let index = Index {
        version: VERSION,
        images,
    };
    let bytes = serde_json::to_vec_pretty(&index)
        .map_err(|error| ImageError::io("write", &path, error.into()))?;
    replace(&path, &layout.temporary("index"), &bytes)
}

/// Reads an image's configuration and looks whether its files are as recorded.
pub(super) fn read_config(layout: &Layout, record: &Record) -> Result<ImageConfiguration, String> {
    let disk = layout.disk(&record.id);
    let length = fs::metadata(&disk)
        .map_err(|error| format!("{}: {error}", disk.display()))?
        .len();
    if length != record.disk {
        return Err(format!(
            "{} has {length} bytes, not {}",
            disk.display(),
            record.disk
        ));
    }
    let path = layout.config(&record.id);
    let bytes = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    if Digest::of(&bytes) != *record.id.digest() {
        return Err(format!("{} has been changed", path.display()));
    }
    serde_json::from_slice(&bytes).map_err(|error| format!("{}: {error}", path.display()))
}

/// Writes a file so that there is the old or the new one whatever happens.
pub(super) fn replace(path: &Path, temporary: &Path, bytes: &[u8]) -> Result<(), ImageError> {
    let guard = Partial::new(temporary);
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(temporary)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        })
        .map_err(|error| ImageError::io("write", path, error))?;
    guard.keep(path)
}

pub(super) fn names(directory: &Path) -> Result<Vec<std::ffi::OsString>, ImageError> {
    fs::read_dir(directory)
        .and_then(|entries| {
            entries
                .map(|entry| entry.map(|entry| entry.file_name()))
                .collect()
        })
        .map_err(|error| ImageError::io("list", directory, error))
}

pub(super) fn remove_others(directory: &Path, keep: &BTreeSet<String>) -> Result<(), ImageError> {
    let mut removed = false;
    for name in names(directory)? {
        if name.to_str().is_some_and(|name| keep.contains(name)) {
            continue;
        }
        let path = directory.join(name);
        fs::remove_file(&path).map_err(|error| ImageError::io("remove", &path, error))?;
        removed = true;
    }
    if removed {
        sync_directory_of(&directory.join("any"))
    } else {
        Ok(())
    }
}

impl From<&Content> for RecordedLayer {
    fn from(content: &Content) -> RecordedLayer {
        RecordedLayer {
            digest: content.digest,
            size: content.size,
        }
    }
}

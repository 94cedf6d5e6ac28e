//! What can go wrong with an image.

use std::io;
use std::path::{Path, PathBuf};

use super::digest::Digest;

/// An error of the image store, in words for the operator.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The text is not the name of an image.
    #[error("`{reference}` is not an image reference: {reason}")]
    BadReference {
        /// What was asked for.
        reference: String,
        /// Which rule it breaks.
        reason: String,
    },
    /// The registries answered, but have no such image.
    #[error("image {reference} was not found: {reason}")]
    NotFound {
        /// What was asked for.
        reference: String,
        /// What each registry said.
        reason: String,
    },
    /// The store has no such image.
    #[error("image {name} is not in the store: pull it first")]
    Unknown {
        /// Name or id.
        name: String,
    },
    /// No registry could be reached, or none was able to serve. The first word is the one the
    /// kubelet looks for.
    #[error("RegistryUnavailable: pulling {reference}: {reason}")]
    Unavailable {
        /// What was asked for.
        reference: String,
        /// What was tried, by host, and what happened.
        reason: String,
    },
    /// Something took longer than its limit.
    #[error("pulling {reference}: {reason}")]
    TimedOut {
        /// What was asked for.
        reference: String,
        /// What took too long, where, and its limit.
        reason: String,
    },
    /// The registry wants other credentials.
    #[error("pulling {reference}: access was denied: {reason}")]
    Denied {
        /// What was asked for.
        reference: String,
        /// What the registry said.
        reason: String,
    },
    /// The bytes are not the ones the digest or the manifest promises.
    #[error("pulling {reference}: {reason}")]
    Corrupt {
        /// What was asked for.
        reference: String,
        /// What is wrong with which content.
        reason: String,
    },
    /// The image is of a kind that cannot be run here.
    #[error("image {reference} cannot be used: {reason}")]
    Unsupported {
        /// What was asked for.
        reference: String,
        /// Which property.
        reason: String,
    },
    /// The image exceeds a limit of the store.
    #[error("image {reference} is refused: {reason}")]
    TooLarge {
        /// What was asked for.
        reference: String,
        /// Which limit.
        reason: String,
    },
    /// A layer is not a well-formed archive, or reaches for what is not its own.
    #[error("image {reference} is refused: layer {layer}: {reason}")]
    BadLayer {
        /// What was asked for.
        reference: String,
        /// The layer.
        layer: Digest,
        /// What is wrong with it.
        reason: String,
    },
    /// The file system of the store is full.
    #[error("no space left to {action} {}: free space on that file system or remove images", path.display())]
    DiskFull {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
    },
    /// A file of the store could not be used.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Another process has the store open.
    #[error("the image store {} is in use by another process", .0.display())]
    InUse(PathBuf),
    /// The `[registry]` configuration is wrong.
    #[error("configuration of registry {host}: {reason}")]
    Configuration {
        /// The section.
        host: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The store has been shut down.
    #[error("the image store has stopped")]
    Stopped,
}

impl ImageError {
    /// Wraps an I/O error with the path it is about; a full disk is told apart.
    pub(super) fn io(action: &'static str, path: impl AsRef<Path>, source: io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                ImageError::DiskFull { action, path }
            }
            _ => ImageError::Io {
                action,
                path,
                source,
            },
        }
    }
}

//! How far a pull has come.

use super::digest::Digest;

/// One step of a pull.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The manifest is known: the layers and their compressed sizes in bytes.
    Layers(Vec<(Digest, u64)>),
    /// So many bytes of a layer are here.
    Fetched {
        /// The layer.
        layer: Digest,
        /// Bytes here, at most the layer's size.
        bytes: u64,
    },
    /// So many layers have been put on top of each other.
    Unpacked {
        /// Layers done.
        layers: usize,
    },
    /// The disk is being written.
    Disk,
}

/// Where [`Progress`] goes. A receiver that is slow misses steps; the pull never waits for it.
pub type ProgressSender = tokio::sync::mpsc::Sender<Progress>;

/// Sends a step to whoever listens.
pub(super) fn tell(sender: Option<&ProgressSender>, progress: Progress) {
    if let Some(sender) = sender {
        // A full channel or a receiver that left: progress is a courtesy.
        sender.try_send(progress).ok();
    }
}

//! The image store's public face.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, oneshot};

use super::auth::Credentials;
use super::catalogue::Catalogue;
use super::digest::{Digest, DigestError};
use super::error::ImageError;
use super::index::{Layout, Record};
use super::progress::ProgressSender;
use super::pull::{Pull, Turns};
use super::reference::Reference;
use super::registry::{Network, Patience, Registries};
use super::tree::TreeLimits;

/// Names an image: the digest of its configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ImageId(Digest);

impl ImageId {
    /// The digest of the configuration.
    pub fn digest(&self) -> &Digest {
        &self.0
    }
}

impl From<Digest> for ImageId {
    fn from(digest: Digest) -> ImageId {
        ImageId(digest)
    }
}

impl FromStr for ImageId {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<ImageId, DigestError> {
        text.parse().map(ImageId)
    }
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An image in the store.
#[derive(Clone, Debug)]
pub struct Image {
    /// Its id everywhere in the CRI.
    pub id: ImageId,
    /// Full names with a tag.
    pub tags: Vec<String>,
    /// Full names with the digest of the manifest or index they led to.
    pub digests: Vec<String>,
    /// Bytes on this machine: the disk and the packed layers.
    pub size: u64,
    /// The configuration the image came with.
    pub config: Arc<ImageConfiguration>,
    /// The user of the configuration.
    pub user: ImageUser,
    /// The root file system.
    pub disk: ImageDisk,
}

impl Image {
    pub(super) fn new(record: &Record, config: Arc<ImageConfiguration>, disk: PathBuf) -> Image {
        let layers: u64 = record.layers.iter().map(|layer| layer.size).sum();
        let user = config
            .config()
            .as_ref()
            .and_then(|config| config.user().as_deref());
        Image {
            id: record.id,
            tags: record.tags.iter().cloned().collect(),
            digests: record.digests.iter().cloned().collect(),
            size: record.disk.saturating_add(layers),
            user: ImageUser::parse(user.unwrap_or_default()),
            disk: ImageDisk {
                extents: vec![Extent {
                    path: disk,
                    offset: 0,
                    length: record.disk,
                }],
                serial: record
                    .id
                    .digest()
                    .hex()
                    .chars()
                    .take(SERIAL_LENGTH)
                    .collect(),
            },
            config,
        }
    }
}

/// Bytes of a virtio-blk serial (virtio 1.2, 5.2.6.1, VIRTIO_BLK_T_GET_ID).
const SERIAL_LENGTH: usize = 20;

/// The user an image wants to be: the part of `User` before the colon.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ImageUser {
    /// The image does not say: root.
    #[default]
    Unset,
    /// A user id.
    Uid(u32),
    /// A name of the image's `/etc/passwd`.
    Name(String),
}

impl ImageUser {
    fn parse(user: &str) -> ImageUser {
        let user = user.split(':').next().unwrap_or_default();
        match user.parse() {
            _ if user.is_empty() => ImageUser::Unset,
            // No process can have others: nobody shall take it for a user that is not root.
            Ok(uid) if uid <= i32::MAX as u32 => ImageUser::Uid(uid),
            _ => ImageUser::Name(user.to_string()),
        }
    }
}

/// A read-only EROFS disk made of parts of files, one after another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageDisk {
    /// The parts in their order.
    pub extents: Vec<Extent>,
    /// 20 ASCII characters the guest knows the disk by.
    pub serial: String,
}

/// A part of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The file.
    pub path: PathBuf,
    /// First byte; a multiple of 4096.
    pub offset: u64,
    /// Bytes; a multiple of 4096.
    pub length: u64,
}

/// How full the store is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageFsUsage {
    /// The store's directory.
    pub mountpoint: PathBuf,
    /// Bytes its files take.
    pub bytes: u64,
    /// Its files.
    pub inodes: u64,
}

/// How much an image may ask of the machine.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of a manifest or index.
    pub manifest: u64,
    /// Bytes of a configuration.
    pub config: u64,
    /// Bytes of one layer, packed or not, and of all files together.
    pub unpacked: u64,
    /// Files and directories, all layers together.
    pub files: u64,
    /// Directories below each other.
    pub depth: u32,
    /// To connect to a registry.
    pub connect: Duration,
    /// Between two signs of life from a registry.
    pub idle: Duration,
    /// For a whole pull.
    pub pull: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            manifest: 4 << 20,
            config: 8 << 20,
            unpacked: 64 << 30,
            files: 2_000_000,
            depth: 256,
            connect: Duration::from_secs(10),
            idle: Duration::from_secs(30),
            pull: Duration::from_secs(60 * 60),
        }
    }
}

/// Bytes that the tree of one image may take in memory: a million files or so.
const TREE_MEMORY: usize = 512 << 20;
/// Disks that are made at a time, each with its tree.
const DISKS_AT_A_TIME: usize = 2;

impl Limits {
    pub(super) fn tree(&self) -> TreeLimits {
        TreeLimits {
            bytes: self.unpacked,
            members: self.files,
            depth: self.depth,
            memory: TREE_MEMORY,
        }
    }
}

/// The images of this machine. Cheap to clone; all clones are one store.
#[derive(Clone)]
pub struct ImageStore {
    librarian: Arc<Librarian>,
    shared: Arc<Shared>,
}

/// What pulls need of the store.
pub(super) struct Shared {
    pub layout: Layout,
    pub network: Network,
    pub turns: Turns,
    /// A place for each disk that is made.
    pub disks: Semaphore,
    pub limits: Limits,
}

impl ImageStore {
    /// Opens the store in `root/images`, which is made if it is missing; what an earlier
    /// process left half done is removed. One process can have it open.
    ///
    /// # Errors
    /// If the directory cannot be used, or `registries` is wrong.
    pub fn open(root: &Path, registries: Registries) -> Result<ImageStore, ImageError> {
        ImageStore::open_with(root, registries, Limits::default())
    }

    /// As [`ImageStore::open`], with limits of one's own.
    ///
    /// # Errors
    /// As [`ImageStore::open`].
    pub fn open_with(
        root: &Path,
        registries: Registries,
        limits: Limits,
    ) -> Result<ImageStore, ImageError> {
        let patience = Patience {
            connect: limits.connect,
            idle: limits.idle,
        };
        let network = Network::new(registries, patience)?;
        let catalogue = Catalogue::open(&root.join("images"))?;
        let layout = catalogue.layout().clone();
        let librarian = Arc::new(Librarian::start(catalogue)?);
        let shared = Arc::new(Shared {
            layout,
            network,
            turns: Turns::default(),
            disks: Semaphore::new(DISKS_AT_A_TIME),
            limits,
        });
        Ok(ImageStore { librarian, shared })
    }

    /// Fetches an image, or what of it is missing, and makes its disk. Returns it once it is
    /// durable. Pulls of the same image or layers share the work.
    ///
    /// # Errors
    /// [`ImageError`] tells apart what the caller can do something about; nothing of a failed
    /// pull is to be seen, and only whole layers of one that lost its registry are kept.
    pub async fn pull(
        &self,
        reference: &str,
        auth: Option<Credentials>,
        progress: Option<ProgressSender>,
    ) -> Result<Image, ImageError> {
        let reference = Reference::parse(reference)?;
        let pull = Pull {
            librarian: Arc::clone(&self.librarian),
            store: Arc::clone(&self.shared),
            source: Arc::new(self.shared.network.source(&reference, auth)?),
            reference: reference.clone(),
            progress,
        };
        let limit = self.shared.limits.pull;
        match tokio::time::timeout(limit, pull.run()).await {
            Ok(result) => result,
            Err(_) => Err(ImageError::TimedOut {
                reference: reference.to_string(),
                reason: format!("it took longer than {limit:?} in all"),
            }),
        }
    }

    /// Looks an image up by tag, by digest reference, by id, or by the first digits of its id
    /// if they fit no other.
    pub async fn get(&self, name_or_id: &str) -> Option<Image> {
        let name_or_id = name_or_id.to_string();
        self.librarian
            .ask(move |catalogue| catalogue.get(&name_or_id))
            .await
            .ok()
            .flatten()
    }

    /// All images.
    pub async fn list(&self) -> Vec<Image> {
        self.librarian
            .ask(|catalogue| catalogue.list())
            .await
            .unwrap_or_default()
    }

    /// Removes an image with all its names. One that is not here is removed already. The disk
    /// of an image that is leased goes when its last lease ends.
    ///
    /// # Errors
    /// If the store cannot be written.
    pub async fn remove(&self, name_or_id: &str) -> Result<(), ImageError> {
        let name_or_id = name_or_id.to_string();
        self.librarian
            .ask(move |catalogue| catalogue.remove(&name_or_id))
            .await?
    }

    /// Keeps the image's disk from being removed while the value lives.
    ///
    /// # Errors
    /// [`ImageError::Unknown`].
    pub async fn lease(&self, id: &ImageId) -> Result<Lease, ImageError> {
        let id = *id;
        let librarian = Arc::clone(&self.librarian);
        // The answer is the lease itself: if nobody waits for it any more, it ends at once.
        self.librarian
            .ask(move |catalogue| catalogue.lease(&id).map(|()| Lease { librarian, id }))
            .await?
    }

    /// As [`ImageStore::lease`], for a user that had a lease before this process started: the
    /// image may have been removed meanwhile, but its disk is still there.
    ///
    /// # Errors
    /// [`ImageError::Unknown`].
    pub async fn lease_again(&self, id: &ImageId) -> Result<Lease, ImageError> {
        self.lease(id).await
    }

    /// Says that every user from before the start has its lease again: the disks of removed
    /// images without a lease go.
    ///
    /// # Errors
    /// If the store cannot be written.
    pub async fn leases_complete(&self) -> Result<(), ImageError> {
        self.librarian.ask(Catalogue::drop_removed).await?
    }

    /// How full the store is.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub async fn usage(&self) -> Result<ImageFsUsage, ImageError> {
        self.librarian.ask(|catalogue| catalogue.usage()).await?
    }
}

/// Keeps an image's disk in place while it lives.
pub struct Lease {
    librarian: Arc<Librarian>,
    id: ImageId,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let id = self.id;
        self.librarian
            .tell(move |catalogue| catalogue.end_lease(&id));
    }
}

type Question = Box<dyn FnOnce(&mut Catalogue) + Send>;

/// The thread that owns the [`Catalogue`]. It ends when nobody can ask it any more.
pub(super) struct Librarian {
    questions: Option<mpsc::Sender<Question>>,
    thread: Option<JoinHandle<()>>,
}

impl Librarian {
    fn start(mut catalogue: Catalogue) -> Result<Librarian, ImageError> {
        let (questions, inbox) = mpsc::channel::<Question>();
        let root = catalogue.layout().root().to_path_buf();
        let thread = std::thread::Builder::new()
            .name("images".to_string())
            .spawn(move || {
                for question in inbox {
                    question(&mut catalogue);
                }
            })
            .map_err(|error| ImageError::io("start the thread of", root, error))?;
        Ok(Librarian {
            questions: Some(questions),
            thread: Some(thread),
        })
    }

    /// Has `question` answered.
    pub async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut Catalogue) -> T + Send + 'static,
    ) -> Result<T, ImageError> {
        let (answer, receiver) = oneshot::channel();
        self.tell(move |catalogue| {
            // Whoever asked may have left.
            answer.send(question(catalogue)).ok();
        });
        receiver.await.map_err(|_| ImageError::Stopped)
    }

    /// Has `action` done at some time; later questions come after it.
    pub fn tell(&self, action: impl FnOnce(&mut Catalogue) + Send + 'static) {
        if let Some(questions) = &self.questions {
            // If the thread is gone there is nothing left to keep up to date.
            questions.send(Box::new(action)).ok();
        }
    }
}

impl Drop for Librarian {
    fn drop(&mut self) {
        self.questions = None;
        if let Some(thread) = self.thread.take() {
            // So that the lock is free once the last owner is gone. The last may be a lease
            // nobody waited for, which ends on the thread itself.
            if thread.thread().id() != std::thread::current().id() {
                thread.join().ok();
            }
        }
    }
}

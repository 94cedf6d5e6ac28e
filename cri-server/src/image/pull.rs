//! One pull: from a name to an image in the store.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use oci_spec::image::{Arch, ImageConfiguration, Os};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use super::digest::Digest;
use super::disk::{self, Ingredient, Recipe};
use super::error::ImageError;
use super::index::{Record, State};
use super::layer;
use super::manifest::{Content, Document, Layer, ManifestError};
use super::progress::{Progress, ProgressSender, tell};
use super::reference::Reference;
use super::source::Source;
use super::store::{Librarian, Shared};
use super::{Image, ImageId};

/// Layers of one image fetched at a time.
const LAYERS_AT_A_TIME: usize = 3;
/// An index may lead to an index (OCI image-spec `image-index.md`), but not for ever.
const INDEXES_MAX: usize = 2;

static NEXT_TEMPORARY: AtomicU64 = AtomicU64::new(0);

/// Gives those who want the same thing their turns: the second finds what the first has made.
#[derive(Default)]
pub(super) struct Turns(Mutex<HashMap<Thing, Weak<Semaphore>>>);

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Thing {
    Image(Digest),
    Layer(Digest),
}

impl Turns {
    async fn take(&self, thing: Thing) -> Result<OwnedSemaphorePermit, ImageError> {
        let turn = {
            let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            turns.retain(|_, turn| turn.strong_count() > 0);
            match turns.get(&thing).and_then(Weak::upgrade) {
                Some(turn) => turn,
                None => {
                    let turn = Arc::new(Semaphore::new(1));
                    turns.insert(thing, Arc::downgrade(&turn));
                    turn
                }
            }
        };
        turn.acquire_owned().await.map_err(|_| ImageError::Stopped)
    }
}

/// Keeps layers from being swept away while the value lives.
struct Pins {
    librarian: Arc<Librarian>,
    layers: Vec<Digest>,
}

impl Pins {
    async fn new(librarian: &Arc<Librarian>, layers: &[Layer]) -> Result<Pins, ImageError> {
        let layers: Vec<Digest> = layers.iter().map(|layer| layer.content.digest).collect();
        let pins = layers.clone();
        let librarian = Arc::clone(librarian);
        // Sent before the value exists and undone by its end, in this order in any case.
        librarian.tell(move |catalogue| catalogue.pin(&pins));
        let pins = Pins { librarian, layers };
        pins.librarian.ask(|_| ()).await?;
        Ok(pins)
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        let layers = std::mem::take(&mut self.layers);
        self.librarian
            .tell(move |catalogue| catalogue.unpin(&layers));
    }
}

/// One pull.
pub(super) struct Pull {
    pub librarian: Arc<Librarian>,
    pub store: Arc<Shared>,
    pub source: Arc<Source>,
    pub reference: Reference,
    pub progress: Option<ProgressSender>,
}

/// What the registry says an image is made of.
struct Manifest {
    /// Digest of what the name led to, be it a manifest or an index.
    digest: Digest,
    config: Content,
    layers: Vec<Layer>,
}

impl Pull {
    pub async fn run(self) -> Result<Image, ImageError> {
        let manifest = self.manifest().await?;
        let bytes = self
            .source
            .document(&manifest.config, self.store.limits.config)
            .await?;
        let config = self.config(&bytes, manifest.layers.len())?;
        let id = ImageId::from(manifest.config.digest);
        let tag = self.reference.repo_tag();
        let digest = self.reference.repo_digest(&manifest.digest);

        let _turn = self.store.turns.take(Thing::Image(*id.digest())).await?;
        let (known_tag, known_digest) = (tag.clone(), digest.clone());
        if let Some(image) = self
            .librarian
            .ask(move |catalogue| catalogue.add_names(&id, known_tag, known_digest))
            .await??
        {
            return Ok(image);
        }

        let pins = Pins::new(&self.librarian, &manifest.layers).await?;
        let made = self.make(id, &manifest, &config).await;
        let disk = match made {
            Ok(disk) => disk,
            Err(error) => {
                drop(pins);
                // Whole layers wait for another try unless the image itself is at fault.
                if !matches!(
                    error,
                    ImageError::Unavailable { .. } | ImageError::TimedOut { .. }
                ) {
                    self.librarian.ask(|catalogue| catalogue.sweep()).await??;
                }
                return Err(error);
            }
        };
        let record = Record {
            id,
            tags: Default::default(),
            digests: Default::default(),
            layers: manifest
                .layers
                .iter()
                .map(|layer| (&layer.content).into())
                .collect(),
            disk: disk.length,
            state: State::Listed,
        };
        self.librarian
            .ask(move |catalogue| catalogue.add(record, disk.file, &bytes, config, tag, digest))
            .await?
    }

    async fn manifest(&self) -> Result<Manifest, ImageError> {
        let mut version = self.reference.version();
        let mut wanted = self.reference.digest().copied();
        let mut first = None;
        for _ in 0..=INDEXES_MAX {
            let fetched = self
                .source
                .manifest(&version, self.store.limits.manifest)
                .await?;
            let found = Digest::of(&fetched.bytes);
            if wanted.is_some_and(|wanted| wanted != found) {
                return Err(ImageError::Corrupt {
                    reference: self.reference.to_string(),
                    reason: format!(
                        "manifest {version}: the registry sent content with the digest {found}"
                    ),
                });
            }
            let digest = *first.get_or_insert(found);
            match Document::parse(&fetched.bytes, &fetched.content_type) {
                Ok(Document::Manifest { config, layers }) => {
                    return Ok(Manifest {
                        digest,
                        config,
                        layers,
                    });
                }
                Ok(Document::Index(entry)) => {
                    version = entry.digest.to_string();
                    wanted = Some(entry.digest);
                }
                Err(error) => return Err(self.manifest_error(error)),
            }
        }
        Err(self.unsupported("its index leads from index to index".to_string()))
    }

    fn manifest_error(&self, error: ManifestError) -> ImageError {
        let reference = self.reference.to_string();
        match error {
            ManifestError::Malformed(reason) => ImageError::Corrupt { reference, reason },
            ManifestError::Unsupported(reason) => ImageError::Unsupported { reference, reason },
            ManifestError::NoPlatform(_) => ImageError::NotFound {
                reference,
                reason: error.to_string(),
            },
        }
    }

    fn unsupported(&self, reason: String) -> ImageError {
        ImageError::Unsupported {
            reference: self.reference.to_string(),
            reason,
        }
    }

    fn config(&self, bytes: &[u8], layers: usize) -> Result<ImageConfiguration, ImageError> {
        let config: ImageConfiguration = serde_json::from_slice(bytes).map_err(|error| {
            self.unsupported(format!("its configuration is not understood: {error}"))
        })?;
        if *config.os() != Os::Linux || *config.architecture() != Arch::Amd64 {
            return Err(ImageError::NotFound {
                reference: self.reference.to_string(),
                reason: format!(
                    "it is for {}/{}, not for linux/amd64",
                    config.os(),
                    config.architecture()
                ),
            });
        }
        let diff_ids = config.rootfs().diff_ids().len();
        if diff_ids != layers {
            return Err(self.unsupported(format!(
                "its manifest has {layers} layers, but its configuration {diff_ids}"
            )));
        }
        Ok(config)
    }

    async fn make(
        &self,
        id: ImageId,
        manifest: &Manifest,
        config: &ImageConfiguration,
    ) -> Result<disk::NewDisk, ImageError> {
        let limits = &self.store.limits;
        let mut layers = Vec::new();
        for (layer, diff_id) in manifest.layers.iter().zip(config.rootfs().diff_ids()) {
            if layer.content.size > limits.unpacked {
                return Err(ImageError::TooLarge {
                    reference: self.reference.to_string(),
                    reason: format!(
                        "layer {} has more than {} bytes",
                        layer.content.digest, limits.unpacked
                    ),
                });
            }
            layers.push(Ingredient {
                path: self.store.layout.layer(&layer.content.digest),
                digest: layer.content.digest,
                packing: layer.packing,
                diff_id: diff_id.parse().map_err(|error| {
                    self.unsupported(format!("its configuration's diff_ids: {error}"))
                })?,
            });
        }
        self.fetch_layers(&manifest.layers).await?;
        let recipe = Recipe {
            reference: self.reference.to_string(),
            id,
            layers,
            scratch: self.store.layout.temporary(&temporary(id.digest())),
            limits: limits.tree(),
            stream_limit: limits.unpacked,
        };
        let _place = self
            .store
            .disks
            .acquire()
            .await
            .map_err(|_| ImageError::Stopped)?;
        disk::make(recipe, self.progress.as_ref()).await
    }

    async fn fetch_layers(&self, layers: &[Layer]) -> Result<(), ImageError> {
        let sizes = layers
            .iter()
            .map(|layer| (layer.content.digest, layer.content.size));
        tell(self.progress.as_ref(), Progress::Layers(sizes.collect()));
        let at_a_time = Arc::new(Semaphore::new(LAYERS_AT_A_TIME));
        // The first failure ends the others: they are dropped with the set.
        let mut tasks = JoinSet::new();
        for layer in layers {
            let fetch = FetchLayer {
                store: Arc::clone(&self.store),
                source: Arc::clone(&self.source),
                reference: self.reference.to_string(),
                layer: layer.clone(),
                progress: self.progress.clone(),
            };
            let at_a_time = Arc::clone(&at_a_time);
            tasks.spawn(async move {
                let _place = at_a_time
                    .acquire_owned()
                    .await
                    .map_err(|_| ImageError::Stopped)?;
                fetch.run().await
            });
        }
        while let Some(done) = tasks.join_next().await {
            done.map_err(|_| ImageError::Stopped)??;
        }
        Ok(())
    }
}

struct FetchLayer {
    store: Arc<Shared>,
    source: Arc<Source>,
    reference: String,
    layer: Layer,
    progress: Option<ProgressSender>,
}

impl FetchLayer {
    async fn run(self) -> Result<(), ImageError> {
        let Content { digest, size } = self.layer.content;
        let progress = self.progress.as_ref();
        let _turn = self.store.turns.take(Thing::Layer(digest)).await?;
        let path = self.store.layout.layer(&digest);
        // Layers are verified before they get this name.
        if tokio::fs::metadata(&path)
            .await
            .is_ok_and(|found| found.len() == size)
        {
            tell(
                progress,
                Progress::Fetched {
                    layer: digest,
                    bytes: size,
                },
            );
            return Ok(());
        }
        let partial = self.store.layout.temporary(&temporary(&digest));
        layer::fetch(
            &self.source,
            &self.reference,
            &self.layer,
            partial,
            path,
            progress,
        )
        .await
    }
}

/// A name in `tmp/` that nobody else uses, not even the rest of a pull that was given up.
fn temporary(digest: &Digest) -> String {
    format!(
        "{}-{}",
        digest.hex(),
        NEXT_TEMPORARY.fetch_add(1, Ordering::Relaxed)
    )
}

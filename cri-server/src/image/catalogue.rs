//! What the store holds: images by name and id, who uses them, which files belong to them.
//!
//! Everything here runs on one thread, which owns it (see `store`). Where things lie on disk
//! says `index`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use oci_spec::image::ImageConfiguration;

use super::digest::Digest;
use super::error::ImageError;
use super::index::{
    Layout, Record, State, disk_name, lock, names, read_config, read_index, remove_others, replace,
    write_index,
};
use super::layer::Partial;
use super::reference::Reference;
use super::{Image, ImageFsUsage, ImageId};

/// The fewest hexadecimal digits that can stand for an image's id.
const SHORT_ID_MIN: usize = 4;

struct Entry {
    record: Record,
    config: Arc<ImageConfiguration>,
}

/// The state of an open store.
pub(super) struct Catalogue {
    layout: Layout,
    entries: BTreeMap<ImageId, Entry>,
    leases: HashMap<ImageId, usize>,
    /// Layers that pulls under way count on.
    pins: HashMap<Digest, usize>,
    _lock: File,
}

impl Catalogue {
    /// Opens the store in `root`, which is made if it is missing. Images whose files are not
    /// as recorded are left out, and come back by a pull.
    pub fn open(root: &Path) -> Result<Catalogue, ImageError> {
        let layout = Layout::new(root);
        let temporary = root.join("tmp");
        for directory in [
            root,
            &layout.configs(),
            &layout.layers(),
            &layout.disks(),
            &temporary,
        ] {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(directory)
                .map_err(|error| ImageError::io("create", directory, error))?;
        }
        let lock = lock(&root.join("lock"))?;
        for entry in names(&temporary)? {
            let path = temporary.join(entry);
            let removed = if path.is_dir() && !path.is_symlink() {
                fs::remove_dir_all(&path)
            } else {
                fs::remove_file(&path)
            };
            removed.map_err(|error| ImageError::io("remove", &path, error))?;
        }
        let mut entries = BTreeMap::new();
        for record in read_index(&layout.index())? {
            match read_config(&layout, &record) {
                Ok(config) => {
                    entries.insert(
                        record.id,
                        Entry {
                            record,
                            config: Arc::new(config),
                        },
                    );
                }
                Err(reason) => tracing::warn!(
                    "image {} is left out of the store: {reason}; pull it again",
                    record.id
                ),
            }
        }
        let catalogue = Catalogue {
            layout,
            entries,
            leases: HashMap::new(),
            pins: HashMap::new(),
            _lock: lock,
        };
        catalogue.save()?;
        catalogue.sweep()?;
        Ok(catalogue)
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    pub fn get(&self, name_or_id: &str) -> Option<Image> {
        let id = self.find(name_or_id)?;
        self.entries.get(&id).map(|entry| self.image(entry))
    }

    pub fn list(&self) -> Vec<Image> {
        self.listed().map(|entry| self.image(entry)).collect()
    }

    /// Adds names to an image that is here already; `None` if it is not.
    pub fn add_names(
        &mut self,
        id: &ImageId,
        tag: Option<String>,
        digest: String,
    ) -> Result<Option<Image>, ImageError> {
        let Some(entry) = self.entries.get(id) else {
            return Ok(None);
        };
        let (mut record, config) = (entry.record.clone(), Arc::clone(&entry.config));
        record.state = State::Listed;
        self.put(record, config, tag, digest).map(Some)
    }

    /// Adds an image whose layers are in place, and puts its disk and configuration there.
    pub fn add(
        &mut self,
        record: Record,
        disk: Partial,
        config: &[u8],
        parsed: ImageConfiguration,
        tag: Option<String>,
        digest: String,
    ) -> Result<Image, ImageError> {
        let id = record.id;
        let add = || {
            disk.keep(&self.layout.disk(&id))?;
            replace(
                &self.layout.config(&id),
                &self.layout.temporary("config"),
                config,
            )?;
            self.put(record, Arc::new(parsed), tag, digest)
        };
        let added = add();
        if added.is_err() {
            // What is in place already belongs to no image.
            self.sweep()?;
        }
        added
    }

    fn put(
        &mut self,
        mut record: Record,
        config: Arc<ImageConfiguration>,
        tag: Option<String>,
        digest: String,
    ) -> Result<Image, ImageError> {
        let id = record.id;
        record.digests.insert(digest);
        record.tags.extend(tag.clone());
        let before = self.entries.insert(id, Entry { record, config });
        // A tag names one image: it moves.
        let mut bereft = Vec::new();
        if let Some(tag) = tag {
            for (other, entry) in &mut self.entries {
                if *other != id && entry.record.tags.remove(&tag) {
                    bereft.push(*other);
                }
            }
            if let Err(error) = self.save() {
                for other in bereft {
                    if let Some(entry) = self.entries.get_mut(&other) {
                        entry.record.tags.insert(tag.clone());
                    }
                }
                self.put_back(id, before);
                return Err(error);
            }
        } else if let Err(error) = self.save() {
            self.put_back(id, before);
            return Err(error);
        }
        self.entries
            .get(&id)
            .map(|entry| self.image(entry))
            .ok_or(ImageError::Stopped)
    }

    fn put_back(&mut self, id: ImageId, before: Option<Entry>) {
        match before {
            Some(entry) => self.entries.insert(id, entry),
            None => self.entries.remove(&id),
        };
    }

    pub fn remove(&mut self, name_or_id: &str) -> Result<(), ImageError> {
        let Some(id) = self.find(name_or_id) else {
            return Ok(());
        };
        let Some(entry) = self.entries.remove(&id) else {
            return Ok(());
        };
        if self.leases.contains_key(&id) {
            let mut record = entry.record.clone();
            record.state = State::Removed;
            record.tags.clear();
            record.digests.clear();
            self.entries.insert(
                id,
                Entry {
                    record,
                    config: Arc::clone(&entry.config),
                },
            );
        }
        if let Err(error) = self.save() {
            self.entries.insert(id, entry);
            return Err(error);
        }
        self.sweep()
    }

    /// Counts one more user of the disk. Removed images can be leased again after a restart.
    pub fn lease(&mut self, id: &ImageId) -> Result<(), ImageError> {
        if !self.entries.contains_key(id) {
            return Err(ImageError::Unknown {
                name: id.to_string(),
            });
        }
        *self.leases.entry(*id).or_default() += 1;
        Ok(())
    }

    pub fn end_lease(&mut self, id: &ImageId) {
        if !release(&mut self.leases, id) {
            return;
        }
        if self
            .entries
            .get(id)
            .is_some_and(|entry| entry.record.state == State::Removed)
            && let Err(error) = self.drop_removed()
        {
            tracing::warn!("the disk of the removed image {id} stays for now: {error}");
        }
    }

    /// Forgets the removed images that nobody leases.
    pub fn drop_removed(&mut self) -> Result<(), ImageError> {
        self.entries.retain(|id, entry| {
            entry.record.state == State::Listed || self.leases.contains_key(id)
        });
        self.save()?;
        self.sweep()
    }

    pub fn pin(&mut self, layers: &[Digest]) {
        for layer in layers {
            *self.pins.entry(*layer).or_default() += 1;
        }
    }

    pub fn unpin(&mut self, layers: &[Digest]) {
        for layer in layers {
            release(&mut self.pins, layer);
        }
    }

    /// Removes layers, configurations and disks that belong to no image.
    pub fn sweep(&self) -> Result<(), ImageError> {
        let layers: BTreeSet<String> = self
            .listed()
            .flat_map(|entry| entry.record.layers.iter().map(|layer| layer.digest.hex()))
            .chain(self.pins.keys().map(Digest::hex))
            .collect();
        let configs = self.entries.keys().map(|id| id.digest().hex()).collect();
        let disks = self.entries.keys().map(disk_name).collect();
        remove_others(&self.layout.layers(), &layers)?;
        remove_others(&self.layout.configs(), &configs)?;
        remove_others(&self.layout.disks(), &disks)
    }

    pub fn usage(&self) -> Result<ImageFsUsage, ImageError> {
        let mut usage = ImageFsUsage {
            mountpoint: self.layout.root().to_path_buf(),
            bytes: 0,
            inodes: 0,
        };
        let directories = [
            self.layout.root().to_path_buf(),
            self.layout.configs(),
            self.layout.layers(),
            self.layout.disks(),
        ];
        for directory in directories {
            for name in names(&directory)? {
                let Ok(metadata) = fs::symlink_metadata(directory.join(name)) else {
                    continue;
                };
                usage.bytes += metadata.blocks() * 512;
                usage.inodes += 1;
            }
        }
        Ok(usage)
    }

    fn listed(&self) -> impl Iterator<Item = &Entry> {
        self.entries
            .values()
            .filter(|entry| entry.record.state == State::Listed)
    }

    /// By id, name or the beginning of an id, in this order.
    fn find(&self, name_or_id: &str) -> Option<ImageId> {
        let hex = name_or_id.strip_prefix("sha256:").unwrap_or(name_or_id);
        if let Some(digest) = Digest::from_hex(hex) {
            let id = ImageId::from(digest);
            return self
                .listed()
                .any(|entry| entry.record.id == id)
                .then_some(id);
        }
        if let Ok(reference) = Reference::parse(name_or_id) {
            let tag = reference.repo_tag();
            let digest = reference
                .digest()
                .map(|digest| reference.repo_digest(digest));
            let named = self.listed().find(|entry| {
                tag.as_ref()
                    .is_some_and(|tag| entry.record.tags.contains(tag))
                    || digest
                        .as_ref()
                        .is_some_and(|digest| entry.record.digests.contains(digest))
            });
            if let Some(entry) = named {
                return Some(entry.record.id);
            }
        }
        if hex.len() < SHORT_ID_MIN {
            return None;
        }
        let mut matching = self
            .listed()
            .filter(|entry| entry.record.id.digest().hex().starts_with(hex));
        match (matching.next(), matching.next()) {
            (Some(entry), None) => Some(entry.record.id),
            _ => None,
        }
    }

    fn image(&self, entry: &Entry) -> Image {
        Image::new(
            &entry.record,
            Arc::clone(&entry.config),
            self.layout.disk(&entry.record.id),
        )
    }

    fn save(&self) -> Result<(), ImageError> {
        let records = self.entries.values().map(|entry| entry.record.clone());
        write_index(&self.layout, records.collect())
    }
}

/// Takes one from a count; true when it was the last.
fn release<K: Eq + std::hash::Hash>(counts: &mut HashMap<K, usize>, key: &K) -> bool {
    match counts.get_mut(key) {
        Some(count) if *count > 1 => {
            *count -= 1;
            false
        }
        Some(_) => {
            counts.remove(key);
            true
        }
        None => false,
    }
}

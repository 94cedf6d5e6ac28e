//! An image as containers use it.

use std::path::PathBuf;

use bulkhead_vmm_api::OpenDevice;

use super::SandboxError;
use super::boot::blocking;
use crate::container::spec::ImageDefaults;
use crate::image::{Image, ImageDisk, ImageError, ImageId, ImageStore, Lease};

/// An image that stays while this lives.
pub struct Resolved {
    /// Digest of its configuration.
    pub id: String,
    /// Digest of it in its repository, or its id.
    pub reference: String,
    /// What it says about processes.
    pub defaults: ImageDefaults,
    /// The signal it wants to be stopped with.
    pub stop_signal: Option<String>,
    /// The serial of its disk.
    pub serial: String,
    /// What keeps it.
    pub lease: Lease,
    disk: ImageDisk,
}

/// Finds an image by name or id and keeps it.
pub async fn resolve(store: &ImageStore, name: &str) -> Result<Resolved, SandboxError> {
    let unknown = || ImageError::Unknown {
        name: name.to_owned(),
    };
    let image = store.get(name).await.ok_or_else(unknown)?;
    let lease = store.lease(&image.id).await?;
    let id = image.id.to_string();
    Ok(Resolved {
        reference: image.digests.first().unwrap_or(&id).clone(),
        id,
        defaults: defaults(&image),
        stop_signal: stop_signal(&image),
        serial: image.disk.serial.clone(),
        lease,
        disk: image.disk,
    })
}

/// Keeps the image of a pod that an earlier server has left.
pub async fn keep_again(store: &ImageStore, id: &str) -> Result<Lease, SandboxError> {
    let unknown = |_| ImageError::Unknown {
        name: id.to_owned(),
    };
    let id: ImageId = id.parse().map_err(unknown)?;
    Ok(store.lease_again(&id).await?)
}

impl Resolved {
    /// Opens its disk.
    pub async fn open(&self) -> Result<OpenDevice, SandboxError> {
        let disk = self.disk.clone();
        blocking(move || {
            let mut extents = Vec::with_capacity(disk.extents.len());
            for extent in disk.extents {
                let failed = |source| SandboxError::File {
                    path: PathBuf::clone(&extent.path),
                    source,
                };
                let file = std::fs::File::open(&extent.path).map_err(failed)?;
                extents.push((file.into(), extent.offset, extent.length));
            }
            Ok(OpenDevice::disk(&disk.serial, true, extents))
        })
        .await
    }
}

fn defaults(image: &Image) -> ImageDefaults {
    let Some(config) = image.config.config() else {
        return ImageDefaults::default();
    };
    ImageDefaults {
        entrypoint: config.entrypoint().clone().unwrap_or_default(),
        cmd: config.cmd().clone().unwrap_or_default(),
        env: config.env().clone().unwrap_or_default(),
        working_dir: config.working_dir().clone().unwrap_or_default(),
        user: config.user().clone().unwrap_or_default(),
    }
}

fn stop_signal(image: &Image) -> Option<String> {
    let config = image.config.config().as_ref()?;
    config.stop_signal().clone()
}

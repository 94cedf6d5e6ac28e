//! Stores for tests, and what lies in them.

use std::fs;
use std::path::{Path, PathBuf};

use super::bed::{LayerBuilder, TestImage};
use crate::image::registry::RegistryConfig;
use crate::image::store::Limits;
use crate::image::{ImageStore, Registries};

/// Plain HTTP for one host.
pub fn plain(host: &str) -> Registries {
    [(
        host.to_string(),
        RegistryConfig {
            plain_http: true,
            ..Default::default()
        },
    )]
    .into()
}

fn small_limits() -> Limits {
    Limits {
        manifest: 64 << 10,
        config: 64 << 10,
        unpacked: 8 << 20,
        files: 1000,
        ..Limits::default()
    }
}

/// A store with small limits.
pub fn store(root: &Path, registries: Registries) -> ImageStore {
    ImageStore::open_with(root, registries, small_limits()).unwrap()
}

pub fn small_image() -> TestImage {
    TestImage::new(vec![LayerBuilder::new().file("hello", "world").tar()])
}

/// All files below the store, without what an empty store has.
pub fn leftovers(root: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut directories = vec![root.join("images")];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                if path.parent().unwrap().ends_with("tmp") {
                    files.push(path.clone());
                }
                directories.push(path);
            } else if !path.ends_with("index.json") && !path.ends_with("lock") {
                files.push(path);
            }
        }
    }
    files
}

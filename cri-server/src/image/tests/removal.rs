//! Removal, leases, and what a kill leaves.

use std::fs;
use std::path::PathBuf;

use super::bed::FalseRegistry;
use super::store::{leftovers, plain, small_image, store};
use crate::image::{ImageError, ImageStore, Registries};

#[tokio::test]
async fn a_removed_image_is_gone_with_all_its_names_and_files() {
    let directory = tempfile::tempdir().unwrap();
    let registry = FalseRegistry::start(FalseRegistry::of(&small_image()));
    let store = store(directory.path(), plain(&registry.host));
    for tag in ["a", "b"] {
        store
            .pull(&format!("{}/app:{tag}", registry.host), None, None)
            .await
            .unwrap();
    }
    store
        .remove(&format!("{}/app:b", registry.host))
        .await
        .unwrap();
    assert!(store.list().await.is_empty());
    assert_eq!(leftovers(directory.path()), Vec::<PathBuf>::new());
    store.remove("no/such:image").await.unwrap();
    store.remove("not an image").await.unwrap();
}

#[tokio::test]
async fn a_leased_disk_stays_until_its_last_lease_ends_even_over_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let registry = FalseRegistry::start(FalseRegistry::of(&small_image()));
    let first = store(directory.path(), plain(&registry.host));
    let name = format!("{}/app", registry.host);
    let image = first.pull(&name, None, None).await.unwrap();
    let disk = image.disk.extents[0].path.clone();
    let leases = [
        first.lease(&image.id).await.unwrap(),
        first.lease(&image.id).await.unwrap(),
    ];
    first.remove(&name).await.unwrap();
    assert!(first.get(&name).await.is_none());
    assert!(disk.exists());
    // The process ends without a word.
    leases.into_iter().for_each(std::mem::forget);
    std::mem::forget(first);

    // Its lock is held by the forgotten store; a new process would not see that one.
    fs::remove_file(directory.path().join("images/lock")).unwrap();
    let second = store(directory.path(), plain(&registry.host));
    assert!(second.list().await.is_empty());
    let lease = second.lease_again(&image.id).await.unwrap();
    second.leases_complete().await.unwrap();
    assert!(disk.exists());

    // Pulled once more, it lives on by itself.
    second.pull(&name, None, None).await.unwrap();
    drop(lease);
    assert!(second.get(&name).await.is_some());
    let lease = second.lease(&image.id).await.unwrap();
    second.remove(&name).await.unwrap();
    drop(lease);
    assert!(second.list().await.is_empty());
    assert!(!disk.exists());
    assert!(second.lease(&image.id).await.is_err());
}

#[tokio::test]
async fn a_store_survives_being_killed_anywhere() {
    let directory = tempfile::tempdir().unwrap();
    let images = directory.path().join("images");
    let registry = FalseRegistry::start(FalseRegistry::of(&small_image()));
    let name = format!("{}/app", registry.host);
    {
        let store = store(directory.path(), plain(&registry.host));
        store.pull(&name, None, None).await.unwrap();
        let second = ImageStore::open(directory.path(), Registries::new());
        assert!(matches!(second, Err(ImageError::InUse(_))));
    }
    // What a kill may leave: trees and files half made, a layer and a disk without an image.
    fs::create_dir_all(images.join("tmp/x.tree/root")).unwrap();
    fs::write(images.join("tmp/index"), "{").unwrap();
    fs::write(images.join("disks/0.erofs"), "").unwrap();
    fs::write(images.join("layers/sha256/00"), "").unwrap();
    {
        let store = store(directory.path(), plain(&registry.host));
        let image = store.get(&name).await.unwrap();
        assert_eq!(
            leftovers(directory.path()).len(),
            3,
            "a layer, a configuration, a disk"
        );
        // A disk cut short, say by a file system that lost its last second.
        fs::write(&image.disk.extents[0].path, "").unwrap();
    }
    let store = store(directory.path(), plain(&registry.host));
    assert!(store.get(&name).await.is_none());
    store.pull(&name, None, None).await.unwrap();
}

#[tokio::test]
async fn the_usage_counts_what_images_take() {
    let directory = tempfile::tempdir().unwrap();
    let registry = FalseRegistry::start(FalseRegistry::of(&small_image()));
    let store = store(directory.path(), plain(&registry.host));
    let before = store.usage().await.unwrap();
    assert!(before.bytes > 0 && before.inodes > 0);
    store
        .pull(&format!("{}/app", registry.host), None, None)
        .await
        .unwrap();
    let after = store.usage().await.unwrap();
    assert!(after.bytes >= before.bytes + 4096);
    assert_eq!(after.inodes, before.inodes + 3);
}

//! Pulls that must fail, and leave nothing.

use std::fs;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;

use serde_json::json;
use tar::EntryType;

use super::bed::{Answer, FalseRegistry, LayerBuilder, Registry, TestImage, found, gzip, missing};
use super::store::{leftovers, plain, small_image, store};
use crate::image::digest::Digest;
use crate::image::store::Limits;
use crate::image::{ImageError, ImageStore};

/// Pulls what must fail; returns the error after seeing that nothing stayed.
async fn failed_pull(
    answer: impl Fn(&super::bed::Request) -> Answer + Send + Sync + 'static,
) -> ImageError {
    let directory = tempfile::tempdir().unwrap();
    let registry = FalseRegistry::start(answer);
    let store = store(directory.path(), plain(&registry.host));
    let name = format!("{}/some/app:v1", registry.host);
    let error = store.pull(&name, None, None).await.unwrap_err();
    assert!(error.to_string().contains(&name), "{error}");
    assert!(store.list().await.is_empty());
    assert_eq!(
        leftovers(directory.path()),
        Vec::<PathBuf>::new(),
        "{error}"
    );
    error
}

#[tokio::test]
async fn a_layer_with_the_wrong_digest_is_corrupt() {
    let directory = tempfile::tempdir().unwrap();
    let registry = Registry::start(directory.path());
    let image = small_image();
    registry.push("app", "v1", &image).await;
    let digest = Digest::of(&image.layers[0].packed);
    let mut bytes = image.layers[0].packed.clone();
    bytes[20] ^= 1;
    fs::write(registry.blob(&digest), bytes).unwrap();
    let store = store(directory.path(), plain(&registry.host));
    let error = store
        .pull(&format!("{}/app:v1", registry.host), None, None)
        .await
        .unwrap_err();
    assert!(matches!(error, ImageError::Corrupt { .. }), "{error}");
    assert!(error.to_string().contains(&digest.to_string()), "{error}");
    assert_eq!(leftovers(directory.path()), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn wrong_contents_are_told_apart() {
    let wrong_config = {
        let rest = FalseRegistry::of(&small_image());
        let config = Digest::of(&small_image().config_bytes()).to_string();
        move |request: &super::bed::Request| match request.path.ends_with(&config) {
            true => found("{}"),
            false => rest(request),
        }
    };
    let error = failed_pull(wrong_config).await;
    assert!(matches!(error, ImageError::Corrupt { .. }), "{error}");

    let mut image = small_image();
    image.config["rootfs"]["diff_ids"][0] = json!(Digest::of(b"other").to_string());
    let error = failed_pull(FalseRegistry::of(&image)).await;
    assert!(matches!(error, ImageError::Corrupt { .. }), "{error}");
    assert!(error.to_string().contains("unpacks to"), "{error}");

    let mut image = small_image();
    image.config["rootfs"]["diff_ids"] = json!([]);
    let error = failed_pull(FalseRegistry::of(&image)).await;
    assert!(matches!(error, ImageError::Unsupported { .. }), "{error}");

    let mut image = small_image();
    let half = image.layers[0].packed.len() / 2;
    image.layers[0].packed.truncate(half);
    let error = failed_pull(FalseRegistry::of(&image)).await;
    assert!(matches!(error, ImageError::BadLayer { .. }), "{error}");

    // Gzip by content, but not by media type.
    let mut image = small_image();
    image.layers[0].media_type = super::bed::OCI_LAYER.to_string();
    let error = failed_pull(FalseRegistry::of(&image)).await;
    assert!(matches!(error, ImageError::BadLayer { .. }), "{error}");

    let image = TestImage::new(vec![LayerBuilder::new().file("../up", "").tar()]);
    let error = failed_pull(FalseRegistry::of(&image)).await;
    assert!(matches!(error, ImageError::BadLayer { .. }), "{error}");
}

#[tokio::test]
async fn a_layer_that_always_breaks_off_is_corrupt() {
    let image = small_image();
    let layer = image.layers[0].packed.clone();
    let digest = Digest::of(&layer).to_string();
    let rest = FalseRegistry::of(&image);
    let error = failed_pull(move |request| match request.path.ends_with(&digest) {
        true => Answer::Cut(layer.clone(), 10),
        false => rest(request),
    })
    .await;
    assert!(matches!(error, ImageError::Corrupt { .. }), "{error}");
}

#[tokio::test]
async fn what_is_larger_than_its_limit_is_refused() {
    let error = failed_pull(|_| found(vec![b' '; 100 << 10])).await;
    assert!(matches!(error, ImageError::TooLarge { .. }), "{error}");

    // A small packed layer that unpacks to much, in one file and in none.
    for tar in [
        LayerBuilder::new()
            .member("zeros", EntryType::Regular, 0o644, &vec![0; 9 << 20], &[])
            .tar(),
        vec![0; 9 << 20],
    ] {
        let mut image = TestImage::new(vec![tar.clone()]);
        image.layers[0].packed = gzip(&tar);
        let error = failed_pull(FalseRegistry::of(&image)).await;
        assert!(matches!(error, ImageError::TooLarge { .. }), "{error}");
    }

    let image = small_image();
    let layer = image.layers[0].packed.clone();
    let digest = Digest::of(&layer).to_string();
    let rest = FalseRegistry::of(&image);
    let error = failed_pull(move |request| match request.path.ends_with(&digest) {
        true => found([layer.as_slice(), b"more"].concat()),
        false => rest(request),
    })
    .await;
    assert!(matches!(error, ImageError::Corrupt { .. }), "{error}");
}

#[tokio::test]
async fn unreachable_silent_and_failing_registries_are_told_apart() {
    let directory = tempfile::tempdir().unwrap();
    let store = store(directory.path(), plain("127.0.0.1:1"));
    let error = store.pull("127.0.0.1:1/app", None, None).await.unwrap_err();
    assert!(matches!(error, ImageError::Unavailable { .. }), "{error}");
    assert!(error.to_string().contains("127.0.0.1:1"), "{error}");

    let error = failed_pull(|_| Answer::Whole(503, Vec::new(), Vec::new())).await;
    assert!(matches!(error, ImageError::Unavailable { .. }), "{error}");
    let error = failed_pull(|_| missing()).await;
    assert!(matches!(error, ImageError::NotFound { .. }), "{error}");
    let error = store.pull("UPPER/app:", None, None).await.unwrap_err();
    assert!(matches!(error, ImageError::BadReference { .. }), "{error}");
}

#[tokio::test]
async fn a_full_disk_is_named_and_nothing_half_done_stays() {
    /// A small file system of its own.
    struct SmallDisk(PathBuf);
    impl Drop for SmallDisk {
        fn drop(&mut self) {
            rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH).ok();
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let disk = SmallDisk(directory.path().join("small"));
    fs::create_dir(&disk.0).unwrap();
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("tmpfs", &disk.0, "tmpfs", flags, c"size=256k")
        .expect("mounting a tmpfs needs root");
    // Too much packed; small packed but too much unpacked.
    let noise: String = (0u32..25_000)
        .map(|n| Digest::of(&n.to_le_bytes()).hex())
        .collect();
    for contents in [noise.into_bytes(), vec![b' '; 1 << 20]] {
        let tar = LayerBuilder::new()
            .member("big", EntryType::Regular, 0o644, &contents, &[])
            .tar();
        let registry = FalseRegistry::start(FalseRegistry::of(&TestImage::new(vec![tar])));
        let store = store(&disk.0, plain(&registry.host));
        let error = store
            .pull(&format!("{}/app", registry.host), None, None)
            .await
            .unwrap_err();
        assert!(matches!(error, ImageError::DiskFull { .. }), "{error}");
        let shown = disk.0.join("images").display().to_string();
        assert!(error.to_string().contains(&shown), "{error}");
        assert_eq!(leftovers(&disk.0), Vec::<PathBuf>::new());
    }
}

#[tokio::test]
async fn a_silent_registry_runs_into_the_time_limit() {
    let directory = tempfile::tempdir().unwrap();
    let registry = FalseRegistry::start(|_| Answer::Silence);
    let limits = Limits {
        idle: Duration::from_millis(50),
        ..Limits::default()
    };
    let store = ImageStore::open_with(directory.path(), plain(&registry.host), limits).unwrap();
    let error = store
        .pull(&format!("{}/app", registry.host), None, None)
        .await
        .unwrap_err();
    assert!(matches!(error, ImageError::TimedOut { .. }), "{error}");
    assert!(error.to_string().contains("127.0.0.1"), "{error}");
}

#[test]
fn a_pull_nobody_waits_for_any_more_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let image = small_image();
    let digest = Digest::of(&image.layers[0].packed).to_string();
    let rest = FalseRegistry::of(&image);
    let (asked, seen) = mpsc::channel();
    let registry = FalseRegistry::start(move |request| match request.path.ends_with(&digest) {
        true => {
            asked.send(()).ok();
            Answer::Silence
        }
        false => rest(request),
    });
    let store = store(directory.path(), plain(&registry.host));
    let name = format!("{}/app", registry.host);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let puller = store.clone();
    let pull = runtime.spawn(async move { puller.pull(&name, None, None).await });
    seen.recv().unwrap();
    pull.abort();
    // Waits for the threads that write.
    drop(runtime);
    drop(store);
    assert_eq!(leftovers(directory.path()), Vec::<PathBuf>::new());
}

//! Pulls from a real registry, and from false ones.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;
use tar::EntryType;

use super::bed::{Answer, FalseRegistry, LayerBuilder, Registry, TestImage, found, missing};
use super::store::{plain, small_image, store};
use crate::image::digest::Digest;
use crate::image::registry::RegistryConfig;
use crate::image::{Credentials, ImageError, ImageUser, Progress};

/// Three layers of three packings, with what a disk must carry over.
fn rich_image() -> TestImage {
    TestImage::new(vec![
        LayerBuilder::new()
            .directory("bin/")
            .file("bin/sh", "#!")
            .file("gone", "x")
            .tar(),
        LayerBuilder::new()
            .member(
                "bin/su",
                EntryType::Regular,
                0o4755,
                b"su",
                &[("uid", b"70000")],
            )
            .member(
                "bin/ping",
                EntryType::Regular,
                0o755,
                b"p",
                &[("SCHILY.xattr.user.note", b"a\nb")],
            )
            .hard_link("bin/link", "bin/su")
            .whiteout(".wh.gone")
            .tar(),
        LayerBuilder::new()
            .symlink("lib", "usr/lib")
            .device("zero", EntryType::Char, 1, 5)
            .tar(),
    ])
}

/// What `fsck.erofs`, which knows nothing of this code, finds on a disk. It sets owners after
/// modes, which takes setuid away, so one extraction shows modes and another owners.
fn extract(disk: &Path, to: &Path, what: &str) {
    let output = Command::new("fsck.erofs")
        .arg(format!("--extract={}", to.display()))
        .arg(what)
        .arg(disk)
        .output()
        .expect("fsck.erofs cannot be run: install the package `erofs-utils`");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[tokio::test]
async fn an_image_pulled_by_tag_is_found_by_every_name_and_its_disk_is_whole() {
    let directory = tempfile::tempdir().unwrap();
    let registry = Registry::start(directory.path());
    let image = rich_image();
    let digest = registry.push("some/app", "v1", &image).await;
    let store = store(directory.path(), plain(&registry.host));
    let name = format!("{}/some/app:v1", registry.host);
    let (sender, mut receiver) = tokio::sync::mpsc::channel(100);

    let pulled = store.pull(&name, None, Some(sender)).await.unwrap();

    assert_eq!(pulled.id.to_string(), image.id());
    assert_eq!(pulled.tags, std::slice::from_ref(&name));
    assert_eq!(
        pulled.digests,
        [format!("{}/some/app@{digest}", registry.host)]
    );
    assert_eq!(pulled.user, ImageUser::Uid(7));
    assert_eq!(pulled.disk.serial, image.id()[7..27]);
    let hex = image.id()[7..].to_string();
    for name in [
        &name,
        &pulled.digests[0],
        &image.id(),
        &hex,
        &hex[..12].to_string(),
    ] {
        assert_eq!(store.get(name).await.unwrap().id, pulled.id, "{name}");
    }
    assert!(store.get(&hex[..3]).await.is_none());
    assert!(store.get("some/app:v1").await.is_none());

    let extent = &pulled.disk.extents[0];
    assert_eq!((extent.offset, extent.length % 4096), (0, 0));
    assert_eq!(fs::metadata(&extent.path).unwrap().len(), extent.length);
    let out = directory.path().join("out");
    extract(&extent.path, &out, "--no-preserve-owner");
    assert_eq!(fs::read_to_string(out.join("bin/sh")).unwrap(), "#!");
    assert!(!out.join("gone").exists());
    let su = fs::metadata(out.join("bin/su")).unwrap();
    assert_eq!(
        (su.mode() & 0o7777, su.mtime(), su.len()),
        (0o4755, 1_000_000_000, 2)
    );
    assert_eq!(
        fs::read_link(out.join("lib")).unwrap(),
        Path::new("usr/lib")
    );
    assert_eq!(
        fs::metadata(out.join("zero")).unwrap().rdev(),
        rustix::fs::makedev(1, 5)
    );
    let owners = directory.path().join("owners");
    extract(&extent.path, &owners, "--preserve-owner");
    assert_eq!(fs::metadata(owners.join("bin/su")).unwrap().uid(), 70000);

    let mut steps = Vec::new();
    while let Some(step) = receiver.recv().await {
        steps.push(step);
    }
    assert!(matches!(&steps[0], Progress::Layers(layers) if layers.len() == 3));
    assert_eq!(steps.last(), Some(&Progress::Disk));
}

#[tokio::test]
async fn the_amd64_image_is_found_at_the_end_of_an_index() {
    let directory = tempfile::tempdir().unwrap();
    let registry = Registry::start(directory.path());
    let mut other = TestImage::new(vec![LayerBuilder::new().file("arm", "").tar()]);
    other.config["architecture"] = json!("arm64");
    let image = small_image();
    let index = registry
        .push_index("app", "multi", &[("arm64", &other), ("amd64", &image)])
        .await;
    let store = store(directory.path(), plain(&registry.host));

    let pulled = store
        .pull(&format!("{}/app:multi", registry.host), None, None)
        .await
        .unwrap();
    assert_eq!(pulled.id.to_string(), image.id());
    assert_eq!(pulled.digests, [format!("{}/app@{index}", registry.host)]);

    let error = store
        .pull(&format!("{}/app:arm64", registry.host), None, None)
        .await
        .unwrap_err();
    assert!(matches!(&error, ImageError::NotFound { reason, .. } if reason.contains("arm64")));
}

#[tokio::test]
async fn a_pull_by_digest_gives_no_tag_and_a_later_one_by_tag_adds_it() {
    let directory = tempfile::tempdir().unwrap();
    let registry = Registry::start(directory.path());
    let digest = registry.push("app", "v1", &small_image()).await;
    let store = store(directory.path(), plain(&registry.host));
    let by_digest = format!("{}/app@{digest}", registry.host);

    let pulled = store.pull(&by_digest, None, None).await.unwrap();
    assert!(pulled.tags.is_empty());
    assert_eq!(pulled.digests, [by_digest]);

    let pulled = store
        .pull(&format!("{}/app:v1", registry.host), None, None)
        .await
        .unwrap();
    assert_eq!((pulled.tags.len(), pulled.digests.len()), (1, 1));
    assert_eq!(store.list().await.len(), 1);
}

#[tokio::test]
async fn a_tag_moves_to_the_image_it_names_now() {
    let directory = tempfile::tempdir().unwrap();
    let registry = Registry::start(directory.path());
    let store = store(directory.path(), plain(&registry.host));
    let name = format!("{}/app:v1", registry.host);
    registry.push("app", "v1", &small_image()).await;
    let old = store.pull(&name, None, None).await.unwrap();
    registry.push("app", "v1", &rich_image()).await;
    let new = store.pull(&name, None, None).await.unwrap();
    assert_ne!(old.id, new.id);
    assert_eq!(store.get(&name).await.unwrap().id, new.id);
    assert!(
        store
            .get(&old.id.to_string())
            .await
            .unwrap()
            .tags
            .is_empty()
    );
}

#[tokio::test]
async fn mirrors_are_asked_in_order_without_credentials_and_the_name_stays() {
    let directory = tempfile::tempdir().unwrap();
    let registry = Registry::start(directory.path());
    registry.push("app", "v1", &small_image()).await;
    let empty = FalseRegistry::start(|_| missing());
    let mut registries = plain(&registry.host);
    registries.extend(plain(&empty.host));
    let mirrors = vec![
        "127.0.0.1:1".to_string(),
        empty.host.clone(),
        registry.host.clone(),
    ];
    registries.insert(
        "registry.invalid".to_string(),
        RegistryConfig {
            mirrors,
            ..Default::default()
        },
    );
    let store = store(directory.path(), registries);

    let auth = Credentials::password("user", "secret");
    let pulled = store
        .pull("registry.invalid/app:v1", Some(auth), None)
        .await
        .unwrap();

    assert_eq!(pulled.tags, ["registry.invalid/app:v1"]);
    assert!(pulled.digests[0].starts_with("registry.invalid/app@sha256:"));
    let asked = empty.requests();
    assert_eq!(asked[0].path, "/v2/app/manifests/v1?ns=registry.invalid");
    assert!(
        asked
            .iter()
            .all(|request| !request.headers.contains_key("authorization"))
    );
}

#[tokio::test]
async fn pulls_of_one_image_at_once_share_the_download() {
    let directory = tempfile::tempdir().unwrap();
    let image = rich_image();
    let registry = FalseRegistry::start(FalseRegistry::of(&image));
    let store = store(directory.path(), plain(&registry.host));
    let pulls: Vec<_> = (0..5)
        .map(|n| {
            let (store, name) = (store.clone(), format!("{}/app:v{n}", registry.host));
            tokio::spawn(async move { store.pull(&name, None, None).await })
        })
        .collect();
    for pull in pulls {
        assert_eq!(pull.await.unwrap().unwrap().id.to_string(), image.id());
    }
    for layer in &image.layers {
        let digest = Digest::of(&layer.packed).to_string();
        let fetched = registry
            .requests()
            .iter()
            .filter(|r| r.path.ends_with(&digest))
            .count();
        assert_eq!(fetched, 1);
    }
    assert_eq!(store.list().await[0].tags.len(), 5);
}

#[tokio::test]
async fn layers_of_another_image_are_not_fetched_again() {
    let directory = tempfile::tempdir().unwrap();
    let base = LayerBuilder::new().file("base", "base").tar();
    let first = TestImage::new(vec![base.clone()]);
    let second = TestImage::new(vec![base, LayerBuilder::new().file("top", "top").tar()]);
    let one = FalseRegistry::start(FalseRegistry::of(&first));
    let two = FalseRegistry::start(FalseRegistry::of(&second));
    let mut registries = plain(&one.host);
    registries.extend(plain(&two.host));
    let store = store(directory.path(), registries);
    store
        .pull(&format!("{}/a", one.host), None, None)
        .await
        .unwrap();
    store
        .pull(&format!("{}/b", two.host), None, None)
        .await
        .unwrap();
    let shared = Digest::of(&first.layers[0].packed).to_string();
    assert!(
        two.requests()
            .iter()
            .all(|request| !request.path.ends_with(&shared))
    );
}

#[tokio::test]
async fn a_broken_download_is_taken_up_where_it_stopped() {
    let directory = tempfile::tempdir().unwrap();
    let image = TestImage::new(vec![
        LayerBuilder::new().file("f", &"text ".repeat(9999)).tar(),
    ]);
    let layer = image.layers[0].packed.clone();
    let digest = Digest::of(&layer).to_string();
    let rest = FalseRegistry::of(&image);
    let registry = FalseRegistry::start(move |request| {
        if !request.path.ends_with(&digest) {
            return rest(request);
        }
        match request.headers.get("range").map(String::as_str) {
            None => Answer::Cut(layer.clone(), 100),
            Some("bytes=100-") => Answer::Whole(206, Vec::new(), layer[100..].to_vec()),
            Some(_) => missing(),
        }
    });
    let store = store(directory.path(), plain(&registry.host));
    store
        .pull(&format!("{}/app", registry.host), None, None)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_server_without_ranges_sends_from_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let image = small_image();
    let layer = image.layers[0].packed.clone();
    let digest = Digest::of(&layer).to_string();
    let rest = FalseRegistry::of(&image);
    let tries = AtomicUsize::new(0);
    let registry = FalseRegistry::start(move |request| {
        if request.path.ends_with(&digest) && tries.fetch_add(1, Ordering::Relaxed) == 0 {
            return Answer::Cut(layer.clone(), layer.len() / 2);
        }
        rest(request)
    });
    let store = store(directory.path(), plain(&registry.host));
    store
        .pull(&format!("{}/app", registry.host), None, None)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_token_is_fetched_with_the_credentials_and_sent() {
    let directory = tempfile::tempdir().unwrap();
    let image = small_image();
    let tokens = FalseRegistry::start(|request| {
        let basic = request.headers.get("authorization").map(String::as_str);
        assert_eq!(
            request.path,
            "/token?service=s&scope=repository%3Aapp%3Apull"
        );
        match basic {
            Some("Basic dXNlcjpwYXNz") => found(r#"{"token":"the-token"}"#),
            _ => Answer::Whole(401, Vec::new(), Vec::new()),
        }
    });
    let challenge = format!(r#"Bearer realm="http://{}/token",service="s""#, tokens.host);
    let rest = FalseRegistry::of(&image);
    let registry = FalseRegistry::start(move |request| {
        match request.headers.get("authorization").map(String::as_str) {
            Some("Bearer the-token") => rest(request),
            _ => Answer::Whole(
                401,
                vec![("WWW-Authenticate", challenge.clone())],
                Vec::new(),
            ),
        }
    });
    let store = store(directory.path(), plain(&registry.host));
    let name = format!("{}/app", registry.host);
    let denied = store.pull(&name, None, None).await.unwrap_err();
    assert!(matches!(denied, ImageError::Denied { .. }), "{denied}");
    let elsewhere = Credentials::password("user", "pass").for_server("other.example");
    let denied = store.pull(&name, Some(elsewhere), None).await.unwrap_err();
    assert!(matches!(denied, ImageError::Denied { .. }), "{denied}");
    let auth = Credentials::password("user", "pass");
    store.pull(&name, Some(auth), None).await.unwrap();
    // An access token needs no token server.
    let auth = Credentials::registry_token("the-token");
    store.remove(&name).await.unwrap();
    let before = tokens.requests().len();
    store.pull(&name, Some(auth), None).await.unwrap();
    assert_eq!(tokens.requests().len(), before);
}

#[tokio::test]
async fn basic_credentials_are_sent_when_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let rest = FalseRegistry::of(&small_image());
    let registry = FalseRegistry::start(move |request| {
        match request.headers.get("authorization").map(String::as_str) {
            Some("Basic dXNlcjpwYXNz") => rest(request),
            _ => Answer::Whole(
                401,
                vec![("WWW-Authenticate", r#"Basic realm="r""#.to_string())],
                Vec::new(),
            ),
        }
    });
    let store = store(directory.path(), plain(&registry.host));
    let name = format!("{}/app", registry.host);
    let auth = Credentials::encoded("dXNlcjpwYXNz").unwrap();
    store.pull(&name, Some(auth), None).await.unwrap();
    let error = store.pull(&name, None, None).await.unwrap_err();
    assert!(matches!(error, ImageError::Denied { .. }), "{error}");
}

#[tokio::test]
async fn tls_is_verified_with_the_certificates_configured_for_the_host() {
    let directory = tempfile::tempdir().unwrap();
    let registry = Registry::start_tls(directory.path());
    let image = small_image();
    registry.push("app", "v1", &image).await;
    let name = format!("{}/app:v1", registry.host);
    {
        let store = store(directory.path(), Default::default());
        let error = store.pull(&name, None, None).await.unwrap_err();
        assert!(matches!(error, ImageError::Unavailable { .. }), "{error}");
        assert!(error.to_string().contains("certificate"), "{error}");
    }
    let config = RegistryConfig {
        ca_file: registry.certificate.clone(),
        ..Default::default()
    };
    let registries = [(registry.host.clone(), config)].into();
    let pulled = store(directory.path(), registries)
        .pull(&name, None, None)
        .await
        .unwrap();
    assert_eq!(pulled.id.to_string(), image.id());
}

//! The CRI's ImageService over the image store.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use bulkhead_cri_api::v1;
use bulkhead_cri_api::v1::image_service_server::ImageService;
use tonic::{Code, Request, Response, Status};

use super::list::{Parts, in_parts};
use super::status::shortened;
use crate::image::{Credentials, Image, ImageError, ImageStore, ImageUser};
use crate::pulls::Pulls;

/// Answers the CRI's questions about images.
pub struct Images {
    store: ImageStore,
    writable: PathBuf,
    pulls: Pulls,
}

impl Images {
    /// `writable` is the directory under which pods' writable layers lie; `pulls` hears how pulls
    /// come along.
    pub fn new(store: ImageStore, writable: PathBuf, pulls: Pulls) -> Images {
        Images {
            store,
            writable,
            pulls,
        }
    }

    async fn find(&self, filter: Option<v1::ImageFilter>) -> Vec<v1::Image> {
        let wanted = filter
            .and_then(|filter| filter.image)
            .unwrap_or_default()
            .image;
        let images = if wanted.is_empty() {
            self.store.list().await
        } else {
            self.store.get(&wanted).await.into_iter().collect()
        };
        images.iter().map(|image| describe(image, None)).collect()
    }
}

#[tonic::async_trait]
impl ImageService for Images {
    type StreamImagesStream = Parts<v1::StreamImagesResponse>;

    async fn list_images(
        &self,
        request: Request<v1::ListImagesRequest>,
    ) -> Result<Response<v1::ListImagesResponse>, Status> {
        let images = self.find(request.into_inner().filter).await;
        Ok(Response::new(v1::ListImagesResponse { images }))
    }

    async fn stream_images(
        &self,
        request: Request<v1::StreamImagesRequest>,
    ) -> Result<Response<Self::StreamImagesStream>, Status> {
        let images = self.find(request.into_inner().filter).await;
        Ok(in_parts(images, |images| v1::StreamImagesResponse {
            images,
        }))
    }

    async fn image_status(
        &self,
        request: Request<v1::ImageStatusRequest>,
    ) -> Result<Response<v1::ImageStatusResponse>, Status> {
        let request = request.into_inner();
        let spec = request.image.unwrap_or_default();
        let Some(image) = self.store.get(&spec.image).await else {
            return Ok(Response::new(v1::ImageStatusResponse::default()));
        };
        let info = match request.verbose {
            true => [("info".to_string(), details(&image))].into(),
            false => Default::default(),
        };
        let image = Some(describe(&image, Some(spec)));
        Ok(Response::new(v1::ImageStatusResponse { image, info }))
    }

    async fn pull_image(
        &self,
        request: Request<v1::PullImageRequest>,
    ) -> Result<Response<v1::PullImageResponse>, Status> {
        let request = request.into_inner();
        let name = request.image.unwrap_or_default().image;
        let auth = credentials(request.auth.unwrap_or_default())?;
        let image = self
            .store
            .pull(&name, auth, Some(self.pulls.report(&name)))
            .await
            .map_err(|error| status(&error))?;
        Ok(Response::new(v1::PullImageResponse {
            image_ref: image.id.to_string(),
        }))
    }

    async fn remove_image(
        &self,
        request: Request<v1::RemoveImageRequest>,
    ) -> Result<Response<v1::RemoveImageResponse>, Status> {
        let name = request.into_inner().image.unwrap_or_default().image;
        self.store
            .remove(&name)
            .await
            .map_err(|error| status(&error))?;
        Ok(Response::new(v1::RemoveImageResponse {}))
    }

    async fn image_fs_info(
        &self,
        _request: Request<v1::ImageFsInfoRequest>,
    ) -> Result<Response<v1::ImageFsInfoResponse>, Status> {
        let usage = self.store.usage().await.map_err(|error| status(&error))?;
        let writable = self.writable.clone();
        let (bytes, inodes) = tokio::task::spawn_blocking(move || taken(&writable))
            .await
            .map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(v1::ImageFsInfoResponse {
            image_filesystems: vec![filesystem(&usage.mountpoint, usage.bytes, usage.inodes)],
            container_filesystems: vec![filesystem(&self.writable, bytes, inodes)],
        }))
    }
}

/// The gRPC code for an image error. What a client may try again unchanged is UNAVAILABLE or
/// DEADLINE_EXCEEDED; bytes that are not what was promised are DATA_LOSS; an image that can
/// never run here is FAILED_PRECONDITION.
pub fn status(error: &ImageError) -> Status {
    let code = match error {
        ImageError::BadReference { .. } => Code::InvalidArgument,
        ImageError::NotFound { .. } | ImageError::Unknown { .. } => Code::NotFound,
        ImageError::Unavailable { .. } | ImageError::Stopped => Code::Unavailable,
        ImageError::TimedOut { .. } => Code::DeadlineExceeded,
        ImageError::Denied { .. } => Code::PermissionDenied,
        ImageError::Corrupt { .. } => Code::DataLoss,
        ImageError::Unsupported { .. }
        | ImageError::BadLayer { .. }
        | ImageError::InUse(_)
        | ImageError::Configuration { .. } => Code::FailedPrecondition,
        ImageError::TooLarge { .. } | ImageError::DiskFull { .. } => Code::ResourceExhausted,
        ImageError::Io { .. } => Code::Internal,
    };
    Status::new(code, shortened(error.to_string()))
}

fn describe(image: &Image, spec: Option<v1::ImageSpec>) -> v1::Image {
    let (uid, username) = match &image.user {
        ImageUser::Unset => (None, String::new()),
        ImageUser::Uid(uid) => (
            Some(v1::Int64Value {
                value: i64::from(*uid),
            }),
            String::new(),
        ),
        ImageUser::Name(name) => (None, name.clone()),
    };
    v1::Image {
        id: image.id.to_string(),
        repo_tags: image.tags.clone(),
        repo_digests: image.digests.clone(),
        size: image.size,
        uid,
        username,
        spec,
        pinned: false,
    }
}

/// What `crictl inspecti` shows below the image.
fn details(image: &Image) -> String {
    let disk: Vec<_> = image
        .disk
        .extents
        .iter()
        .map(|extent| {
            serde_json::json!({
                "path": extent.path, "offset": extent.offset, "length": extent.length,
            })
        })
        .collect();
    serde_json::json!({ "imageSpec": *image.config, "disk": disk, "serial": image.disk.serial })
        .to_string()
}

/// The first of the ways to log in that is given, in the order other runtimes look at them.
fn credentials(auth: v1::AuthConfig) -> Result<Option<Credentials>, Status> {
    let credentials = if !auth.username.is_empty() {
        Credentials::password(auth.username, auth.password)
    } else if !auth.identity_token.is_empty() {
        Credentials::identity_token(auth.identity_token)
    } else if !auth.auth.is_empty() {
        Credentials::encoded(&auth.auth)
            .map_err(|reason| Status::invalid_argument(format!("auth config: {reason}")))?
    } else if !auth.registry_token.is_empty() {
        Credentials::registry_token(auth.registry_token)
    } else {
        return Ok(None);
    };
    Ok(Some(credentials.for_server(&auth.server_address)))
}

fn filesystem(mountpoint: &Path, bytes: u64, inodes: u64) -> v1::FilesystemUsage {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    v1::FilesystemUsage {
        timestamp: i64::try_from(now.as_nanos()).unwrap_or(i64::MAX),
        fs_id: Some(v1::FilesystemIdentifier {
            mountpoint: mountpoint.display().to_string(),
        }),
        used_bytes: Some(v1::UInt64Value { value: bytes }),
        inodes_used: Some(v1::UInt64Value { value: inodes }),
    }
}

/// Bytes and inodes below a directory, itself included. What vanishes meanwhile is not counted.
fn taken(directory: &Path) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    let (mut bytes, mut inodes) = (0u64, 0u64);
    let mut pending = vec![directory.to_path_buf()];
    while let Some(path) = pending.pop() {
        let Ok(metadata) = std::fs::symlink_metadata(&path) else {
            continue;
        };
        // A directory in memory takes no blocks, but space all the same.
        let size = metadata
            .blocks()
            .saturating_mul(512)
            .max(metadata.len().min(4096));
        bytes = bytes.saturating_add(size);
        inodes += 1;
        if metadata.is_dir()
            && let Ok(entries) = std::fs::read_dir(&path)
        {
            pending.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
        }
    }
    (bytes, inodes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Registries;
    use crate::image::tests::bed::{FalseRegistry, LayerBuilder, TestImage, missing};

    struct Bed {
        directory: tempfile::TempDir,
        registry: FalseRegistry,
        images: Images,
    }

    impl Bed {
        fn new() -> Bed {
            let directory = tempfile::tempdir().unwrap();
            let mut image = TestImage::new(vec![LayerBuilder::new().file("f", "f").tar()]);
            image.config["config"]["User"] = "daemon:7".into();
            let serve = FalseRegistry::of(&image);
            let registry =
                FalseRegistry::start(move |request| match request.path.contains("/none/") {
                    true => missing(),
                    false => serve(request),
                });
            let text = format!("['{}']\nplain_http = true", registry.host);
            let registries: Registries = toml::from_str(&text).unwrap();
            let store = ImageStore::open(directory.path(), registries).unwrap();
            let writable = directory.path().join("sandboxes");
            let images = Images::new(store, writable, Pulls::new());
            Bed {
                directory,
                registry,
                images,
            }
        }

        fn spec(&self, name: &str) -> Option<v1::ImageSpec> {
            let image = format!("{}/{name}", self.registry.host);
            let annotations = [("a".to_string(), "b".to_string())].into();
            Some(v1::ImageSpec {
                image,
                annotations,
                ..Default::default()
            })
        }

        async fn pull(&self, name: &str) -> Result<String, Status> {
            let request = v1::PullImageRequest {
                image: self.spec(name),
                ..Default::default()
            };
            self.images
                .pull_image(Request::new(request))
                .await
                .map(|r| r.into_inner().image_ref)
        }

        async fn status(&self, image: Option<v1::ImageSpec>) -> v1::ImageStatusResponse {
            let request = v1::ImageStatusRequest {
                image,
                verbose: true,
            };
            self.images
                .image_status(Request::new(request))
                .await
                .unwrap()
                .into_inner()
        }

        async fn list(&self, image: Option<v1::ImageSpec>) -> Vec<v1::Image> {
            let filter = Some(v1::ImageFilter { image });
            let request = Request::new(v1::ListImagesRequest { filter });
            self.images
                .list_images(request)
                .await
                .unwrap()
                .into_inner()
                .images
        }
    }

    #[tokio::test]
    async fn an_image_is_pulled_listed_shown_and_removed() {
        let bed = Bed::new();
        let id = bed.pull("app:v1").await.unwrap();

        let answer = bed.status(bed.spec("app:v1")).await;
        let image = answer.image.unwrap();
        assert_eq!(
            (&image.id, image.username.as_str(), image.uid),
            (&id, "daemon", None)
        );
        assert_eq!(image.spec, bed.spec("app:v1"));
        assert!(image.size > 0);
        let info: serde_json::Value = serde_json::from_str(&answer.info["info"]).unwrap();
        assert_eq!(info["imageSpec"]["os"], "linux");

        assert_eq!(bed.list(None).await.len(), 1);
        assert_eq!(bed.list(bed.spec("app:v1")).await.len(), 1);
        assert!(bed.list(bed.spec("other")).await.is_empty());

        for _ in 0..2 {
            let image = Some(v1::ImageSpec {
                image: id.clone(),
                ..Default::default()
            });
            let request = Request::new(v1::RemoveImageRequest { image });
            bed.images.remove_image(request).await.unwrap();
        }
        assert_eq!(
            bed.status(bed.spec("app:v1")).await,
            v1::ImageStatusResponse::default()
        );
    }

    #[tokio::test]
    async fn failures_have_the_codes_clients_look_at() {
        let bed = Bed::new();
        assert_eq!(
            bed.pull("none/app").await.unwrap_err().code(),
            Code::NotFound
        );
        assert_eq!(
            bed.pull("Not/A/Name").await.unwrap_err().code(),
            Code::InvalidArgument
        );
        let image = Some(v1::ImageSpec {
            image: "127.0.0.1:1/a".into(),
            ..Default::default()
        });
        let request = v1::PullImageRequest {
            image,
            ..Default::default()
        };
        let unreachable = bed
            .images
            .pull_image(Request::new(request))
            .await
            .unwrap_err();
        assert_eq!(unreachable.code(), Code::Unavailable);
        assert!(unreachable.message().starts_with("RegistryUnavailable"));
        let auth = Some(v1::AuthConfig {
            auth: "?".into(),
            ..Default::default()
        });
        let request = v1::PullImageRequest {
            image: bed.spec("app"),
            auth,
            ..Default::default()
        };
        let wrong = bed
            .images
            .pull_image(Request::new(request))
            .await
            .unwrap_err();
        assert_eq!(wrong.code(), Code::InvalidArgument);
    }

    #[tokio::test]
    async fn both_file_systems_are_named_and_in_use() {
        let bed = Bed::new();
        std::fs::create_dir(bed.directory.path().join("sandboxes")).unwrap();
        let request = Request::new(v1::ImageFsInfoRequest {});
        let info = bed
            .images
            .image_fs_info(request)
            .await
            .unwrap()
            .into_inner();
        for filesystem in [&info.image_filesystems[0], &info.container_filesystems[0]] {
            assert!(filesystem.timestamp > 0);
            assert!(filesystem.used_bytes.unwrap().value > 0);
            assert!(filesystem.inodes_used.unwrap().value > 0);
        }
    }
}

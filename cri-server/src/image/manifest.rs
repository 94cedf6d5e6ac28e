//! Manifests and indexes (OCI image-spec `manifest.md`, `image-index.md`; Docker image manifest
//! version 2, schema 2).

use serde::Deserialize;

use super::digest::Digest;

/// What is asked for, in the order of preference.
pub(super) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
     application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.docker.distribution.manifest.v2+json";

const INDEXES: [&str; 2] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];
const MANIFESTS: [&str; 2] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];
const CONFIGS: [&str; 2] = [
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
];
/// More layers than any tool makes; overlay-based runtimes stop at 127.
const LAYERS_MAX: usize = 512;
/// Manifests one index may list.
const ENTRIES_MAX: usize = 4096;

/// Content by digest and size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Content {
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
}

/// How a layer's tar stream is packed. Taken from the media type, never from the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    Plain,
    Gzip,
    Zstd,
}

/// A layer as the manifest names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layer {
    pub content: Content,
    pub packing: Packing,
}

/// A document a registry serves under `manifests/`.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Document {
    /// An index: the entry for this platform.
    Index(Content),
    /// One image.
    Manifest { config: Content, layers: Vec<Layer> },
}

/// Why a document cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum ManifestError {
    #[error("{0}")]
    Malformed(String),
    #[error("{0}")]
    Unsupported(String),
    #[error("it offers no linux/amd64 image, only {0}")]
    NoPlatform(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    schema_version: u32,
    media_type: Option<String>,
    manifests: Option<Vec<RawContent>>,
    config: Option<RawContent>,
    layers: Option<Vec<RawContent>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawContent {
    media_type: String,
    digest: String,
    size: u64,
    platform: Option<RawPlatform>,
}

#[derive(Deserialize)]
struct RawPlatform {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    variant: Option<String>,
}

impl Document {
    /// Reads a document. `served_as` is the Content-Type it came with, used when the document
    /// does not name its own type.
    pub fn parse(bytes: &[u8], served_as: &str) -> Result<Document, ManifestError> {
        let raw: Raw = serde_json::from_slice(bytes)
            .map_err(|error| ManifestError::Malformed(format!("not a manifest: {error}")))?;
        if raw.schema_version != 2 {
            return Err(ManifestError::Unsupported(format!(
                "its manifest has schema version {}; only 2 is supported",
                raw.schema_version
            )));
        }
        let served_as = served_as.split(';').next().unwrap_or_default().trim();
        let kind = raw.media_type.as_deref().unwrap_or(served_as);
        if INDEXES.contains(&kind) || (!MANIFESTS.contains(&kind) && raw.manifests.is_some()) {
            return index(raw.manifests.unwrap_or_default());
        }
        match (raw.config, raw.layers) {
            (Some(config), Some(layers)) => manifest(config, layers),
            _ => Err(ManifestError::Unsupported(format!(
                "`{}` is not an image",
                shorten(kind)
            ))),
        }
    }
}

fn manifest(config: RawContent, layers: Vec<RawContent>) -> Result<Document, ManifestError> {
    if !CONFIGS.contains(&config.media_type.as_str()) {
        return Err(ManifestError::Unsupported(format!(
            "its configuration is of type `{}`: it is an artifact, not a container image",
            shorten(&config.media_type)
        )));
    }
    if layers.len() > LAYERS_MAX {
        return Err(ManifestError::Unsupported(format!(
            "it has {} layers; at most {LAYERS_MAX} are supported",
            layers.len()
        )));
    }
    let layers = layers
        .iter()
        .map(|layer| {
            Ok(Layer {
                content: content(layer)?,
                packing: packing(&layer.media_type)?,
            })
        })
        .collect::<Result<_, _>>()?;
    Ok(Document::Manifest {
        config: content(&config)?,
        layers,
    })
}

fn packing(media_type: &str) -> Result<Packing, ManifestError> {
    match media_type {
        "application/vnd.oci.image.layer.v1.tar"
        | "application/vnd.oci.image.layer.nondistributable.v1.tar"
        | "application/vnd.docker.image.rootfs.diff.tar" => Ok(Packing::Plain),
        "application/vnd.oci.image.layer.v1.tar+gzip"
        | "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
        | "application/vnd.docker.image.rootfs.diff.tar.gzip"
        | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip" => Ok(Packing::Gzip),
        "application/vnd.oci.image.layer.v1.tar+zstd"
        | "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"
        | "application/vnd.docker.image.rootfs.diff.tar.zstd" => Ok(Packing::Zstd),
        other => Err(ManifestError::Unsupported(format!(
            "a layer is of the unknown type `{}`",
            shorten(other)
        ))),
    }
}

/// The entry for linux/amd64, wherever it stands. The baseline variant is preferred: a newer
/// one may need instructions the guest's CPU lacks.
fn index(entries: Vec<RawContent>) -> Result<Document, ManifestError> {
    if entries.len() > ENTRIES_MAX {
        return Err(ManifestError::Unsupported(format!(
            "its index has {} entries; at most {ENTRIES_MAX} are supported",
            entries.len()
        )));
    }
    let fits = |entry: &&RawContent| {
        entry.platform.as_ref().is_some_and(|platform| {
            platform.os == "linux"
                && platform.architecture == "amd64"
                && matches!(platform.variant.as_deref(), None | Some("" | "v1"))
        })
    };
    let chosen = match entries.iter().find(fits) {
        Some(entry) => entry,
        // The platform is optional; a single entry without one leaves no choice to be made, and
        // the configuration says what it is for.
        None => match entries.as_slice() {
            [only] if only.platform.is_none() => only,
            _ => return Err(ManifestError::NoPlatform(offers(&entries))),
        },
    };
    Ok(Document::Index(content(chosen)?))
}

fn offers(entries: &[RawContent]) -> String {
    let names: Vec<String> = entries
        .iter()
        .filter_map(|entry| entry.platform.as_ref())
        .take(20)
        .map(|platform| shorten(&format!("{}/{}", platform.os, platform.architecture)))
        .collect();
    if names.is_empty() {
        "nothing".to_string()
    } else {
        names.join(", ")
    }
}

fn content(raw: &RawContent) -> Result<Content, ManifestError> {
    let digest = raw
        .digest
        .parse()
        .map_err(|error| ManifestError::Unsupported(format!("{error}")))?;
    Ok(Content {
        digest,
        size: raw.size,
    })
}

fn shorten(text: &str) -> String {
    text.chars().take(100).filter(|c| !c.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(digit: char, platform: &str) -> String {
        let digest = digit.to_string().repeat(64);
        format!(
            r#"{{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":7,
                 "digest":"sha256:{digest}"{platform}}}"#
        )
    }

    fn platform(os: &str, architecture: &str) -> String {
        format!(r#","platform":{{"os":"{os}","architecture":"{architecture}"}}"#)
    }

    fn parse(entries: &[String]) -> Result<Document, ManifestError> {
        let text = format!(
            r#"{{"schemaVersion":2,"manifests":[{}]}}"#,
            entries.join(",")
        );
        Document::parse(
            text.as_bytes(),
            "application/vnd.oci.image.index.v1+json; charset=utf-8",
        )
    }

    #[test]
    fn the_platform_is_found_wherever_it_stands() {
        let variant = r#","platform":{"os":"linux","architecture":"amd64","variant":"v3"}"#;
        let found = parse(&[
            entry('1', &platform("linux", "arm64")),
            entry('2', &platform("unknown", "unknown")),
            entry('3', variant),
            entry('4', &platform("linux", "amd64")),
        ]);
        let Ok(Document::Index(content)) = found else {
            panic!("{found:?}")
        };
        assert_eq!(content.digest.hex(), "4".repeat(64));
    }

    #[test]
    fn a_missing_platform_names_those_on_offer() {
        let error = parse(&[entry('1', &platform("linux", "arm64"))]).unwrap_err();
        assert!(error.to_string().contains("linux/arm64"), "{error}");
    }

    #[test]
    fn a_lone_entry_without_a_platform_is_taken() {
        assert!(matches!(parse(&[entry('1', "")]), Ok(Document::Index(_))));
        assert!(parse(&[entry('1', ""), entry('2', "")]).is_err());
    }

    #[test]
    fn layers_are_unpacked_by_media_type_and_unknown_types_are_refused() {
        assert_eq!(
            packing("application/vnd.oci.image.layer.v1.tar+zstd").unwrap(),
            Packing::Zstd
        );
        assert!(packing("application/vnd.oci.image.layer.v1.tar+encrypted").is_err());
    }

    #[test]
    fn artifacts_and_other_schemas_are_refused() {
        let artifact = format!(
            r#"{{"schemaVersion":2,"config":{},"layers":[]}}"#,
            entry('1', "")
        );
        let error = Document::parse(artifact.as_bytes(), "").unwrap_err();
        assert!(error.to_string().contains("artifact"), "{error}");
        assert!(Document::parse(br#"{"schemaVersion":1}"#, "").is_err());
        assert!(Document::parse(b"<html>", "").is_err());
    }
}

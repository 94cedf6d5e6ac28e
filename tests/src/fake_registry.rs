//! A registry that lies: a copy of one image, with parts of it changed.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::registry::Registry;

/// Media type of an OCI image's manifest.
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// One document or blob.
#[derive(Clone)]
struct Page {
    kind: String,
    body: Vec<u8>,
    /// What `Content-Length` says.
    length: usize,
}

/// An image as a registry would serve it, open to changes.
pub struct FakeImage {
    manifest: Value,
    blobs: HashMap<String, Page>,
}

/// What is served, by repository: the manifest, whatever the tag, and everything by digest.
type Shelves = Mutex<HashMap<String, (Page, HashMap<String, Page>)>>;

/// The registry. Its threads end with the process.
pub struct FakeRegistry {
    address: SocketAddr,
    shelves: Arc<Shelves>,
}

/// `sha256:` and the digest of some bytes.
pub fn digest_of(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("sha256:{hex}")
}

impl FakeImage {
    /// A true copy of an image.
    pub fn copy(registry: &Registry, image: &str) -> Result<Self> {
        let manifest: Value = serde_json::from_slice(&registry.blob(&registry.digest(image)?)?)?;
        let mut blobs = HashMap::new();
        let layers = manifest["layers"]
            .as_array()
            .context("a manifest without layers")?;
        for descriptor in layers.iter().chain([&manifest["config"]]) {
            let digest = descriptor["digest"].as_str().context("no digest")?;
            let body = registry.blob(digest)?;
            let page = Page {
                kind: "application/octet-stream".to_owned(),
                length: body.len(),
                body,
            };
            blobs.insert(digest.to_owned(), page);
        }
        Ok(Self { manifest, blobs })
    }

    /// Digest of a layer, counted from the lowest.
    pub fn layer(&self, index: usize) -> Result<String> {
        let digest = self.manifest["layers"][index]["digest"].as_str();
        Ok(digest
            .with_context(|| format!("no layer {index}"))?
            .to_owned())
    }

    /// Changes a blob's bytes but not its digest or length.
    pub fn corrupt(&mut self, digest: &str) -> Result<()> {
        let page = self.blobs.get_mut(digest).context("no such blob")?;
        let middle = page.body.len() / 2;
        page.body[middle] ^= 0x40;
        Ok(())
    }

    /// Ends the connection in the middle of a blob.
    pub fn cut(&mut self, digest: &str) -> Result<()> {
        let page = self.blobs.get_mut(digest).context("no such blob")?;
        page.body.truncate(page.body.len() / 2);
        Ok(())
    }

    /// Serves half of a blob as if it were all, and says so in the manifest too.
    pub fn shorten(&mut self, index: usize) -> Result<String> {
        let mut page = self
            .blobs
            .remove(&self.layer(index)?)
            .context("no such blob")?;
        page.body.truncate(page.body.len() / 2);
        page.length = page.body.len();
        let digest = digest_of(&page.body);
        self.manifest["layers"][index]["digest"] = digest.clone().into();
        self.manifest["layers"][index]["size"] = page.length.into();
        self.blobs.insert(digest.clone(), page);
        Ok(digest)
    }

    /// Changes a layer's digest in the configuration, which speaks of uncompressed bytes.
    pub fn lie_about_diff_id(&mut self, index: usize) -> Result<()> {
        let old = self.manifest["config"]["digest"]
            .as_str()
            .context("no config")?;
        let mut page = self.blobs.remove(old).context("no config")?;
        let mut config: Value = serde_json::from_slice(&page.body)?;
        config["rootfs"]["diff_ids"][index] = digest_of(b"something else").into();
        page.body = serde_json::to_vec(&config)?;
        page.length = page.body.len();
        let digest = digest_of(&page.body);
        self.manifest["config"]["digest"] = digest.clone().into();
        self.manifest["config"]["size"] = page.length.into();
        self.blobs.insert(digest, page);
        Ok(())
    }
}

impl FakeRegistry {
    /// Serves nothing yet, over plain HTTP.
    pub fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let shelves = Arc::<Shelves>::default();
        let served = Arc::clone(&shelves);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shelves = Arc::clone(&served);
                // A client that goes away ends its own thread only.
                std::thread::spawn(move || answer(&stream, &shelves));
            }
        });
        Ok(Self { address, shelves })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves an image in a repository under any tag, and under `digest` as well. Answers the
    /// repository's full name.
    pub fn publish(
        &self,
        repository: &str,
        image: FakeImage,
        digest: Option<&str>,
    ) -> Result<String> {
        let body = serde_json::to_vec(&image.manifest)?;
        let manifest = Page {
            kind: MANIFEST.to_owned(),
            length: body.len(),
            body,
        };
        let mut pages = image.blobs;
        pages.insert(digest_of(&manifest.body), manifest.clone());
        if let Some(digest) = digest {
            pages.insert(digest.to_owned(), manifest.clone());
        }
        let mut shelves = self.shelves.lock().unwrap_or_else(PoisonError::into_inner);
        shelves.insert(repository.to_owned(), (manifest, pages));
        Ok(format!("{}/{repository}", self.address))
    }
}

/// Answers one request and closes the connection.
fn answer(mut stream: &TcpStream, shelves: &Shelves) -> std::io::Result<()> {
    let mut request = BufReader::new(stream);
    let mut first = String::new();
    request.read_line(&mut first)?;
    let mut header = String::new();
    while request.read_line(&mut header)? > 2 {
        header.clear();
    }
    let mut words = first.split(' ');
    let method = words.next().unwrap_or_default();
    let path = words.next().unwrap_or_default();
    let path = path.split('?').next().unwrap_or_default();
    let page = page(path, shelves);
    let last = path.rsplit('/').next().unwrap_or_default();
    if let Some(page) = page {
        write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Type: {}\r\nContent-Length: {}\r\n\
             Docker-Content-Digest: {}\r\nConnection: close\r\n\r\n",
            page.kind,
            page.length,
            if last.starts_with("sha256:") {
                last.to_owned()
            } else {
                digest_of(&page.body)
            },
        )?;
        if method == "GET" {
            stream.write_all(&page.body)?;
        }
    } else {
        let status = if path == "/v2/" {
            "200 OK"
        } else {
            "404 Not Found"
        };
        let reply =
            format!("HTTP/1.1 {status}\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{{}}");
        stream.write_all(reply.as_bytes())?;
    }
    stream.flush()
}

/// What a path of the distribution API names: `/v2/REPOSITORY/(manifests|blobs)/REFERENCE`.
fn page(path: &str, shelves: &Shelves) -> Option<Page> {
    let (rest, reference) = path.strip_prefix("/v2/")?.rsplit_once('/')?;
    let (repository, kind) = rest.rsplit_once('/')?;
    let shelves = shelves.lock().unwrap_or_else(PoisonError::into_inner);
    let (manifest, pages) = shelves.get(repository)?;
    let tag = kind == "manifests" && !reference.starts_with("sha256:");
    if tag {
        Some(manifest)
    } else {
        pages.get(reference)
    }
    .cloned()
}

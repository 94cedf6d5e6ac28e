//! What the tests stand on: layers, images, and Debian's registry serving them.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tar::{EntryType, Header};

use crate::image::digest::Digest;

/// A layer's tar stream in the making.
pub struct LayerBuilder(tar::Builder<Vec<u8>>);

impl LayerBuilder {
    pub fn new() -> LayerBuilder {
        LayerBuilder(tar::Builder::new(Vec::new()))
    }

    pub fn file(self, path: &str, contents: &str) -> Self {
        self.member(path, EntryType::Regular, 0o644, contents.as_bytes(), &[])
    }

    pub fn directory(self, path: &str) -> Self {
        self.member(path, EntryType::Directory, 0o755, b"", &[])
    }

    /// Makes paths whiteouts: `dir/.wh.name`.
    pub fn whiteout(self, path: &str) -> Self {
        self.file(path, "")
    }

    /// A member as it is; the path is put into the header unchecked.
    pub fn member(
        mut self,
        path: &str,
        kind: EntryType,
        mode: u32,
        contents: &[u8],
        attributes: &[(&str, &[u8])],
    ) -> Self {
        let mut header = header(path, kind, mode);
        header.set_size(contents.len() as u64);
        header.set_cksum();
        if !attributes.is_empty() {
            let attributes = attributes.iter().copied();
            self.0.append_pax_extensions(attributes).unwrap();
        }
        self.0.append(&header, contents).unwrap();
        self
    }

    /// A symbolic or hard link.
    pub fn link(mut self, path: &str, kind: EntryType, target: &str) -> Self {
        let mut header = header(path, kind, 0o777);
        header.as_gnu_mut().unwrap().linkname[..target.len()].copy_from_slice(target.as_bytes());
        header.set_cksum();
        self.0.append(&header, &b""[..]).unwrap();
        self
    }

    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.link(path, EntryType::Symlink, target)
    }

    pub fn hard_link(self, path: &str, target: &str) -> Self {
        self.link(path, EntryType::Link, target)
    }

    pub fn device(mut self, path: &str, kind: EntryType, major: u32, minor: u32) -> Self {
        let mut header = header(path, kind, 0o666);
        header.set_device_major(major).unwrap();
        header.set_device_minor(minor).unwrap();
        header.set_cksum();
        self.0.append(&header, &b""[..]).unwrap();
        self
    }

    pub fn tar(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

fn header(path: &str, kind: EntryType, mode: u32) -> Header {
    let mut header = Header::new_gnu();
    header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_mtime(1_000_000_000);
    header.set_size(0);
    header
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// An image whose every part a test may falsify.
pub struct TestImage {
    pub config: Value,
    pub layers: Vec<TestLayer>,
}

pub struct TestLayer {
    pub media_type: String,
    pub packed: Vec<u8>,
}

impl TestImage {
    /// An image of plain, gzip and zstd layers by turns.
    pub fn new(tars: Vec<Vec<u8>>) -> TestImage {
        let diff_ids: Vec<_> = tars.iter().map(|tar| Digest::of(tar).to_string()).collect();
        let layers = tars
            .into_iter()
            .enumerate()
            .map(|(index, tar)| match index % 3 {
                0 => TestLayer {
                    media_type: format!("{OCI_LAYER}+gzip"),
                    packed: gzip(&tar),
                },
                1 => TestLayer {
                    media_type: format!("{OCI_LAYER}+zstd"),
                    packed: zstd::encode_all(tar.as_slice(), 1).unwrap(),
                },
                _ => TestLayer {
                    media_type: OCI_LAYER.to_string(),
                    packed: tar,
                },
            })
            .collect();
        let config = json!({
            "architecture": "amd64",
            "os": "linux",
            "config": { "User": "7:8", "Cmd": ["/bin/sh"], "Volumes": null },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
            "history": [{ "created_by": "a test" }],
        });
        TestImage { config, layers }
    }

    pub fn id(&self) -> String {
        Digest::of(&self.config_bytes()).to_string()
    }

    pub fn config_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(&self.config).unwrap()
    }

    pub fn manifest(&self) -> Value {
        let layers: Vec<_> = self
            .layers
            .iter()
            .map(|layer| descriptor(&layer.media_type, &layer.packed))
            .collect();
        json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": descriptor("application/vnd.oci.image.config.v1+json", &self.config_bytes()),
            "layers": layers,
        })
    }
}

fn descriptor(media_type: &str, bytes: &[u8]) -> Value {
    json!({
        "mediaType": media_type,
        "digest": Digest::of(bytes).to_string(),
        "size": bytes.len(),
    })
}

/// Debian's `docker-registry` on a free port, with its contents in a directory of its own.
pub struct Registry {
    process: Child,
    directory: PathBuf,
    pub host: String,
    /// What a registry with TLS shows.
    pub certificate: Option<PathBuf>,
    client: reqwest::Client,
}

impl Registry {
    pub fn start(directory: &Path) -> Registry {
        Registry::serve(directory, "", None)
    }

    /// With TLS and a certificate of its own.
    pub fn start_tls(directory: &Path) -> Registry {
        let (key, certificate) = (directory.join("key.pem"), directory.join("certificate.pem"));
        let made = Command::new("openssl")
            .args([
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
            ])
            .args([
                "-nodes",
                "-subj",
                "/CN=registry",
                "-addext",
                "subjectAltName=IP:127.0.0.1",
            ])
            .args(["-addext", "basicConstraints=critical,CA:FALSE", "-keyout"])
            .arg(&key)
            .arg("-out")
            .arg(&certificate)
            .output()
            .expect("openssl cannot be run: install the package `openssl`");
        assert!(
            made.status.success(),
            "{}",
            String::from_utf8_lossy(&made.stderr)
        );
        let tls = format!(
            ", tls: {{certificate: {}, key: {}}}",
            certificate.display(),
            key.display()
        );
        Registry::serve(directory, &tls, Some(certificate))
    }

    fn serve(directory: &Path, tls: &str, certificate: Option<PathBuf>) -> Registry {
        let storage = directory.join("registry");
        let configuration = directory.join("registry.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: info}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}}}\n\
             http: {{addr: '127.0.0.1:0'{tls}}}\n",
            storage.display()
        );
        fs::write(&configuration, text).unwrap();
        let mut process = Command::new("docker-registry")
            .arg("serve")
            .arg(&configuration)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("docker-registry cannot be run: install the package `docker-registry`");
        let mut log = BufReader::new(process.stderr.take().unwrap());
        let mut seen = String::new();
        let host = loop {
            let mut line = String::new();
            let read = log.read_line(&mut line).unwrap();
            assert!(read > 0, "docker-registry ended at once: {seen}");
            if let Some((_, rest)) = line.split_once("listening on ") {
                let end = rest.find(|c: char| c != '.' && c != ':' && !c.is_ascii_digit());
                break rest[..end.unwrap_or(rest.len())].to_string();
            }
            seen += &line;
        };
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        let trusted = certificate
            .iter()
            .map(|path| reqwest::Certificate::from_pem(&fs::read(path).unwrap()).unwrap());
        let client = reqwest::Client::builder()
            .tls_certs_merge(trusted)
            .build()
            .unwrap();
        Registry {
            process,
            directory: storage,
            host,
            certificate,
            client,
        }
    }

    /// Pushes through the registry's own API.
    pub async fn push(&self, repository: &str, tag: &str, image: &TestImage) -> Digest {
        self.push_blob(repository, &image.config_bytes()).await;
        for layer in &image.layers {
            self.push_blob(repository, &layer.packed).await;
        }
        self.push_manifest(repository, tag, OCI_MANIFEST, &image.manifest())
            .await
    }

    /// Pushes an index of images by architecture under `tag`.
    pub async fn push_index(
        &self,
        repository: &str,
        tag: &str,
        images: &[(&str, &TestImage)],
    ) -> Digest {
        let mut manifests = Vec::new();
        for (architecture, image) in images {
            self.push(repository, architecture, image).await;
            let bytes = serde_json::to_vec(&image.manifest()).unwrap();
            let mut entry = descriptor(OCI_MANIFEST, &bytes);
            entry["platform"] = json!({ "os": "linux", "architecture": architecture });
            manifests.push(entry);
        }
        let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests });
        self.push_manifest(repository, tag, OCI_INDEX, &index).await
    }

    fn url(&self, rest: &str) -> String {
        let scheme = if self.certificate.is_some() {
            "https"
        } else {
            "http"
        };
        format!("{scheme}://{}/v2/{rest}", self.host)
    }

    async fn push_manifest(
        &self,
        repository: &str,
        tag: &str,
        media_type: &str,
        manifest: &Value,
    ) -> Digest {
        let bytes = serde_json::to_vec(manifest).unwrap();
        let digest = Digest::of(&bytes);
        let url = self.url(&format!("{repository}/manifests/{tag}"));
        let request = self.client.put(url).header("Content-Type", media_type);
        accepted(request.body(bytes)).await;
        digest
    }

    async fn push_blob(&self, repository: &str, bytes: &[u8]) {
        let start = self.url(&format!("{repository}/blobs/uploads/"));
        let answer = self.client.post(start).send().await.unwrap();
        let upload = answer.headers()["location"].to_str().unwrap().to_string();
        let upload = format!("{upload}&digest={}", Digest::of(bytes));
        accepted(self.client.put(upload).body(bytes.to_vec())).await;
    }

    /// The file the registry serves a blob from.
    pub fn blob(&self, digest: &Digest) -> PathBuf {
        let hex = digest.hex();
        self.directory.join(format!(
            "docker/registry/v2/blobs/sha256/{}/{hex}/data",
            &hex[..2]
        ))
    }
}

/// Sends what the registry has to accept.
async fn accepted(request: reqwest::RequestBuilder) {
    let answer = request.send().await.unwrap();
    let status = answer.status();
    assert!(status.is_success(), "{}", answer.text().await.unwrap());
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// A request as [`FalseRegistry`] sees it.
#[derive(Clone, Debug)]
pub struct Request {
    pub path: String,
    /// By lower-case name.
    pub headers: HashMap<String, String>,
}

/// What a [`FalseRegistry`] answers.
pub enum Answer {
    /// Status, headers and body.
    Whole(u16, Vec<(&'static str, String)>, Vec<u8>),
    /// A good body that breaks off after so many bytes.
    Cut(Vec<u8>, usize),
    /// Nothing, with the connection held open.
    Silence,
}

pub fn found(body: impl Into<Vec<u8>>) -> Answer {
    Answer::Whole(200, Vec::new(), body.into())
}

pub fn missing() -> Answer {
    Answer::Whole(404, Vec::new(), Vec::new())
}

/// An HTTP server that answers as a test wishes, and keeps what it was asked.
pub struct FalseRegistry {
    pub host: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl FalseRegistry {
    pub fn start(answer: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> FalseRegistry {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (kept, answer) = (Arc::clone(&requests), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (kept, answer) = (Arc::clone(&kept), Arc::clone(&answer));
                std::thread::spawn(move || serve(stream.unwrap(), &kept, &*answer));
            }
        });
        FalseRegistry { host, requests }
    }

    /// Serves an image under any name.
    pub fn of(image: &TestImage) -> impl Fn(&Request) -> Answer + Send + Sync + 'static {
        let manifest = serde_json::to_vec(&image.manifest()).unwrap();
        let mut blobs: HashMap<String, Vec<u8>> = HashMap::new();
        for bytes in image
            .layers
            .iter()
            .map(|l| &l.packed)
            .chain([&image.config_bytes()])
        {
            blobs.insert(Digest::of(bytes).to_string(), bytes.clone());
        }
        move |request| {
            let name = request.path.rsplit('/').next().unwrap();
            if request.path.contains("/manifests/") {
                return found(manifest.clone());
            }
            blobs
                .get(name)
                .map_or_else(missing, |bytes| found(bytes.clone()))
        }
    }

    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }
}

fn serve(stream: TcpStream, kept: &Mutex<Vec<Request>>, answer: &dyn Fn(&Request) -> Answer) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        match line.trim() {
            "" => break,
            line => lines.push(line.to_string()),
        }
    }
    let headers = lines[1..]
        .iter()
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_lowercase(), value.to_string()))
        .collect();
    let request = Request {
        path: lines[0].split(' ').nth(1).unwrap().to_string(),
        headers,
    };
    kept.lock().unwrap().push(request.clone());
    let (status, headers, body, length) = match answer(&request) {
        Answer::Whole(status, headers, body) => {
            let length = body.len();
            (status, headers, body, length)
        }
        Answer::Cut(body, length) => (200, Vec::new(), body, length),
        Answer::Silence => {
            // Until the client gives up.
            reader.read_to_end(&mut Vec::new()).ok();
            return;
        }
    };
    let mut head = format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n", body.len());
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += "Connection: close\r\n\r\n";
    let mut stream = stream;
    stream.write_all(head.as_bytes()).ok();
    stream.write_all(&body[..length]).ok();
}

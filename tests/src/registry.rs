//! Debian's registry, serving the test images from a directory over plain HTTP.

use std::fs::{self, File};
use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// How long the registry may take until it answers.
const START_LIMIT: Duration = Duration::from_secs(60);

/// A running registry, ended when dropped.
pub struct Registry {
    child: Child,
    address: SocketAddr,
    storage: PathBuf,
}

/// A TCP port of 127.0.0.1 nobody listened on a moment ago.
pub fn free_port() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

impl Registry {
    /// Serves `storage`, with configuration and log in `scratch`.
    pub fn start(storage: &Path, scratch: &Path) -> Result<Self> {
        let address = free_port()?;
        let config = scratch.join("registry.yml");
        let log = scratch.join("registry.log");
        fs::write(
            &config,
            format!(
                "version: 0.1\nlog: {{level: warn}}\n\
                 storage: {{filesystem: {{rootdirectory: \"{}\"}}}}\n\
                 http: {{addr: \"{address}\"}}\n",
                storage.display()
            ),
        )?;
        let out = File::create(&log)?;
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .context("docker-registry (Debian package docker-registry)")?;
        let mut registry = Self {
            child,
            address,
            storage: storage.to_owned(),
        };
        let begun = Instant::now();
        while TcpStream::connect(address).is_err() {
            let ended = registry.child.try_wait()?;
            if ended.is_some() || begun.elapsed() > START_LIMIT {
                let mut said = String::new();
                File::open(&log)?.read_to_string(&mut said)?;
                bail!("docker-registry does not answer on {address}: {said}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(registry)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// An image's full name, such as `127.0.0.1:5000/test/base:1`.
    pub fn name(&self, image: &str) -> String {
        format!("{}/{image}", self.address)
    }

    /// Digest of the manifest a tag names, from the registry's own files.
    pub fn digest(&self, image: &str) -> Result<String> {
        let (repository, tag) = image.split_once(':').context("an image without tag")?;
        let link = self.storage.join(format!(
            "docker/registry/v2/repositories/{repository}/_manifests/tags/{tag}/current/link"
        ));
        fs::read_to_string(&link).with_context(|| link.display().to_string())
    }

    /// A blob's bytes, manifests included, from the registry's own files.
    pub fn blob(&self, digest: &str) -> Result<Vec<u8>> {
        let hex = digest
            .strip_prefix("sha256:")
            .context("a digest without sha256")?;
        ensure!(hex.len() == 64, "digest {digest}");
        let path = self.storage.join(format!(
            "docker/registry/v2/blobs/sha256/{}/{hex}/data",
            &hex[..2]
        ));
        fs::read(&path).with_context(|| path.display().to_string())
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

//! The certificate of the configuration, as it is now.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// A certificate and its key, read again when a file changes.
pub struct Tls {
    certificate: PathBuf,
    key: PathBuf,
    stamp: Stamp,
    acceptor: TlsAcceptor,
}

/// What changes with a file: inode, length and time of both.
type Stamp = [Option<(u64, u64, i64, i64)>; 2];

impl Tls {
    /// Reads both files. The error is a sentence.
    pub async fn load(certificate: &Path, key: &Path) -> Result<Self, String> {
        let stamp = stamp(certificate, key).await;
        Ok(Self {
            certificate: certificate.to_owned(),
            key: key.to_owned(),
            stamp,
            acceptor: read(certificate.to_owned(), key.to_owned()).await?,
        })
    }

    /// For the next client. Files that are wrong now leave what was read before.
    pub async fn acceptor(&mut self) -> TlsAcceptor {
        let stamp = stamp(&self.certificate, &self.key).await;
        if stamp != self.stamp {
            self.stamp = stamp;
            match read(self.certificate.clone(), self.key.clone()).await {
                Ok(acceptor) => {
                    tracing::info!("the streaming server has a new certificate");
                    self.acceptor = acceptor;
                }
                Err(why) => tracing::warn!("{why}; the streaming server keeps the old one"),
            }
        }
        self.acceptor.clone()
    }
}

async fn stamp(certificate: &Path, key: &Path) -> Stamp {
    let one = async |path| {
        let file = tokio::fs::metadata(path).await.ok()?;
        Some((file.ino(), file.len(), file.mtime(), file.mtime_nsec()))
    };
    [one(certificate).await, one(key).await]
}

async fn read(certificate: PathBuf, key: PathBuf) -> Result<TlsAcceptor, String> {
    let read = move || {
        let of =
            |path: &Path, why: String| format!("{} cannot be used for TLS: {why}", path.display());
        let chain: Vec<_> = CertificateDer::pem_file_iter(&certificate)
            .and_then(Iterator::collect)
            .map_err(|error| of(&certificate, error.to_string()))?;
        if chain.is_empty() {
            return Err(of(&certificate, "it has no certificate".into()));
        }
        let secret = PrivateKeyDer::from_pem_file(&key);
        let secret = secret.map_err(|error| of(&key, error.to_string()))?;
        let config = ServerConfig::builder_with_provider(aws_lc_rs::default_provider().into())
            .with_safe_default_protocol_versions()
            .and_then(|config| {
                let config = config.with_no_client_auth();
                config.with_single_cert(chain, secret)
            });
        let mut config = config.map_err(|error| of(&certificate, error.to_string()))?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(TlsAcceptor::from(Arc::new(config)))
    };
    let result = tokio::task::spawn_blocking(read).await;
    result.map_err(|error| format!("the certificate was not read: {error}"))?
}

//! The streaming server: Exec, Attach and PortForward answer with a URL, and the client connects
//! there. A URL holds for one use, within a minute.

mod session;
mod token;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use serde::Deserialize;
use tokio::net::TcpListener;

pub use session::{
    Boxed, Duplex, Forward, Gone, Outcome, Reader, Session, Size, Task, Wanted, Writer,
};
use token::Tokens;
pub use token::{Full, Kind};

/// Where the streaming server listens.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Address and port; port 0 is one that is free.
    pub address: SocketAddr,
    /// A certificate chain in PEM form; with it and `key`, TLS is spoken.
    pub certificate: Option<PathBuf>,
    /// The certificate's private key in PEM form.
    pub key: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            address: (Ipv4Addr::LOCALHOST, 0).into(),
            certificate: None,
            key: None,
        }
    }
}

impl Config {
    /// The certificate's file and its key's, if there is to be TLS. The error says what is missing.
    pub fn tls(&self) -> Result<Option<(&PathBuf, &PathBuf)>, String> {
        match (&self.certificate, &self.key) {
            (Some(certificate), Some(key)) => Ok(Some((certificate, key))),
            (None, None) => Ok(None),
            (Some(_), None) => Err("streaming.certificate is given without streaming.key".into()),
            (None, Some(_)) => Err("streaming.key is given without streaming.certificate".into()),
        }
    }
}

/// Why there is no streaming server.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The address cannot be had.
    #[error("the streaming server cannot listen at {address}: {source}")]
    Address {
        /// The address of the configuration.
        address: SocketAddr,
        /// The system's error.
        source: std::io::Error,
    },
}

/// Makes URLs for the streaming server.
#[derive(Clone)]
pub struct Streaming {
    base: String,
    tokens: Arc<Tokens>,
}

impl Streaming {
    /// Listens as `config` says. The server is the future.
    pub async fn listen(
        config: &Config,
    ) -> Result<(Self, impl Future<Output = ()> + Send + 'static), ListenError> {
        let address = config.address;
        let failed = |source| ListenError::Address { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let streaming = Self {
            base: format!("http://{}", reached(listener.local_addr().map_err(failed)?)),
            tokens: Arc::default(),
        };
        Ok((streaming, async move {
            let _listener = listener;
            std::future::pending().await
        }))
    }

    /// A URL at which a client gets `task` done, once, within a minute.
    pub fn url(&self, kind: Kind, task: Task) -> Result<String, Full> {
        let token = self.tokens.add(kind, task, Instant::now())?;
        Ok(format!("{}/{kind}/{token}", self.base))
    }
}

/// The address at which a listener on all addresses is reached from this host.
fn reached(mut address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    address
}

//! The streaming server: Exec, Attach and PortForward answer with a URL, and the client connects
//! there. A URL holds for one use, within a minute.

mod command;
mod forward;
mod http;
mod line;
mod pipe;
mod session;
mod spdy;
#[cfg(test)]
mod tests;
mod tls;
mod token;
mod websocket;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use rustix::net::sockopt;
use serde::Deserialize;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use line::{Limits, Line};
pub use session::{Forward, Outcome, Reader, Session, Size, Task, Wanted, Writer};
use tls::Tls;
use token::Tokens;
pub use token::{Full, Kind};

/// How long a client's host may be silent until it is asked whether it is there, how often, and
/// how many times: it is given up after two minutes.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(60), Duration::from_secs(15), 4);
/// What a client is told when there are too many.
const BUSY: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\n\r\n\
    the streaming server has as many clients as it takes; try again later\n";

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
    /// The certificate or its key cannot be used.
    #[error("{0}")]
    Certificate(String),
}

/// Makes URLs for the streaming server.
#[derive(Clone)]
pub struct Streaming {
    base: String,
    tokens: Arc<Tokens>,
}

impl Streaming {
    /// Listens as `config` says. The server is the future; with it all connections end.
    pub async fn listen(
        config: &Config,
    ) -> Result<(Self, impl Future<Output = ()> + Send + 'static), ListenError> {
        Self::listen_with(config, Limits::default()).await
    }

    async fn listen_with(
        config: &Config,
        limits: Limits,
    ) -> Result<(Self, impl Future<Output = ()> + Send + 'static), ListenError> {
        let address = config.address;
        let failed = |source| ListenError::Address { address, source };
        let tls = match config.tls().map_err(ListenError::Certificate)? {
            Some((certificate, key)) => {
                let tls = Tls::load(certificate, key).await;
                Some(tls.map_err(ListenError::Certificate)?)
            }
            None => None,
        };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let scheme = if tls.is_some() { "https" } else { "http" };
        let reached = reached(listener.local_addr().map_err(failed)?);
        let streaming = Self {
            base: format!("{scheme}://{reached}"),
            tokens: Arc::default(),
        };
        let tokens = streaming.tokens.clone();
        Ok((streaming, serve(listener, tls, tokens, limits)))
    }

    /// A URL at which a client gets `task` done, once, within a minute.
    pub fn url(&self, kind: Kind, task: Task) -> Result<String, Full> {
        let token = self.tokens.add(kind, task, Instant::now())?;
        Ok(format!("{}/{kind}/{token}", self.base))
    }
}

async fn serve(listener: TcpListener, mut tls: Option<Tls>, tokens: Arc<Tokens>, limits: Limits) {
    let mut clients = JoinSet::new();
    loop {
        let socket = tokio::select! {
            socket = listener.accept() => socket,
            Some(_) = clients.join_next() => continue,
        };
        let socket = match socket {
            Ok((socket, _)) => socket,
            Err(error) => {
                tracing::warn!("the streaming server cannot take a client: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        if clients.len() >= limits.connections {
            // What a client does not take at once it need not know.
            let _ = socket.try_write(BUSY);
            continue;
        }
        let acceptor = match &mut tls {
            Some(tls) => Some(tls.acceptor().await),
            None => None,
        };
        clients.spawn(client(socket, acceptor, tokens.clone(), limits));
    }
}

async fn client(socket: TcpStream, tls: Option<TlsAcceptor>, tokens: Arc<Tokens>, limits: Limits) {
    // None of them matters for what a client gets.
    let (idle, interval, count) = KEEPALIVE;
    let _ = socket.set_nodelay(true);
    let _ = sockopt::set_socket_keepalive(&socket, true);
    let _ = sockopt::set_tcp_keepidle(&socket, idle);
    let _ = sockopt::set_tcp_keepintvl(&socket, interval);
    let _ = sockopt::set_tcp_keepcnt(&socket, count);
    let line = socket.as_fd().try_clone_to_owned();
    let line = match line.and_then(|watched| Line::new(watched, limits)) {
        Ok(line) => Arc::new(line),
        Err(error) => return tracing::warn!("a streaming client cannot be watched: {error}"),
    };
    let Some(tls) = tls else {
        return http::serve(TokioIo::new(socket), &line, &tokens).await;
    };
    match line.in_time(tls.accept(socket)).await {
        Some(Ok(socket)) => http::serve(TokioIo::new(socket), &line, &tokens).await,
        Some(Err(error)) => tracing::debug!("a client does not speak TLS: {error}"),
        None => {}
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

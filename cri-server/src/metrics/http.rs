//! `GET /metrics`.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::{Config, Metrics};
use crate::sandbox::Sandboxes;

/// Connections at once; further ones wait.
const CONNECTIONS: usize = 16;
/// How long one may last.
const CONNECTION: Duration = Duration::from_secs(30);
/// OpenMetrics, which is what Prometheus asks for first.
const FORMAT: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");

/// The figures cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("The metrics cannot be served at {address}: {source}")]
pub struct ListenError {
    address: SocketAddr,
    source: std::io::Error,
}

/// Where the figures are served, if anywhere.
pub struct Endpoint(Option<TcpListener>);

impl Endpoint {
    /// Listens as `config` says.
    pub async fn listen(config: &Config) -> Result<Self, ListenError> {
        let Some(address) = config.address else {
            return Ok(Self(None));
        };
        let listening = TcpListener::bind(address).await;
        let listening = listening.map_err(|source| ListenError { address, source });
        Ok(Self(Some(listening?)))
    }

    /// Serves them for ever.
    pub async fn serve(self, metrics: Arc<Metrics>, sandboxes: Sandboxes) {
        let Some(listener) = self.0 else {
            return std::future::pending().await;
        };
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        // Never closed.
        while let Ok(place) = Arc::clone(&places).acquire_owned().await {
            let Ok((stream, _)) = listener.accept().await else {
                // No descriptors, perhaps.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let (metrics, sandboxes) = (Arc::clone(&metrics), sandboxes.clone());
            tokio::spawn(async move {
                let answered = answer(stream, &metrics, &sandboxes);
                // A client that is slow or makes no sense is left.
                let _ = tokio::time::timeout(CONNECTION, answered).await;
                drop(place);
            });
        }
    }
}

async fn answer(stream: TcpStream, metrics: &Metrics, sandboxes: &Sandboxes) {
    let service = service_fn(async |request: hyper::Request<_>| {
        let _: &hyper::body::Incoming = request.body();
        let mut response = Response::new(Full::new(Bytes::new()));
        if request.uri().path() == "/metrics" {
            *response.body_mut() = Full::from(metrics.render(sandboxes).await);
            response.headers_mut().insert(CONTENT_TYPE, FORMAT);
        } else {
            *response.status_mut() = StatusCode::NOT_FOUND;
        }
        Ok::<_, Infallible>(response)
    });
    let served = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    if let Err(error) = served.await {
        tracing::debug!(%error, "a reader of the metrics is gone");
    }
}

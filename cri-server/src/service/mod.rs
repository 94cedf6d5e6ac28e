//! The CRI services: translation only, a few lines per RPC.

mod edge;
mod event;
mod image;
mod list;
mod readiness;
mod runtime;
mod status;
mod stream;
mod translate;

use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_cri_api::v1::image_service_server::ImageServiceServer;
use bulkhead_cri_api::v1::runtime_service_server::RuntimeServiceServer;
use rustix::fs::FlockOperation;
use tokio::net::UnixListener;
use tokio::signal::unix::SignalKind;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use crate::config::Config;
use crate::container::exec::OUTPUT_BYTES;
use crate::image::{ImageError, ImageStore};
use crate::metrics::{self, Calls, Endpoint};
use crate::network::{Network, NetworkError};
use crate::pulls::Pulls;
use crate::sandbox::{Host, SandboxError, Sandboxes};
use crate::streaming::{ListenError, Streaming};

/// The largest message that is taken or given, in bytes (the kubelet's bound).
const LARGEST_MESSAGE: usize = 16 << 20;
/// The largest answer of a container call: two full outputs of an ExecSync and some room.
const LARGEST_ANSWER: usize = 2 * OUTPUT_BYTES + (64 << 10);
/// How long plugins may collect what pods of earlier left, and look at the pods there are, before
/// requests are served.
const COLLECTION: Duration = Duration::from_secs(30);
/// How long calls under way may take to end when the server does.
const FAREWELL: Duration = Duration::from_secs(5);

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The metrics cannot be served.
    #[error(transparent)]
    Metrics(#[from] metrics::ListenError),
    /// Exec, attach and port-forward cannot be served.
    #[error("{0}; see [streaming] of the configuration")]
    Streaming(#[from] ListenError),
    /// Another server has the state.
    #[error("Another server uses {root}; stop it, or give this one a root of its own")]
    Taken {
        /// The state's directory.
        root: PathBuf,
    },
    /// Another server has the socket.
    #[error("Another server answers on {socket}; stop it, or give this one a `socket` of its own")]
    Answered {
        /// The CRI socket.
        socket: PathBuf,
    },
    /// A file or socket failed.
    #[error("{path}: {source}{advice}", path = path.display(), advice = advice(source))]
    File {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The images cannot be had.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The network cannot be had.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The pods cannot be taken up.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The connections failed.
    #[error("The server failed: {0}")]
    Transport(#[from] tonic::transport::Error),
}

fn advice(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::PermissionDenied => "; the server has to run as root",
        _ => "",
    }
}

/// Serves the CRI until SIGTERM or SIGINT; pods run on.
pub async fn serve(config: Config) -> Result<(), ServeError> {
    let at = |source| ServeError::File {
        path: "the process's signals".into(),
        source,
    };
    let mut terminate = tokio::signal::unix::signal(SignalKind::terminate()).map_err(at)?;
    let mut interrupt = tokio::signal::unix::signal(SignalKind::interrupt()).map_err(at)?;
    serve_until(config, async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
    .await
}

/// Serves the CRI until `stop`; pods run on.
pub async fn serve_until(
    config: Config,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    make_directory(&config.root)?;
    make_directory(&config.run)?;
    for below in ["sandboxes", "netns"] {
        make_directory(&config.run.join(below))?;
    }
    let _lock = lock(&config.root)?;
    let network = Network::open(config.network.clone(), &config.root, &config.run).await?;
    let endpoint = Endpoint::listen(&config.metrics).await?;
    let (streaming, streams) = Streaming::listen(&config.streaming).await?;
    let (root, registries) = (config.root.clone(), config.registry.clone());
    let images = tokio::task::spawn_blocking(move || ImageStore::open(&root, registries))
        .await
        .map_err(|error| at(&config.root)(std::io::Error::other(error)))??;
    let socket = config.socket();
    let writable = config.root.join("sandboxes");
    let host = Host::new(config, network, images.clone()).map_err(at(&socket))?;
    let sandboxes = Sandboxes::open(Arc::new(host)).await?;
    let listener = listen(&socket)?;
    let pods = sandboxes.list();
    let known: Vec<String> = pods.iter().map(|pod| pod.record().id.clone()).collect();
    let network = &sandboxes.host().network;
    let ready = pods.iter().filter(|pod| pod.is_ready());
    let ready: Vec<String> = ready.map(|pod| pod.record().id.clone()).collect();
    // Before the first request: what a new pod has must not be taken for what an old one left, and
    // plugins must not be asked about a pod that is being taken down.
    let plugins = async {
        network.collect(&known).await;
        network.check(&ready).await;
    };
    if tokio::time::timeout(COLLECTION, plugins).await.is_err() {
        tracing::warn!("CNI plugins take long to look after the pods of an earlier server");
    }
    let pods = known.len();
    tracing::info!(socket = %socket.display(), pods, "serving");
    let host = Arc::clone(sandboxes.host());
    let ending = Arc::clone(&host);
    tokio::spawn(async move {
        for obstacle in obstacles(&host).await.into_iter().flat_map(Result::err) {
            tracing::warn!("no pod can run here: {obstacle}");
        }
    });

    let metrics = Arc::clone(&sandboxes.host().metrics);
    let figures = endpoint.serve(Arc::clone(&metrics), sandboxes.clone());
    let runtime = RuntimeServiceServer::new(runtime::Runtime::new(sandboxes, streaming))
        .max_decoding_message_size(LARGEST_MESSAGE)
        .max_encoding_message_size(LARGEST_ANSWER);
    let pulls = Pulls::new();
    let images = ImageServiceServer::new(image::Images::new(images, writable, pulls.clone()))
        .max_decoding_message_size(LARGEST_MESSAGE)
        .max_encoding_message_size(LARGEST_MESSAGE);
    let (stopping, stopped) = tokio::sync::oneshot::channel();
    let server = Server::builder()
        .layer(Calls(metrics))
        .add_service(runtime)
        .add_service(images)
        .add_service(pulls.server())
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async move {
            stop.await;
            ending.events.end();
            // The receiver below lives as long as this future.
            let _ = stopping.send(());
        });
    let farewell = async {
        if stopped.await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(FAREWELL).await;
    };
    let served = tokio::select! {
        served = server => served.map_err(ServeError::from),
        () = streams => Ok(()),
        () = figures => Ok(()),
        () = farewell => Ok(()),
    };
    // A later server replaces it anyway.
    let _ = std::fs::remove_file(&socket);
    tracing::info!("the server ends; pods run on");
    served
}

/// Whether pods can run, and whether they can have a network; why not.
async fn obstacles(host: &Arc<Host>) -> [Result<(), String>; 2] {
    let looking = Arc::clone(host);
    let runtime = tokio::task::spawn_blocking(move || looking.ready()).await;
    let runtime = runtime.unwrap_or_else(|error| Err(error.to_string()));
    [runtime, host.network.ready().await]
}

/// A lock that ends with the process, however it ends.
fn lock(root: &Path) -> Result<File, ServeError> {
    let path = root.join("lock");
    let mut options = OpenOptions::new();
    let file = options
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(at(&path))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(ServeError::Taken {
            root: root.to_owned(),
        }),
        Err(error) => Err(at(&path)(error.into())),
    }
}

/// Listens on a socket only root can use, replacing one that nobody serves.
fn listen(path: &Path) -> Result<UnixListener, ServeError> {
    if let Some(directory) = path.parent() {
        make_directory(directory)?;
    }
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(ServeError::Answered {
            socket: path.to_owned(),
        });
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(at(path)(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(at(path))?;
    let private = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(path, private).map_err(at(path))?;
    Ok(listener)
}

fn make_directory(path: &Path) -> Result<(), ServeError> {
    let mut builder = DirBuilder::new();
    let made = builder.recursive(true).mode(0o700).create(path);
    made.map_err(at(path))
}

fn at(path: &Path) -> impl FnOnce(std::io::Error) -> ServeError + use<> {
    let path = path.to_owned();
    move |source| ServeError::File { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_root_has_one_server() {
        let root = tempfile::tempdir().unwrap();
        let held = lock(root.path()).unwrap();
        assert!(matches!(lock(root.path()), Err(ServeError::Taken { .. })));
        drop(held);
        lock(root.path()).unwrap();
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_served_one_is_not() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("run/bulkhead.sock");
        let first = listen(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let second = listen(&path);
        assert!(matches!(second, Err(ServeError::Answered { .. })));
        drop(first);
        listen(&path).unwrap();
    }
}

//! The control stream: dial, serve gRPC on it, and dial again when it is lost.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;

use bulkhead_agent_api::v1::agent_server::AgentServer;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use tokio::sync::watch;

use crate::boot::Boot;
use crate::console;
use crate::dial::{BackOff, Dialer};
use crate::reap::Reaper;
use crate::sandbox::Sandbox;
use crate::service::Service;

/// Threads for blocking work, at most: mounts and process starts, a few at a time.
const BLOCKING_THREADS: usize = 8;

/// Most calls at a time. The end of every container and exec that runs is waited for by one, and
/// there must be room for those that end them.
const CALLS: u32 = 16 << 10;

/// Why the agent cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The event loop needs epoll and threads.
    #[error("cannot start the agent's event loop: {0}")]
    Loop(#[from] io::Error),
}

/// Serves for ever.
pub fn run(boot: Boot) -> Result<Infallible, ControlError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .max_blocking_threads(BLOCKING_THREADS)
        .build()?;
    runtime.block_on(serve(boot))
}

async fn serve(boot: Boot) -> Result<Infallible, ControlError> {
    let reaper = Reaper::start(boot.children)?;
    let dialer = Arc::new(Dialer::new());
    // Whether a server is there: while none is, nothing may be given up as unread.
    let attended = watch::Sender::new(false);
    let sandbox = Sandbox::start(reaper, Arc::clone(&dialer), attended.subscribe());
    let service = AgentServer::new(Service::new(boot.id, sandbox))
        .max_decoding_message_size(crate::service::MOST_REQUEST_BYTES);
    let back_off = BackOff::new();
    let mut told = false;
    loop {
        match dialer.control().await {
            Ok(stream) => {
                back_off.reset();
                told = false;
                attended.send_replace(true);
                let served = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .max_concurrent_streams(CALLS)
                    .serve_connection(
                        TokioIo::new(stream),
                        TowerToHyperService::new(service.clone()),
                    )
                    .await;
                attended.send_replace(false);
                if let Err(error) = served {
                    console::say(&format!("the control stream ended: {error}"));
                }
            }
            Err(error) if !told => {
                told = true;
                console::say(&format!("no server answers yet: {error}"));
            }
            Err(_) => {}
        }
        tokio::time::sleep(back_off.take()).await;
    }
}

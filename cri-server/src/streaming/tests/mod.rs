//! A server on a loopback socket, and what its tests have in common.

mod http;
mod spdy;
mod spdy_client;
mod spdy_forward;
mod websocket;

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::session::Boxed;
use super::*;

/// Long enough for anything that is to happen.
const SOON: Duration = Duration::from_secs(20);
/// For limits that are to be met.
const SHORT: Duration = Duration::from_millis(100);

const ALL: Wanted = Wanted {
    stdin: true,
    stdout: true,
    stderr: true,
    tty: false,
};

struct Server {
    streaming: Streaming,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn short() -> Limits {
    Limits {
        farewell: SHORT,
        ..Limits::default()
    }
}

impl Server {
    async fn start() -> Self {
        Self::with(short()).await
    }

    async fn with(limits: Limits) -> Self {
        let (streaming, server) = Streaming::listen_with(&Config::default(), limits)
            .await
            .unwrap();
        let task = tokio::spawn(server);
        Self { streaming, task }
    }

    fn exec<F>(&self, wanted: Wanted, work: impl FnOnce(Session) -> F + Send + 'static) -> String
    where
        F: Future<Output = Outcome> + Send + 'static,
    {
        let work = Box::new(|session| Box::pin(work(session)) as _);
        let task = Task::Streams(wanted, work);
        self.streaming.url(Kind::Exec, task).unwrap()
    }

    fn forward<F>(&self, work: impl FnOnce(mpsc::Receiver<Forward>) -> F + Send + 'static) -> String
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let task = Task::Forward(
            Vec::new(),
            Box::new(|forwards| Box::pin(work(forwards)) as _),
        );
        self.streaming.url(Kind::PortForward, task).unwrap()
    }
}

/// What must not wait for ever.
async fn soon<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, work).await.expect("in time")
}

/// As `cat`, with a word on the standard error: what goes in comes out, then the code.
async fn cat(mut session: Session, code: i32) -> Outcome {
    let mut stderr = session.stderr.take();
    if let Some(stderr) = &mut stderr {
        stderr.write_all(b"begun").await.unwrap();
    }
    let (mut stdin, mut stdout) = (session.stdin.unwrap(), session.stdout.unwrap());
    match tokio::io::copy(&mut stdin, &mut stdout).await {
        Ok(_) => Outcome::Exit(code),
        Err(error) => Outcome::Failed(error.to_string()),
    }
}

/// A process that takes no input and ends with its client; tells how its input ended.
fn stubborn(
    told: oneshot::Sender<std::io::Result<usize>>,
) -> impl FnOnce(Session) -> Boxed<Outcome> {
    |session| {
        Box::pin(async move {
            session.gone.await;
            let mut input = Vec::new();
            let result = match session.stdin {
                Some(mut stdin) => stdin.read_to_end(&mut input).await,
                None => Ok(0),
            };
            let _ = told.send(result);
            Outcome::Failed("gone".into())
        })
    }
}

/// An echo at each port but 1, which cannot be reached.
async fn echoes(mut forwards: mpsc::Receiver<Forward>) {
    let mut all = JoinSet::new();
    while let Some(mut forward) = forwards.recv().await {
        all.spawn(async move {
            if forward.port == 1 {
                let _ = forward.error.send("connection refused".into());
                return;
            }
            let line = format!("port {}\n", forward.port);
            let _ = forward.data.write_all(line.as_bytes()).await;
            let (mut read, mut write) = tokio::io::split(forward.data);
            let _ = tokio::io::copy(&mut read, &mut write).await;
            let _ = write.shutdown().await;
        });
    }
}

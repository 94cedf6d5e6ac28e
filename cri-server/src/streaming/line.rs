//! A client's connection below any protocol: whether it is still there, and in use.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::session::Gone;

/// Limits of a connection.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How long a connection may carry no byte of a stream; the kubelet's
    /// `streaming-connection-idle-timeout` by default.
    pub idle: Duration,
    /// How long a client may take for its request, and then for the streams it needs.
    pub creation: Duration,
    /// How long work may go on for a client that is gone.
    pub grace: Duration,
    /// How long a client may take to close when all is said.
    pub farewell: Duration,
    /// Connections at once.
    pub connections: usize,
    /// Streams of one connection at once.
    pub streams: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            idle: Duration::from_secs(4 * 60 * 60),
            creation: Duration::from_secs(30),
            grace: Duration::from_secs(60),
            farewell: Duration::from_secs(5),
            connections: 1000,
            streams: 512,
        }
    }
}

/// A client's connection.
pub struct Line {
    pub limits: Limits,
    /// The socket, or a duplicate of it: it stays open until the line is dropped too.
    socket: TcpStream,
    lost: watch::Sender<bool>,
    began: Instant,
    /// Milliseconds from `began` to the last byte of a stream.
    used: AtomicU64,
}

impl Line {
    /// Watches the connection of `socket`, a duplicate of what is read and written elsewhere. To be
    /// called within a runtime.
    pub fn new(socket: OwnedFd, limits: Limits) -> io::Result<Self> {
        Ok(Self {
            limits,
            socket: TcpStream::from_std(socket.into())?,
            lost: watch::Sender::new(false),
            began: Instant::now(),
            used: AtomicU64::new(0),
        })
    }

    /// Notes that a byte of a stream has come or gone.
    pub fn touch(&self) {
        let since = self.began.elapsed().as_millis();
        let since = u64::try_from(since).unwrap_or(u64::MAX);
        self.used.store(since, Ordering::Relaxed);
    }

    /// Tells everybody that the client is gone.
    pub fn lose(&self) {
        self.lost.send_replace(true);
    }

    /// Completes when the client is gone.
    pub async fn lost(&self) {
        // The sender lives as long as `self`.
        let _ = self.lost.subscribe().wait_for(|lost| *lost).await;
    }

    /// Likewise, for others.
    pub fn gone(&self) -> Gone {
        let mut lost = self.lost.subscribe();
        Gone::new(Box::pin(async move {
            let _ = lost.wait_for(|lost| *lost).await;
        }))
    }

    /// Completes when the client has closed its end, even if bytes of it were not read yet, or
    /// when no byte of a stream has come or gone for too long.
    pub async fn ended(&self) {
        tokio::select! {
            () = self.closed() => {}
            () = self.idle() => {}
        }
    }

    async fn closed(&self) {
        while let Ok(ready) = self.socket.ready(Interest::READABLE).await {
            if ready.is_read_closed() {
                return;
            }
            // Others read: until more comes there is nothing new.
            let nothing = || Err::<(), _>(io::ErrorKind::WouldBlock.into());
            let _ = self.socket.try_io(Interest::READABLE, nothing);
        }
    }

    async fn idle(&self) {
        loop {
            let used = Duration::from_millis(self.used.load(Ordering::Relaxed));
            let until = self.began + used + self.limits.idle;
            if until <= Instant::now() {
                return;
            }
            sleep_until(until).await;
        }
    }

    /// What `work` comes to, if it does not go on for too long after the client was lost.
    pub async fn graced<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let late = async {
            self.lost().await;
            sleep(self.limits.grace).await;
        };
        tokio::select! {
            done = work => Some(done),
            () = late => None,
        }
    }

    /// What `step` of opening a connection comes to, if it is in time.
    pub async fn in_time<T>(&self, step: impl Future<Output = T>) -> Option<T> {
        timeout(self.limits.creation, step).await.ok()
    }
}

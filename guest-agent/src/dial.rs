//! Streams to the host. The agent always dials; nothing in the guest is listened for.

use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use bulkhead_agent_api::{Greeting, Secret};
use rustix::io::Errno;
use rustix::net::SendFlags;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::watch;

use crate::sys;

/// The host's context id, virtio 1.2 §5.10.4.
const HOST: u32 = 2;
/// How long a dial may take. The kernel's own limit is 2 s.
const PATIENCE: Duration = Duration::from_secs(5);

/// A stream of bytes in both directions, each of which can be shut down by itself.
///
/// Tokio knows no AF_VSOCK; its Unix stream only ever calls read, write and shutdown on the
/// descriptor, which mean the same for both families.
pub type Stream = UnixStream;

/// Fails where the other end takes no more bytes: a host that has only ended its own side still does.
pub fn still_open(stream: &Stream) -> io::Result<()> {
    match rustix::net::send(stream, &[], SendFlags::NOSIGNAL) {
        Ok(_) | Err(Errno::AGAIN) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Dials the host and keeps the secret of this boot.
#[derive(Debug)]
pub struct Dialer {
    secret: watch::Sender<Option<Secret>>,
}

impl Dialer {
    /// Before the first stream there is no secret.
    pub fn new() -> Self {
        Self {
            secret: watch::Sender::new(None),
        }
    }

    /// Opens the control stream; the first one brings the secret.
    pub async fn control(&self) -> io::Result<Stream> {
        let known = *self.secret.borrow();
        let greeting = Greeting {
            purpose: bulkhead_agent_api::Purpose::Control,
            secret: known.unwrap_or(Secret::NONE),
            token: 0,
            offset: 0,
        };
        limited(async {
            let mut stream = connect().await?;
            stream.write_all(&greeting.encode()).await?;
            if known.is_none() {
                let mut secret = [0; 32];
                stream.read_exact(&mut secret).await?;
                self.secret.send_replace(Some(Secret(secret)));
            }
            Ok(stream)
        })
        .await
    }

    /// Opens any other stream; `greeting.secret` is filled in.
    pub async fn open(&self, greeting: Greeting) -> io::Result<Stream> {
        let secret = (*self.secret.borrow())
            .ok_or_else(|| io::Error::other("the host has not given its secret yet"))?;
        let greeting = Greeting { secret, ..greeting };
        limited(async {
            let mut stream = connect().await?;
            stream.write_all(&greeting.encode()).await?;
            Ok(stream)
        })
        .await
    }
}

async fn limited<T>(dial: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    match tokio::time::timeout(PATIENCE, dial).await {
        Ok(done) => done,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

async fn connect() -> io::Result<Stream> {
    let socket = sys::begin_vsock_connect(HOST, bulkhead_agent_api::PORT)?;
    let socket = sys::watch(socket)?;
    socket.writable().await?.retain_ready();
    let socket: OwnedFd = socket.into_inner();
    rustix::net::sockopt::socket_error(&socket)?.map_err(io::Error::from)?;
    UnixStream::from_std(socket.into())
}

/// The wait before the next dial: doubles from 10 ms to 1 s.
#[derive(Debug)]
pub struct BackOff {
    next: Cell<Duration>,
}

impl BackOff {
    const FIRST: Duration = Duration::from_millis(10);
    const LAST: Duration = Duration::from_secs(1);

    /// Starts at 10 ms.
    pub fn new() -> Self {
        Self {
            next: Cell::new(Self::FIRST),
        }
    }

    /// The wait to take now.
    pub fn take(&self) -> Duration {
        let now = self.next.get();
        self.next.set((now * 2).min(Self::LAST));
        now
    }

    /// After a success.
    pub fn reset(&self) {
        self.next.set(Self::FIRST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_grows_to_a_second_and_no_further() {
        let wait = BackOff::new();
        let waits: Vec<u128> = (0..9).map(|_| wait.take().as_millis()).collect();
        assert_eq!(waits, [10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
        wait.reset();
        assert_eq!(wait.take().as_millis(), 10);
    }
}

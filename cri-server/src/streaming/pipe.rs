//! Bytes between a connection and what works for it: bounded, so that whoever writes waits for
//! whoever reads.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};

/// The most bytes that wait in one direction: SPDY's window at the start (SPDY/3.1, 2.6.8).
pub const CAPACITY: usize = 64 << 10;

/// The end of a stream that is given away. Unlike a [`DuplexStream`]'s, its end tells whether the
/// client has ended it or was lost.
pub struct Pipe {
    io: DuplexStream,
    broken: Broken,
}

/// Whether a pipe was broken off.
#[derive(Clone, Default)]
pub struct Broken(Arc<AtomicBool>);

impl Broken {
    /// From now on the pipe's end is an error. To be called before the other end is dropped.
    pub fn set(&self) {
        self.0.store(true, Ordering::Release);
    }
}

/// The end to give away, the other one, and how to say that it was broken off.
pub fn pipe() -> (Pipe, DuplexStream, Broken) {
    let (io, other) = tokio::io::duplex(CAPACITY);
    let broken = Broken::default();
    let pipe = Pipe {
        io,
        broken: broken.clone(),
    };
    (pipe, other, broken)
}

impl AsyncRead for Pipe {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.remaining();
        let result = Pin::new(&mut self.io).poll_read(context, buffer);
        let ended = matches!(result, Poll::Ready(Ok(()))) && buffer.remaining() == before;
        if ended && before > 0 && self.broken.0.load(Ordering::Acquire) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        result
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn an_end_and_a_break_are_told_apart_after_the_last_byte() {
        let mut read = [0; 8];
        let (mut pipe, mut other, _broken) = pipe();
        other.write_all(b"whole").await.unwrap();
        drop(other);
        assert_eq!(pipe.read(&mut read).await.unwrap(), 5);
        assert_eq!(pipe.read(&mut read).await.unwrap(), 0);
        let (mut pipe, mut other, broken) = super::pipe();
        other.write_all(b"part").await.unwrap();
        broken.set();
        drop(other);
        assert_eq!(pipe.read(&mut read).await.unwrap(), 4);
        let error = pipe.read(&mut read).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
}

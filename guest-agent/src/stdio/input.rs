//! A process's stdin: from the host into its pipe.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;

use crate::dial::Stream;

/// Most bytes on the way from the host to the process.
const BUFFER: usize = 16 << 10;

/// A process's stdin. Dropping it closes the pipe.
#[derive(Debug)]
pub struct Input {
    streams: mpsc::Sender<Stream>,
}

impl Input {
    /// Writes into `pipe` what the streams bring.
    pub fn start(pipe: OwnedFd) -> io::Result<Self> {
        let pipe = pipe::Sender::from_owned_fd(pipe)?;
        let (streams, incoming) = mpsc::channel(1);
        tokio::spawn(pump(pipe, incoming));
        Ok(Self { streams })
    }

    /// To hand over a stream; an error means that stdin is closed.
    pub fn opening(&self) -> mpsc::Sender<Stream> {
        self.streams.clone()
    }
}

/// Ends, closing the pipe, when the host shuts its side of a stream down or the process closes
/// its end. A stream that breaks is only waited to be followed by another.
async fn pump(mut pipe: pipe::Sender, mut incoming: mpsc::Receiver<Stream>) {
    let mut buffer = vec![0; BUFFER];
    let Some(mut stream) = incoming.recv().await else {
        return;
    };
    loop {
        let next = tokio::select! {
            next = incoming.recv() => next,
            read = stream.read(&mut buffer) => match read {
                Ok(0) => return,
                Ok(length) => {
                    let bytes = buffer.get(..length).unwrap_or_default();
                    if pipe.write_all(bytes).await.is_err() {
                        return;
                    }
                    continue;
                }
                Err(_) => incoming.recv().await,
            },
        };
        match next {
            Some(next) => stream = next,
            None => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_process_reads_what_the_host_sends_and_then_the_end() {
        let (process, pipe) = rustix::pipe::pipe().unwrap();
        let input = Input::start(pipe).unwrap();
        let (mut host, guest) = Stream::pair().unwrap();
        input.opening().send(guest).await.unwrap();
        host.write_all(b"typed").await.unwrap();
        host.shutdown().await.unwrap();
        let mut process = pipe::Receiver::from_owned_fd(process).unwrap();
        let mut seen = Vec::new();
        process.read_to_end(&mut seen).await.unwrap();
        assert_eq!(seen, b"typed");
    }
}

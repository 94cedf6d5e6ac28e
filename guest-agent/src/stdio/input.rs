//! A process's stdin: from the host into its pipe or terminal.

use rustix::termios::SpecialCodeIndex;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;

use crate::dial::{self, Stream};
use crate::stdio::End;

/// Most bytes on the way from the host to the process.
const BUFFER: usize = 16 << 10;

/// A process's stdin. Dropping it closes the pipe; a terminal stays open.
#[derive(Debug)]
pub struct Input {
    streams: mpsc::Sender<Stream>,
}

impl Input {
    /// Writes into a pipe what the streams bring.
    pub fn pipe(pipe: End) -> Self {
        let (streams, incoming) = mpsc::channel(1);
        tokio::spawn(async move {
            pump(&pipe, incoming).await;
        });
        Self { streams }
    }

    /// Types into a terminal what the streams bring.
    pub fn terminal(master: End) -> Self {
        let (streams, incoming) = mpsc::channel(1);
        tokio::spawn(async move {
            if let Some(last) = pump(&master, incoming).await {
                end_of_file(&master, last).await;
            }
        });
        Self { streams }
    }

    /// To hand over a stream; an error means that stdin is closed.
    pub fn opening(&self) -> mpsc::Sender<Stream> {
        self.streams.clone()
    }
}

/// Ends when the host shuts its side of a stream down, with the last byte it sent, a newline if
/// there was none; or with nothing when the process closes its end. A stream that breaks, or whose
/// host is gone, is only waited to be followed by another.
async fn pump(end: &End, mut incoming: mpsc::Receiver<Stream>) -> Option<u8> {
    let mut buffer = vec![0; BUFFER];
    let mut last = b'\n';
    let mut stream = incoming.recv().await?;
    loop {
        let next = tokio::select! {
            next = incoming.recv() => next,
            read = stream.read(&mut buffer) => match read {
                Ok(0) if dial::still_open(&stream).is_ok() => return Some(last),
                Ok(0) | Err(_) => incoming.recv().await,
                Ok(length) => {
                    let bytes = buffer.get(..length).unwrap_or_default();
                    end.write_all(bytes).await.ok()?;
                    last = bytes.last().copied().unwrap_or(last);
                    continue;
                }
            },
        };
        stream = next?;
    }
}

/// A terminal has no end of its own: a person types the character that means it, which first gives
/// away a line that is begun (termios(3), VEOF).
async fn end_of_file(master: &End, last: u8) {
    let Ok(settings) = rustix::termios::tcgetattr(master) else {
        return;
    };
    let typed = [settings.special_codes[SpecialCodeIndex::VEOF]; 2];
    let typed = if last == b'\n' { &typed[..1] } else { &typed };
    // The process may be over.
    let _ = master.write_all(typed).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;
    use tokio::net::unix::pipe;

    #[tokio::test]
    async fn the_process_reads_what_the_host_sends_and_then_the_end() {
        let (process, pipe) = rustix::pipe::pipe().unwrap();
        let input = Input::pipe(End::new(pipe).unwrap());
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

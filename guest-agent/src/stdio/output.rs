//! One output stream: from the process's pipe through a ring to the host.

use std::io;

use tokio::io::AsyncWriteExt;
use tokio::sync::{mpsc, oneshot, watch};

use crate::dial::Stream;
use crate::stdio::End;
use crate::stdio::ring::Ring;

/// Most bytes moved in one step.
const STEP: usize = 32 << 10;

/// Why a stream cannot be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The host wants bytes that do not exist yet.
    #[error("offset {wanted} lies behind the {end} bytes the process has written")]
    Beyond {
        /// The offset asked for.
        wanted: u64,
        /// The end of the output so far.
        end: u64,
    },
    /// The process is being removed.
    #[error("the stream is gone")]
    Gone,
}

/// How far an output stream is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// The process and all who shared its pipe have closed it.
    pub ended: bool,
    /// Bytes read from the process.
    pub read: u64,
    /// Bytes the host has acknowledged.
    pub acknowledged: u64,
}

impl Progress {
    /// Whether nothing more will come and all that came is safe with the host.
    pub fn is_complete(&self) -> bool {
        self.ended && self.read == self.acknowledged
    }
}

/// An output stream. Dropping it ends its task.
#[derive(Debug)]
pub struct Output {
    commands: mpsc::Sender<Command>,
    progress: watch::Receiver<Progress>,
}

#[derive(Debug)]
enum Command {
    Seek(u64, oneshot::Sender<Result<u64, StreamError>>),
    Use(Stream, u64),
    Close,
}

/// The right to hand a stream to an output, kept apart so that dialling delays nobody.
#[derive(Debug, Clone)]
pub struct Opening {
    commands: mpsc::Sender<Command>,
}

impl Opening {
    /// Ends the stream in use, takes all before `offset` as acknowledged, and says from where
    /// the next stream will be fed: `offset`, or later if the host had acknowledged more.
    pub async fn seek(&self, offset: u64) -> Result<u64, StreamError> {
        let (reply, answer) = oneshot::channel();
        let sent = self.commands.send(Command::Seek(offset, reply)).await;
        sent.map_err(|_| StreamError::Gone)?;
        answer.await.map_err(|_| StreamError::Gone)?
    }

    /// Feeds `stream` from `offset` on.
    pub async fn feed(&self, stream: Stream, offset: u64) -> Result<(), StreamError> {
        let sent = self.commands.send(Command::Use(stream, offset)).await;
        sent.map_err(|_| StreamError::Gone)
    }
}

/// The right to end an output that some process still holds open.
#[derive(Debug, Clone)]
pub struct Closing {
    /// Not counted, so that it does not keep a dropped output.
    commands: mpsc::WeakSender<Command>,
}

impl Closing {
    /// Takes what was written until now as all there is. Who writes later is told that nobody
    /// reads (`EPIPE`).
    pub async fn close(&self) {
        if let Some(commands) = self.commands.upgrade() {
            // One that is gone is closed.
            let _ = commands.send(Command::Close).await;
        }
    }
}

impl Output {
    /// Reads `source` from now on, keeping at most `capacity` bytes that nobody has acknowledged.
    pub fn start(source: End, capacity: usize) -> Self {
        let (commands, incoming) = mpsc::channel(4);
        let (progress, watched) = watch::channel(Progress::default());
        let pump = Pump {
            source: Some(source),
            left: None,
            ring: Ring::new(capacity),
            stream: None,
            progress,
        };
        tokio::spawn(pump.run(incoming));
        Self {
            commands,
            progress: watched,
        }
    }

    /// To open a stream to the host.
    pub fn opening(&self) -> Opening {
        Opening {
            commands: self.commands.clone(),
        }
    }

    /// To end it while it is held open.
    pub fn closing(&self) -> Closing {
        Closing {
            commands: self.commands.downgrade(),
        }
    }

    /// How far it is, and news of it.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }
}

/// The stream in use.
#[derive(Debug)]
struct Fed {
    stream: Stream,
    /// Offset of the next byte to send.
    next: u64,
    /// Our side is shut down.
    finished: bool,
    acknowledgement: [u8; 8],
    received: usize,
}

/// The task's own state.
struct Pump {
    /// `None` after its end.
    source: Option<End>,
    /// How many bytes are still taken from it, once it is to be closed.
    left: Option<u64>,
    ring: Ring,
    stream: Option<Fed>,
    progress: watch::Sender<Progress>,
}

impl Pump {
    async fn run(mut self, mut incoming: mpsc::Receiver<Command>) {
        loop {
            tokio::select! {
                command = incoming.recv() => match command {
                    Some(command) => self.obey(command),
                    None => return,
                },
                () = readable(&self.source, self.left, self.ring.room()) => self.read(),
                () = acknowledged(&self.stream) => self.take_acknowledgement(),
                () = writable(&self.stream, self.ring.end()) => self.write(),
            }
            self.finish().await;
            self.publish();
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Seek(offset, reply) => {
                self.stream = None;
                let _ = reply.send(if self.ring.release(offset) {
                    Ok(self.ring.start())
                } else {
                    Err(StreamError::Beyond {
                        wanted: offset,
                        end: self.ring.end(),
                    })
                });
            }
            // Bytes acknowledged since on another stream cannot be sent again: this one is
            // dropped, and the host asks anew.
            Command::Use(stream, next) if next >= self.ring.start() => {
                self.stream = Some(Fed {
                    stream,
                    next,
                    finished: false,
                    acknowledgement: [0; 8],
                    received: 0,
                });
            }
            Command::Use(..) => {}
            Command::Close => {
                let waiting = self.source.as_ref().map(End::waiting);
                self.left = Some(waiting.and_then(Result::ok).unwrap_or(0));
                self.end_when_taken();
            }
        }
    }

    fn read(&mut self) {
        let Some(source) = &self.source else { return };
        let mut buffer = [0; STEP];
        let left = self.left.and_then(|left| usize::try_from(left).ok());
        let room = self.ring.room().min(STEP).min(left.unwrap_or(STEP));
        let Some(buffer) = buffer.get_mut(..room) else {
            return;
        };
        let read = match self.left {
            None => source.try_read(buffer),
            Some(_) => source.read_now(buffer),
        };
        match read {
            Ok(0) => self.source = None,
            Ok(length) => {
                self.ring.append(buffer.get(..length).unwrap_or_default());
                self.left = self.left.map(|left| left.saturating_sub(length as u64));
                self.end_when_taken();
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && self.left.is_none() => {}
            Err(_) => self.source = None,
        }
    }

    fn end_when_taken(&mut self) {
        if self.left == Some(0) {
            self.source = None;
        }
    }

    fn write(&mut self) {
        let Some(fed) = &mut self.stream else { return };
        let run = self.ring.from(fed.next);
        match fed.stream.try_write(run.get(..STEP).unwrap_or(run)) {
            Ok(length) => fed.next += length as u64,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => self.stream = None,
        }
    }

    fn take_acknowledgement(&mut self) {
        let Some(fed) = &mut self.stream else { return };
        let Some(rest) = fed.acknowledgement.get_mut(fed.received..) else {
            return;
        };
        match fed.stream.try_read(rest) {
            Ok(0) => self.stream = None,
            Ok(length) => {
                fed.received += length;
                if fed.received == 8 {
                    fed.received = 0;
                    let offset = u64::from_le_bytes(fed.acknowledgement);
                    // Only what was sent on this stream can have been written by the host.
                    if offset > fed.next || !self.ring.release(offset) {
                        self.stream = None;
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => self.stream = None,
        }
    }

    /// Tells the host of the end once it has been sent everything.
    async fn finish(&mut self) {
        let Some(fed) = &mut self.stream else { return };
        if self.source.is_none() && !fed.finished && fed.next >= self.ring.end() {
            fed.finished = true;
            if fed.stream.shutdown().await.is_err() {
                self.stream = None;
            }
        }
    }

    fn publish(&self) {
        let now = Progress {
            ended: self.source.is_none(),
            read: self.ring.end(),
            acknowledged: self.ring.start(),
        };
        self.progress.send_if_modified(|known| {
            let news = *known != now;
            *known = now;
            news
        });
    }
}

async fn readable(source: &Option<End>, left: Option<u64>, room: usize) {
    match (source, left) {
        (Some(_), Some(_)) if room > 0 => {}
        // A full ring: the pipe fills up, and then the process waits.
        (Some(source), None) if room > 0 => source.readable().await,
        _ => std::future::pending().await,
    }
}

async fn acknowledged(stream: &Option<Fed>) {
    match stream {
        Some(fed) => drop(fed.stream.readable().await),
        None => std::future::pending().await,
    }
}

async fn writable(stream: &Option<Fed>, end: u64) {
    match stream {
        Some(fed) if fed.next < end => drop(fed.stream.writable().await),
        _ => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    const CAPACITY: usize = 64 << 10;

    struct Bench {
        output: Output,
        process: std::fs::File,
    }

    impl Bench {
        fn new() -> Self {
            let (pipe, process) = rustix::pipe::pipe().unwrap();
            Self {
                output: Output::start(End::new(pipe).unwrap(), CAPACITY),
                process: process.into(),
            }
        }

        async fn host(&self, offset: u64) -> (Stream, u64) {
            let opening = self.output.opening();
            let start = opening.seek(offset).await.unwrap();
            let (host, guest) = Stream::pair().unwrap();
            opening.feed(guest, start).await.unwrap();
            (host, start)
        }

        async fn until(&self, reached: impl Fn(&Progress) -> bool) -> Progress {
            *self.output.progress().wait_for(reached).await.unwrap()
        }
    }

    fn write(bench: &mut Bench, bytes: &[u8]) {
        std::io::Write::write_all(&mut bench.process, bytes).unwrap();
    }

    #[tokio::test]
    async fn output_ends_with_a_shut_down_and_is_complete_when_acknowledged() {
        let mut bench = Bench::new();
        let (mut host, _) = bench.host(0).await;
        write(&mut bench, b"hello");
        bench.process = std::fs::File::open("/dev/null").unwrap();
        let mut seen = Vec::new();
        host.read_to_end(&mut seen).await.unwrap();
        assert_eq!(seen, b"hello");
        assert!(!bench.until(|progress| progress.ended).await.is_complete());
        host.write_all(&5_u64.to_le_bytes()).await.unwrap();
        bench.until(Progress::is_complete).await;
    }

    #[tokio::test]
    async fn a_new_stream_goes_on_where_the_host_says() {
        let mut bench = Bench::new();
        let (mut host, _) = bench.host(0).await;
        write(&mut bench, b"0123456789");
        let mut seen = [0; 10];
        host.read_exact(&mut seen).await.unwrap();
        drop(host);
        let (mut host, start) = bench.host(4).await;
        assert_eq!(start, 4);
        let mut seen = [0; 6];
        host.read_exact(&mut seen).await.unwrap();
        assert_eq!(&seen, b"456789");
        let beyond = bench.output.opening().seek(11).await;
        assert_eq!(
            beyond,
            Err(StreamError::Beyond {
                wanted: 11,
                end: 10
            })
        );
    }

    #[tokio::test]
    async fn a_host_that_does_not_acknowledge_stops_the_process_not_the_memory() {
        let bench = Bench::new();
        rustix::io::ioctl_fionbio(&bench.process, true).unwrap();
        let (mut host, _) = bench.host(0).await;
        let fill = async {
            loop {
                let _ = std::io::Write::write(&mut &bench.process, &[7; 4096]);
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            _ = bench.until(|progress| progress.read == CAPACITY as u64) => {}
            () = fill => {}
        }
        let mut seen = vec![0; CAPACITY];
        host.read_exact(&mut seen).await.unwrap();
        let now = *bench.output.progress().borrow();
        assert_eq!((now.read, now.acknowledged), (CAPACITY as u64, 0));
        // More waits in the pipe behind the full ring, be it that it was full before.
        let _ = std::io::Write::write(&mut &bench.process, &[7; 4096]);
        host.write_all(&1000_u64.to_le_bytes()).await.unwrap();
        let more = |progress: &Progress| progress.read == CAPACITY as u64 + 1000;
        bench.until(more).await;
    }

    #[tokio::test]
    async fn what_was_written_before_the_close_is_all_there_is() {
        let mut bench = Bench::new();
        rustix::io::ioctl_fionbio(&bench.process, true).unwrap();
        let all = vec![7; CAPACITY];
        write(&mut bench, &all);
        bench
            .until(|progress| progress.read == CAPACITY as u64)
            .await;
        write(&mut bench, b"behind a full ring");
        bench.output.closing().close().await;
        let (mut host, _) = bench.host(0).await;
        let mut seen = vec![0; CAPACITY];
        host.read_exact(&mut seen).await.unwrap();
        host.write_all(&(CAPACITY as u64).to_le_bytes())
            .await
            .unwrap();
        seen.clear();
        host.read_to_end(&mut seen).await.unwrap();
        assert_eq!(seen, b"behind a full ring");
        let later = std::io::Write::write(&mut bench.process, b"later");
        assert_eq!(later.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn an_acknowledgement_of_bytes_never_sent_ends_the_stream() {
        let mut bench = Bench::new();
        let (mut host, _) = bench.host(0).await;
        write(&mut bench, b"x");
        let mut seen = [0];
        host.read_exact(&mut seen).await.unwrap();
        host.write_all(&9_u64.to_le_bytes()).await.unwrap();
        assert_eq!(host.read(&mut seen).await.unwrap(), 0);
        assert_eq!(bench.output.progress().borrow().acknowledged, 0);
    }
}

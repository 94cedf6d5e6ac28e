//! One connection: the client's frames become streams, and what is written to streams frames.
//!
//! A client that keeps to the windows never keeps one stream waiting for another. The clients of
//! Kubernetes do not; when one of their streams is not taken, their connection is not read.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::io::{
    AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, DuplexStream,
    ReadHalf, WriteHalf,
};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, JoinSet};

use super::flow::Flow;
use super::frame::{self, Away, Control, HEAD, Head, Reset, Wrong};
use super::header::{Deflater, Headers, Inflater};
use crate::streaming::line::Line;
use crate::streaming::pipe::{self, Broken, Pipe};

/// The most bytes of a stream in one frame.
const CHUNK: usize = 16 << 10;
/// Frames that wait to be written.
const QUEUE: usize = 4;
/// What the client is given of a window once it has been taken: half of it.
const CREDIT: usize = pipe::CAPACITY / 2;

/// A stream that the client has opened.
pub struct Opened {
    /// Its number: odd, and larger than those before.
    pub id: u32,
    /// What it is for.
    pub headers: Headers,
    /// Its bytes, each way with its own end.
    pub pipe: Pipe,
    /// Completes when all that was written to `pipe` is on its way to the client.
    pub sent: oneshot::Receiver<()>,
}

enum Out {
    Frame(Bytes),
    Last(Bytes),
}

/// Speaks SPDY on `io` until `work` is done with the streams that come, and the client has closed.
pub async fn serve<T, W>(io: T, line: &Arc<Line>, work: impl FnOnce(mpsc::Receiver<Opened>) -> W)
where
    T: AsyncRead + AsyncWrite,
    W: Future<Output = ()>,
{
    let Ok(deflater) = Deflater::new() else {
        return tracing::error!("SPDY's dictionary cannot be used");
    };
    let (read, write) = tokio::io::split(io);
    let (frames, queue) = mpsc::channel(QUEUE);
    let (opened, streams) = mpsc::channel(QUEUE);
    let mut reading = Reading {
        io: BufReader::with_capacity(CHUNK, read),
        line: line.clone(),
        frames: frames.clone(),
        opened,
        flow: Arc::new(Flow::new()),
        inflater: Inflater::new(),
        deflater,
        streams: HashMap::new(),
        tasks: JoinSet::new(),
        last: 0,
        taken: 0,
    };
    let talk = async {
        let working = async {
            work(streams).await;
            // Without a writer the connection is at its end as well.
            let _ = frames.send(Out::Last(frame::go_away(0, Away::Ok))).await;
        };
        tokio::join!(working, writing(write, queue, line)).1
    };
    let read = async {
        let wrong = tokio::select! {
            biased;
            result = reading.run() => result.err(),
            () = line.ended() => None,
            () = line.lost() => None,
        };
        if let Some(wrong) = wrong {
            tracing::debug!("a SPDY client is sent away for {wrong}");
            let away = frame::go_away(reading.last, Away::Protocol);
            let _ = reading.frames.try_send(Out::Last(away));
        }
        line.lose();
        reading.lose();
        std::future::pending().await
    };
    let written = tokio::select! {
        written = talk => written,
        () = read => None,
    };
    if let Some(mut write) = written {
        // A socket that is closed with unread bytes in it takes back what was sent last.
        let farewell = async {
            let _ = write.shutdown().await;
            let _ = tokio::io::copy_buf(&mut reading.io, &mut tokio::io::sink()).await;
        };
        let _ = tokio::time::timeout(line.limits.farewell, farewell).await;
    }
}

/// Writes frames until the last one, or the client is lost.
async fn writing<W: AsyncWrite + Unpin>(
    mut io: W,
    mut queue: mpsc::Receiver<Out>,
    line: &Line,
) -> Option<W> {
    let write = async {
        while let Some(out) = queue.recv().await {
            let (Out::Frame(frame) | Out::Last(frame)) = &out;
            io.write_all(frame).await.ok()?;
            if queue.is_empty() {
                io.flush().await.ok()?;
            }
            if matches!(out, Out::Last(_)) {
                return Some(());
            }
        }
        None
    };
    let lost = async {
        line.lost().await;
        // Time for the frame that says why.
        tokio::time::sleep(line.limits.farewell).await;
    };
    let written = tokio::select! {
        written = write => written,
        () = lost => None,
    };
    if written.is_none() {
        line.lose();
    }
    written.map(|()| io)
}

struct Reading<T> {
    io: BufReader<ReadHalf<T>>,
    line: Arc<Line>,
    frames: mpsc::Sender<Out>,
    opened: mpsc::Sender<Opened>,
    flow: Arc<Flow>,
    inflater: Inflater,
    deflater: Deflater,
    streams: HashMap<u32, Stream>,
    tasks: JoinSet<()>,
    /// The last stream that was accepted.
    last: u32,
    /// What came of all streams since the client was given more of the window for all.
    taken: usize,
}

/// What is known of a stream while it lasts.
struct Stream {
    /// Takes what comes, until the client has ended it.
    feed: Option<DuplexStream>,
    broken: Broken,
    task: AbortHandle,
}

impl Stream {
    fn reset(self) {
        self.broken.set();
        self.task.abort();
    }
}

impl<T: AsyncRead + AsyncWrite> Reading<T> {
    /// Reads frames until the client has closed.
    async fn run(&mut self) -> Result<(), Wrong> {
        let mut payload = Vec::new();
        loop {
            let mut head = [0; HEAD];
            if self.io.read_exact(&mut head).await.is_err() {
                return Ok(());
            }
            let read = match Head::read(head)? {
                Head::Data { id, fin, length } => self.data(id, fin, length).await,
                Head::Control {
                    kind,
                    flags,
                    length,
                } => {
                    payload.resize(length, 0);
                    if self.io.read_exact(&mut payload).await.is_err() {
                        return Ok(());
                    }
                    self.control(Control::read(kind, flags, &payload)?).await?
                }
            };
            if read.is_none() {
                return Ok(());
            }
        }
    }

    /// `None` when the connection is at its end.
    async fn data(&mut self, id: u32, fin: bool, length: usize) -> Option<()> {
        let stream = self.streams.get_mut(&id);
        let known = stream.is_some();
        let mut feed = stream.and_then(|stream| stream.feed.take());
        let mut left = length;
        while left > 0 {
            let bytes = self.io.fill_buf().await.ok()?;
            let bytes = bytes.get(..left.min(bytes.len())).unwrap_or_default();
            if bytes.is_empty() {
                return None;
            }
            if let Some(feed) = &mut feed {
                self.line.touch();
                // The stream's task takes all, whether anybody wants it or not.
                let _ = feed.write_all(bytes).await;
            }
            let read = bytes.len();
            self.io.consume(read);
            left -= read;
        }
        if !fin && let Some(stream) = self.streams.get_mut(&id) {
            stream.feed = feed;
        }
        self.taken += length;
        if self.taken >= CREDIT {
            // No frame is longer than 16 MiB.
            let taken = std::mem::take(&mut self.taken) as u32;
            self.send(frame::window_update(0, taken)).await?;
        }
        // What is on its way when a stream is reset comes after it.
        if !known && (id > self.last || id.is_multiple_of(2)) {
            self.send(frame::reset(id, Reset::Invalid)).await?;
        }
        Some(())
    }

    async fn control(&mut self, control: Control<'_>) -> Result<Option<()>, Wrong> {
        let window = |_| Wrong("a window larger than there can be");
        Ok(match control {
            Control::SynStream { id, fin, block } => {
                let headers = self.inflater.read(block)?;
                if id <= self.last || id.is_multiple_of(2) {
                    return Err(Wrong("a stream whose number is not odd and larger"));
                }
                self.last = id;
                self.open(id, fin, headers).await?
            }
            Control::Headers { id, fin, block } => {
                self.inflater.read(block)?;
                if fin && let Some(stream) = self.streams.get_mut(&id) {
                    stream.feed = None;
                }
                Some(())
            }
            Control::Reset { id } => {
                self.end(id);
                Some(())
            }
            Control::Settings { window: size } => {
                self.flow.settings(size).map_err(window)?;
                Some(())
            }
            // "If a server receives an even numbered PING which it did not initiate, it must
            // ignore the PING" (2.6.5).
            Control::Ping(number) if number % 2 == 1 => self.send(frame::ping(number)).await,
            Control::WindowUpdate { id: 0, delta } => {
                self.flow.update(0, delta).map_err(window)?;
                Some(())
            }
            Control::WindowUpdate { id, delta } => match self.flow.update(id, delta) {
                Ok(()) => Some(()),
                Err(why) => {
                    self.end(id);
                    self.send(frame::reset(id, why)).await
                }
            },
            // The client opens no more streams; those there are go on.
            Control::GoAway | Control::Ping(_) | Control::Unknown => Some(()),
        })
    }

    async fn open(&mut self, id: u32, fin: bool, headers: Headers) -> Result<Option<()>, Wrong> {
        self.streams.retain(|_, stream| !stream.task.is_finished());
        while self.tasks.try_join_next().is_some() {}
        let refused = frame::reset(id, Reset::Refused);
        if self.streams.len() >= self.line.limits.streams || self.opened.is_closed() {
            return Ok(self.send(refused).await);
        }
        let block = self.deflater.write(&[])?;
        let Some(()) = self.send(frame::reply(id, &block)).await else {
            return Ok(None);
        };
        let (pipe, io, broken) = pipe::pipe();
        // As much as the window, so that a client that keeps to it is always read.
        let (feed, source) = tokio::io::duplex(pipe::CAPACITY);
        let (told, sent) = oneshot::channel();
        self.flow.open(id);
        let carrier = Carrier {
            id,
            frames: self.frames.clone(),
            flow: self.flow.clone(),
            line: self.line.clone(),
        };
        let task = self.tasks.spawn(carrier.carry(source, io, told));
        let stream = Stream {
            feed: (!fin).then_some(feed),
            broken,
            task,
        };
        self.streams.insert(id, stream);
        let opened = Opened {
            id,
            headers,
            pipe,
            sent,
        };
        Ok(match self.opened.send(opened).await {
            Ok(()) => Some(()),
            Err(_) => {
                self.end(id);
                self.send(refused).await
            }
        })
    }

    fn end(&mut self, id: u32) {
        self.flow.close(id);
        if let Some(stream) = self.streams.remove(&id) {
            stream.reset();
        }
    }

    /// All streams are broken off.
    fn lose(&mut self) {
        self.streams.drain().for_each(|(_, stream)| stream.reset());
    }

    async fn send(&mut self, frame: Bytes) -> Option<()> {
        self.frames.send(Out::Frame(frame)).await.ok()
    }
}

/// What carries a stream's bytes.
struct Carrier {
    id: u32,
    frames: mpsc::Sender<Out>,
    flow: Arc<Flow>,
    line: Arc<Line>,
}

impl Carrier {
    async fn carry(self, source: DuplexStream, io: DuplexStream, sent: oneshot::Sender<()>) {
        let (read, write) = tokio::io::split(io);
        let outwards = async {
            self.outwards(read).await;
            drop(sent);
        };
        tokio::join!(self.inwards(source, write), outwards);
        self.flow.close(self.id);
    }

    /// Gives what has come to who reads it, and tells the client how much was taken.
    async fn inwards(&self, mut source: DuplexStream, mut io: WriteHalf<DuplexStream>) {
        let mut taken = 0;
        let mut bytes = BytesMut::with_capacity(CHUNK);
        while let Ok(read @ 1..) = source.read_buf(&mut bytes).await {
            // Where nobody reads any more, what comes is taken all the same.
            let _ = io.write_all(&bytes).await;
            bytes.clear();
            taken += read;
            if taken >= CREDIT {
                // Less than two windows.
                let credit = frame::window_update(self.id, std::mem::take(&mut taken) as u32);
                if self.frames.send(Out::Frame(credit)).await.is_err() {
                    return;
                }
            }
        }
        let _ = io.shutdown().await;
    }

    /// Sends what is written, then the end.
    async fn outwards(&self, mut io: ReadHalf<DuplexStream>) {
        let mut bytes = BytesMut::new();
        loop {
            bytes.reserve(CHUNK);
            let read = io.read_buf(&mut bytes).await.unwrap_or(0);
            if read == 0 {
                let end = Bytes::copy_from_slice(&frame::data(self.id, true, 0));
                let _ = self.frames.send(Out::Frame(end)).await;
                return;
            }
            while !bytes.is_empty() {
                let most = bytes.len().min(CHUNK);
                let Some(taken) = self.flow.take(self.id, most).await else {
                    return;
                };
                let mut frame = BytesMut::with_capacity(HEAD + taken);
                frame.extend_from_slice(&frame::data(self.id, false, taken));
                frame.extend_from_slice(&bytes.split_to(taken));
                self.line.touch();
                if self.frames.send(Out::Frame(frame.freeze())).await.is_err() {
                    return;
                }
            }
        }
    }
}

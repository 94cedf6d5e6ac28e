//! WebSocket (RFC 6455) as Kubernetes uses it: the first byte of a message is the channel it
//! belongs to.

use std::future::pending;
use std::sync::{Arc, OnceLock};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{Bytes, BytesMut};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, WriteHalf};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message};

use super::command::{self, Sizes, Version};
use super::forward;
use super::line::Line;
use super::pipe::{self, Broken};
use super::session::{Forward, Session, Size, Wanted};

/// The largest message a client may send. Clients cut what they send into far smaller ones.
pub const MESSAGE: usize = 1 << 20;
/// The most bytes of a stream in one message.
const CHUNK: usize = 16 << 10;
/// Messages that wait to be written.
const QUEUE: usize = 4;

/// Channels of exec and attach.
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
/// Not a channel: its message names one that the client ends. Since version 5.
const CLOSE: u8 = 255;

/// How messages are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Codec {
    /// A digit for the channel and base64 for the bytes, as text.
    pub base64: bool,
    /// The version of the remote-command protocol.
    pub version: Version,
}

impl Codec {
    fn write(self, channel: u8, bytes: &[u8]) -> Message {
        if self.base64 {
            let digit = char::from(b'0'.saturating_add(channel));
            return Message::text(format!("{digit}{}", STANDARD.encode(bytes)));
        }
        let mut message = BytesMut::with_capacity(1 + bytes.len());
        message.extend_from_slice(&[channel]);
        message.extend_from_slice(bytes);
        Message::binary(message.freeze())
    }

    /// The channel and what is for it. Clients send text as well where bytes are meant.
    fn read(self, message: Bytes) -> Result<Option<(u8, Bytes)>, Wrong> {
        let Some(&first) = message.first() else {
            return Ok(None);
        };
        if !self.base64 {
            return Ok(Some((first, message.slice(1..))));
        }
        let bytes = STANDARD.decode(message.slice(1..));
        let bytes = bytes.map_err(|_| Wrong(CloseCode::Invalid, "this is no base64"))?;
        Ok(Some((first.wrapping_sub(b'0'), bytes.into())))
    }
}

/// Why a client is sent away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Wrong(CloseCode, &'static str);

/// What a channel's messages are for.
enum Input {
    Nothing,
    Feed(WriteHalf<DuplexStream>, Broken),
    Sizes(Sizes, watch::Sender<Option<Size>>),
}

impl Input {
    fn feed(io: DuplexStream, broken: Broken) -> Self {
        Self::Feed(tokio::io::split(io).1, broken)
    }
}

/// Does an exec or attach over `io`, which has been upgraded.
pub async fn command<T: AsyncRead + AsyncWrite + Unpin>(
    io: T,
    line: &Arc<Line>,
    codec: Codec,
    wanted: Wanted,
    work: command::Work,
) {
    let mut inputs: Vec<Input> = (0..=RESIZE).map(|_| Input::Nothing).collect();
    let mut put = |channel: u8, input| {
        if let Some(place) = inputs.get_mut(usize::from(channel)) {
            *place = input;
        }
    };
    let stdin = wanted.stdin.then(|| {
        let (pipe, io, broken) = pipe::pipe();
        put(STDIN, Input::feed(io, broken));
        Box::new(pipe) as _
    });
    let (told, newest) = watch::channel(None);
    if wanted.tty {
        put(RESIZE, Input::Sizes(Sizes::default(), told));
    }
    let output = |wanted: bool| {
        let one = wanted.then(|| {
            let (pipe, io, _) = pipe::pipe();
            (Box::new(pipe) as _, io)
        });
        one.unzip()
    };
    let (stdout, out) = output(wanted.stdout);
    let (stderr, err) = output(wanted.stderr);
    let (sizes, receiver) = mpsc::channel(1);
    let session = Session {
        stdin,
        stdout,
        stderr,
        sizes: receiver,
        gone: line.gone(),
    };
    talk(io, line, codec, inputs, async |messages| {
        // Clients wait for an empty message to know that they are connected.
        let first = match (wanted.stdout, wanted.stderr) {
            (true, _) => STDOUT,
            (false, true) => STDERR,
            (false, false) => ERROR,
        };
        let _ = messages.send(codec.write(first, b"")).await;
        let all = async {
            tokio::join!(
                line.graced(work(session)),
                send(out, STDOUT, codec, line, &messages),
                send(err, STDERR, codec, line, &messages)
            )
            .0
        };
        let beside = async {
            command::pass_on(newest, sizes).await;
            pending().await
        };
        let outcome = tokio::select! {
            outcome = all => outcome,
            () = beside => None,
        };
        if let Some(outcome) = outcome {
            let status = codec.version.status(&outcome);
            let _ = messages.send(codec.write(ERROR, &status)).await;
        }
    })
    .await;
}

/// Forwards `ports` over `io`, which has been upgraded: two channels for each, one for its bytes
/// and one for an error, and the first message of each is the port.
pub async fn forward<T: AsyncRead + AsyncWrite + Unpin>(
    io: T,
    line: &Arc<Line>,
    codec: Codec,
    ports: &[u16],
    work: forward::Work,
) {
    let (mut inputs, mut forwards, mut outputs) = (Vec::new(), Vec::new(), Vec::new());
    // Two channels each, and channels are bytes.
    for (channel, port) in (0..=u8::MAX).step_by(2).zip(ports) {
        let (pipe, io, broken) = pipe::pipe();
        let (read, write) = tokio::io::split(io);
        let (told, error) = oneshot::channel();
        inputs.extend([Input::Feed(write, broken), Input::Nothing]);
        outputs.push((channel, *port, read, error));
        forwards.push(Forward {
            port: *port,
            data: Box::new(pipe),
            error: told,
        });
    }
    let (sender, receiver) = mpsc::channel(1);
    talk(io, line, codec, inputs, async |messages| {
        let begin = async {
            for forward in forwards {
                if sender.send(forward).await.is_err() {
                    return;
                }
            }
        };
        let carry = outputs
            .into_iter()
            .map(async |(channel, port, read, error)| {
                for channel in [channel, channel + 1] {
                    let first = codec.write(channel, &port.to_le_bytes());
                    let _ = messages.send(first).await;
                }
                send(Some(read), channel, codec, line, &messages).await;
                if let Ok(error) = error.await {
                    let error = codec.write(channel + 1, error.as_bytes());
                    let _ = messages.send(error).await;
                }
            });
        let all = async { tokio::join!(begin, futures_util::future::join_all(carry)) };
        tokio::select! {
            () = line.lost() => {}
            _ = async { tokio::join!(work(receiver), all) } => {}
        }
    })
    .await;
}

/// Sends what can be read from `source` until it ends.
async fn send<R: AsyncRead + Unpin>(
    source: Option<R>,
    channel: u8,
    codec: Codec,
    line: &Line,
    messages: &mpsc::Sender<Message>,
) {
    let Some(mut source) = source else { return };
    let mut bytes = BytesMut::with_capacity(CHUNK);
    while let Ok(1..) = source.read_buf(&mut bytes).await {
        line.touch();
        if messages.send(codec.write(channel, &bytes)).await.is_err() {
            return;
        }
        bytes.clear();
    }
}

/// Speaks WebSocket until `work` is done and the client has closed.
async fn talk<T: AsyncRead + AsyncWrite + Unpin>(
    io: T,
    line: &Line,
    codec: Codec,
    mut inputs: Vec<Input>,
    work: impl AsyncFnOnce(mpsc::Sender<Message>),
) {
    let config = WebSocketConfig::default()
        .read_buffer_size(CHUNK)
        .write_buffer_size(0)
        .max_message_size(Some(MESSAGE))
        .max_frame_size(Some(MESSAGE));
    let socket = WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await;
    let (sink, mut stream) = socket.split();
    let (messages, queue) = mpsc::channel(QUEUE);
    let away = OnceLock::new();
    let talk = async { tokio::join!(work(messages), writing(sink, queue, line, &away)) };
    let read = async {
        let wrong = tokio::select! {
            biased;
            result = reading(&mut stream, codec, &mut inputs, line) => result.err(),
            () = line.ended() => None,
            () = line.lost() => None,
        };
        if let Some(Wrong(code, reason)) = wrong {
            tracing::debug!("a WebSocket client is sent away: {reason}");
            // Nobody else sets it.
            let _ = away.set(CloseFrame {
                code,
                reason: reason.into(),
            });
        }
        line.lose();
        for input in &mut inputs {
            if let Input::Feed(feed, broken) = input {
                broken.set();
                let _ = feed.shutdown().await;
            }
        }
        pending::<()>().await;
    };
    tokio::select! {
        _ = talk => {}
        () = read => {}
    }
    // The client answers a close with its own, then the connection is closed.
    let farewell = async { while let Some(Ok(_)) = stream.next().await {} };
    let _ = timeout(line.limits.farewell, farewell).await;
}

/// Writes messages until there will be no more, then closes.
async fn writing<T: AsyncRead + AsyncWrite + Unpin>(
    mut sink: SplitSink<WebSocketStream<T>, Message>,
    mut queue: mpsc::Receiver<Message>,
    line: &Line,
    away: &OnceLock<CloseFrame>,
) {
    let write = async {
        while let Some(message) = queue.recv().await {
            if sink.send(message).await.is_err() {
                line.lose();
                return;
            }
        }
    };
    let code = tokio::select! {
        () = write => CloseCode::Normal,
        () = line.lost() => CloseCode::Away,
    };
    // What was done for a client that is sent away may be over before this is.
    let close = away.get().cloned().unwrap_or(CloseFrame {
        code,
        reason: "".into(),
    });
    let close = sink.send(Message::Close(Some(close)));
    let _ = timeout(line.limits.farewell, close).await;
}

/// Reads messages until the client closes.
async fn reading<T: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut SplitStream<WebSocketStream<T>>,
    codec: Codec,
    inputs: &mut [Input],
    line: &Line,
) -> Result<(), Wrong> {
    while let Some(message) = stream.next().await {
        let message = match message {
            Ok(Message::Binary(bytes)) => bytes,
            Ok(Message::Text(text)) => text.into(),
            Ok(Message::Close(_)) => return Ok(()),
            Ok(_) => continue,
            Err(error) => return wrong(&error),
        };
        let Some((channel, bytes)) = codec.read(message)? else {
            continue;
        };
        line.touch();
        if channel == CLOSE && codec.version >= Version::V5 {
            let channel = bytes.first().map(|channel| usize::from(*channel));
            if let Some(place) = channel.and_then(|channel| inputs.get_mut(channel))
                && let Input::Feed(feed, _) = place
            {
                let _ = feed.shutdown().await;
                *place = Input::Nothing;
            }
            continue;
        }
        match inputs.get_mut(usize::from(channel)) {
            // Where nobody reads any more, what comes is dropped.
            Some(Input::Feed(feed, _)) => drop(feed.write_all(&bytes).await),
            Some(Input::Sizes(sizes, told)) => {
                if let Some(size) = sizes.read(&bytes) {
                    told.send_replace(Some(size));
                }
            }
            Some(Input::Nothing) | None => {}
        }
    }
    Ok(())
}

fn wrong(error: &Error) -> Result<(), Wrong> {
    match error {
        Error::Capacity(_) => Err(Wrong(
            CloseCode::Size,
            "a message may have 1 MiB; send more in several",
        )),
        Error::Utf8(_) => Err(Wrong(CloseCode::Invalid, "this text is no UTF-8")),
        Error::Protocol(_) => Err(Wrong(CloseCode::Protocol, "this is no WebSocket frame")),
        _ => Ok(()),
    }
}

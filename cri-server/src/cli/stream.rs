//! The client of a streaming server: exec and attach over WebSocket, by the subprotocol
//! `v5.channel.k8s.io`. A message's first byte says which stream the rest belongs to.

use std::io::{ErrorKind, IsTerminal, Read, Write};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use serde::Deserialize;
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::http::header::SEC_WEBSOCKET_PROTOCOL;

use super::failure::Failure;

const PROTOCOL: HeaderValue = HeaderValue::from_static("v5.channel.k8s.io");
/// The streams of the protocol.
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;
/// The stream named by the second byte has ended.
const END: u8 = 255;
/// Bytes of input in a message.
const INPUT: usize = 16 << 10;

/// What of this process's streams goes to the other end.
#[derive(Debug, Clone, Copy)]
pub struct Wants {
    /// Standard input.
    pub stdin: bool,
    /// The terminal at standard input, with its size.
    pub terminal: bool,
}

/// How the other end says that it is done (`metav1.Status`).
#[derive(Deserialize)]
struct Status {
    status: String,
    #[serde(default)]
    message: String,
    #[serde(default)]
    details: Details,
}

#[derive(Default, Deserialize)]
struct Details {
    #[serde(default)]
    causes: Vec<Cause>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Cause {
    reason: String,
    message: String,
}

impl Status {
    fn code(self) -> Result<u8, Failure> {
        if self.status == "Success" {
            return Ok(0);
        }
        let mut causes = self.details.causes.iter();
        let code = causes.find(|cause| cause.reason == "ExitCode");
        let code = code.and_then(|cause| cause.message.parse().ok());
        code.ok_or_else(|| Failure::own(self.message))
    }
}

/// Joins this process's streams with those at `url`; the exit status of what runs there.
pub async fn join(url: &str, wants: Wants) -> Result<u8, Failure> {
    // Before anything is begun: it may not be one.
    let raw = match wants.terminal {
        true => Some(RawTerminal::begin()?),
        false => None,
    };
    let mut socket = connect(url).await?;
    let (typed, mut input) = mpsc::channel(1);
    if wants.stdin {
        // A read cannot be taken back; the thread ends with the process.
        std::thread::spawn(move || read_input(&typed));
    }
    let mut sizes = signal(SignalKind::window_change()).map_err(Failure::own)?;
    if raw.is_some() {
        send(&mut socket, size()).await?;
    }
    loop {
        tokio::select! {
            message = socket.next() => match message {
                Some(Ok(Message::Binary(bytes))) => {
                    let mut bytes = bytes;
                    let stream = (!bytes.is_empty()).then(|| bytes.split_to(1)[0]);
                    match stream {
                        Some(STDOUT) => show(&mut std::io::stdout().lock(), &bytes)?,
                        Some(STDERR) => show(&mut std::io::stderr().lock(), &bytes)?,
                        // Each stream begins with a message that holds nothing.
                        Some(STATUS) if !bytes.is_empty() => {
                            let status: Status = serde_json::from_slice(&bytes)
                                .map_err(|_| Failure::own("the server's last word is no status"))?;
                            drop(raw);
                            return status.code();
                        }
                        _ => {}
                    }
                }
                Some(Ok(Message::Close(_))) | None => {
                    return Err(Failure::own("the server ended the connection"));
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(lost(error)),
            },
            Some(message) = input.recv() => send(&mut socket, message).await?,
            Some(()) = sizes.recv(), if raw.is_some() => send(&mut socket, size()).await?,
        }
    }
}

async fn connect(url: &str) -> Result<WebSocketStream<TcpStream>, Failure> {
    let address = url
        .strip_prefix("http://")
        .and_then(|rest| rest.split('/').next());
    let address = address.ok_or_else(|| {
        Failure::own("the server's streams are behind TLS, which this command does not speak")
    })?;
    let failed = |error: &dyn std::fmt::Display| {
        Failure::own(format!(
            "cannot connect to the server's streams at {address}: {error}"
        ))
    };
    let stream = TcpStream::connect(address)
        .await
        .map_err(|error| failed(&error))?;
    let request = url.replacen("http", "ws", 1).into_client_request();
    let mut request = request.map_err(|error| failed(&error))?;
    request
        .headers_mut()
        .insert(SEC_WEBSOCKET_PROTOCOL, PROTOCOL);
    let joined = tokio_tungstenite::client_async(request, stream).await;
    Ok(joined.map_err(|error| failed(&error))?.0)
}

async fn send(socket: &mut WebSocketStream<TcpStream>, message: Vec<u8>) -> Result<(), Failure> {
    socket
        .send(Message::Binary(Bytes::from(message)))
        .await
        .map_err(lost)
}

fn lost(error: impl std::fmt::Display) -> Failure {
    Failure::own(format!(
        "the connection to the server's streams is lost: {error}"
    ))
}

/// A reader that has gone away has seen enough.
fn show(target: &mut impl Write, bytes: &[u8]) -> Result<(), Failure> {
    match target.write_all(bytes).and_then(|()| target.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        shown => shown.map_err(Failure::own),
    }
}

fn read_input(typed: &mpsc::Sender<Vec<u8>>) {
    let mut buffer = vec![0; INPUT];
    loop {
        let message = match std::io::stdin().lock().read(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Ok(0) | Err(_) => {
                let _ = typed.blocking_send(vec![END, STDIN]);
                return;
            }
            Ok(count) => {
                let bytes = buffer.get(..count).unwrap_or_default();
                [&[STDIN], bytes].concat()
            }
        };
        if typed.blocking_send(message).is_err() {
            return;
        }
    }
}

fn size() -> Vec<u8> {
    let size = tcgetwinsize(std::io::stdin()).ok();
    let (columns, rows) = size.map_or((80, 24), |size| (size.ws_col, size.ws_row));
    let mut message = vec![RESIZE];
    message.extend(format!("{{\"Width\":{columns},\"Height\":{rows}}}").bytes());
    message
}

/// The terminal at standard input, whose every key goes to the other end; as it was when this is
/// dropped.
struct RawTerminal(Termios);

impl RawTerminal {
    fn begin() -> Result<Self, Failure> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            let words = "standard input is no terminal: leave --tty (-t) out";
            return Err(Failure::own(words));
        }
        let before = tcgetattr(&stdin).map_err(Failure::own)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw).map_err(Failure::own)?;
        Ok(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(status: &str) -> Result<u8, Failure> {
        serde_json::from_str::<Status>(status).unwrap().code()
    }

    #[test]
    fn the_last_word_is_the_exit_status() {
        assert_eq!(code(r#"{"metadata":{},"status":"Success"}"#), Ok(0));
        let failed = r#"{"status":"Failure","message":"command terminated with exit code 3",
            "reason":"NonZeroExitCode",
            "details":{"causes":[{"reason":"ExitCode","message":"3"}]},"code":500}"#;
        assert_eq!(code(failed), Ok(3));
        let broken = r#"{"status":"Failure","message":"it is gone","reason":"InternalError",
            "details":{"causes":[{"message":"it is gone"}]}}"#;
        assert_eq!(code(broken), Err(Failure::own("it is gone")));
    }
}

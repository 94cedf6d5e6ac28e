//! What a client's connection brings, whatever protocol it speaks.

use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot};

/// A future that can be kept and moved.
pub type Boxed<T> = Pin<Box<dyn Future<Output = T> + Send>>;
/// Bytes from the client.
pub type Reader = Box<dyn AsyncRead + Send + Unpin>;
/// Bytes for the client. A write waits while the client does not take what was written before.
/// The stream has ended for the client when this has been dropped or shut down.
pub type Writer = Box<dyn AsyncWrite + Send + Unpin>;
/// Bytes both ways, each way with its own end.
pub type Duplex = Box<dyn Stream>;

/// What can be read and written.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// The size of a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Characters in a line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
}

/// Which streams an exec or attach was asked for with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wanted {
    /// The client sends input.
    pub stdin: bool,
    /// The client takes the output.
    pub stdout: bool,
    /// The client takes the errors apart from the output; never with `tty`.
    pub stderr: bool,
    /// There is a terminal, and it has a size.
    pub tty: bool,
}

/// A client's exec or attach.
pub struct Session {
    /// Ends when the client has half-closed it; an error when the client is lost.
    pub stdin: Option<Reader>,
    /// What a process writes to its standard output, or its terminal.
    pub stdout: Option<Writer>,
    /// What a process writes to its standard error.
    pub stderr: Option<Writer>,
    /// Sizes of the client's terminal. Of several that were not taken only the newest is kept.
    pub sizes: mpsc::Receiver<Size>,
    /// Tells that nobody waits for an outcome any more.
    pub gone: Gone,
}

/// Completes when the client's connection is lost, closed, or idle for too long. What then is
/// not done within a minute is dropped.
pub struct Gone(Boxed<()>);

impl Gone {
    /// Completes with `lost`.
    pub fn new(lost: Boxed<()>) -> Self {
        Self(lost)
    }
}

impl Future for Gone {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        self.0.as_mut().poll(context)
    }
}

/// How an exec or attach has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The process has ended with this code; 0 is success.
    Exit(i32),
    /// Nothing ran, or nobody knows how it ended: a sentence for the client.
    Failed(String),
}

/// A connection that a client wants to a port of the pod.
pub struct Forward {
    /// The port, 1 to 65,535.
    pub port: u16,
    /// What goes to and fro, each way with its own end. Reading fails when the client has reset it.
    pub data: Duplex,
    /// Takes a sentence for the client when the port cannot be reached; dropped when all is well.
    pub error: oneshot::Sender<String>,
}

/// What a token stands for.
pub enum Task {
    /// An exec or attach. Output must have been written before the outcome is given.
    Streams(Wanted, Box<dyn FnOnce(Session) -> Boxed<Outcome> + Send>),
    /// A port-forward to these ports, which only clients that speak WebSocket do not name again:
    /// connections come as long as the client's connection lasts, then the future is dropped.
    Forward(
        Vec<u16>,
        Box<dyn FnOnce(mpsc::Receiver<Forward>) -> Boxed<()> + Send>,
    ),
}

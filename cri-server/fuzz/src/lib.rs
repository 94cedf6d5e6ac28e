//! What the fuzz targets share: the server's code below HTTP, as it is, and a client that sends
//! what it is told to and takes what comes.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;

use streaming::line::{Limits, Line};
use streaming::session::{Boxed, Forward, Outcome, Session, Wanted};

/// The server's modules, by their own files.
#[allow(dead_code, missing_docs)]
#[path = "../../src/streaming"]
pub mod streaming {
    pub mod command;
    pub mod forward;
    pub mod line;
    pub mod pipe;
    pub mod session;
    pub mod spdy;
    pub mod websocket;
}

/// Bytes that are under way at once: fewer than frames have, so that they are cut.
const UNDER_WAY: usize = 1 << 10;

/// Lets `serve` talk to a client that sends `input`, then half-closes or, with `stays`, goes on
/// listening; what the server sent. It ends, or the fuzzer's own time limit tells: time passes at
/// once where nothing else happens.
pub fn talk<F: Future<Output = ()>>(
    input: &[u8],
    stays: bool,
    serve: impl FnOnce(DuplexStream, Arc<Line>) -> F,
) -> Vec<u8> {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    let runtime = RUNTIME.get_or_init(|| {
        let mut builder = Builder::new_current_thread();
        builder
            .enable_all()
            .start_paused(true)
            .build()
            .expect("a runtime")
    });
    runtime.block_on(async {
        // The socket that is watched for its end never ends here.
        let (watched, _other) = UnixStream::pair().expect("sockets");
        watched.set_nonblocking(true).expect("a socket");
        let limits = Limits {
            streams: 8,
            ..Limits::default()
        };
        let line = Line::new(OwnedFd::from(watched), limits).expect("a line");
        let (server, client) = tokio::io::duplex(UNDER_WAY);
        let (mut read, mut write) = tokio::io::split(client);
        let mut sent = Vec::new();
        let sending = async {
            // The server may have sent the client away by now.
            let _ = write.write_all(input).await;
            if !stays {
                let _ = write.shutdown().await;
            }
        };
        let taking = async {
            let _ = read.read_to_end(&mut sent).await;
        };
        tokio::join!(serve(server, Arc::new(line)), sending, taking);
        sent
    })
}

/// As `cat`, until its client is lost.
pub fn cat(session: Session) -> Boxed<Outcome> {
    Box::pin(async move {
        let Session {
            stdin,
            stdout,
            mut sizes,
            gone,
            ..
        } = session;
        let copy = async {
            match (stdin, stdout) {
                (Some(mut stdin), Some(mut stdout)) => copy(&mut stdin, &mut stdout).await,
                _ => Outcome::Exit(2),
            }
        };
        let sized = async { while sizes.recv().await.is_some() {} };
        tokio::select! {
            outcome = async { tokio::join!(copy, sized).0 } => outcome,
            () = gone => Outcome::Failed("gone".into()),
        }
    })
}

async fn copy<R: AsyncRead + Unpin>(
    from: &mut R,
    to: &mut (impl tokio::io::AsyncWrite + Unpin),
) -> Outcome {
    match tokio::io::copy(from, to).await {
        Ok(_) => Outcome::Exit(0),
        Err(error) => Outcome::Failed(error.to_string()),
    }
}

/// An echo at each port but 1, which cannot be reached.
pub fn echoes(mut forwards: mpsc::Receiver<Forward>) -> Boxed<()> {
    Box::pin(async move {
        let mut all = tokio::task::JoinSet::new();
        while let Some(forward) = forwards.recv().await {
            if forward.port == 1 {
                let _ = forward.error.send("refused".into());
                continue;
            }
            all.spawn(async move {
                let (mut read, mut write) = tokio::io::split(forward.data);
                let _ = copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
            });
        }
        while all.join_next().await.is_some() {}
    })
}

/// What an exec is asked for with, by the bits of a byte.
pub fn wanted(bits: u8) -> Wanted {
    let tty = bits & 8 != 0;
    Wanted {
        stdin: bits & 1 != 0,
        stdout: bits & 2 != 0,
        stderr: bits & 4 != 0 && !tty,
        tty,
    }
}

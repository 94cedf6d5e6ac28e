//! Clients that watch a running container's output and type into it (CRI `Attach`).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bulkhead_agent_api::v1::{ResizeRequest, Stdio};
use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use super::log::{Log, Stream, WhenFull};
use crate::deadline::Deadline;
use crate::guest::Guest;
use crate::streaming::{Outcome, Reader, Session, Size, Writer};

/// Pieces of output that wait for a client; then the container waits, too.
const PIECES: usize = 4;
/// How long a client may take nothing at all. Others wait for the container's end and its log.
const PATIENCE: Duration = Duration::from_secs(10);
/// Most bytes of a client's input on their way.
const INPUT: usize = 16 << 10;
/// How long the guest may take for a stream or a terminal's size.
const GUEST: Duration = Duration::from_secs(10);

/// Output, as it comes.
type Piece = (Stream, Bytes);

/// Those who watch a container's output.
#[derive(Debug, Clone, Default)]
pub struct Audience(Arc<Mutex<Vec<mpsc::Sender<Piece>>>>);

impl Audience {
    /// Output from now on.
    fn join(&self) -> mpsc::Receiver<Piece> {
        let (sender, receiver) = mpsc::channel(PIECES);
        self.with(|all| all.push(sender));
        receiver
    }

    /// Tells all what the container has written. Waits for those who read slowly, and does without
    /// those who do not read.
    pub async fn tell(&self, stream: Stream, bytes: &[u8]) {
        let present = self.with(|all| all.clone());
        if present.is_empty() {
            return;
        }
        let bytes = Bytes::copy_from_slice(bytes);
        for sender in present {
            let piece = (stream, bytes.clone());
            if sender.send_timeout(piece, PATIENCE).await.is_err() {
                self.with(|all| all.retain(|other| !other.same_channel(&sender)));
            }
        }
    }

    fn with<T>(&self, work: impl FnOnce(&mut Vec<mpsc::Sender<Piece>>) -> T) -> T {
        // Held for the time of a look only.
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What clients type into a container.
#[derive(Debug)]
enum Typed {
    Bytes(Bytes),
    End,
}

/// A running container's input and output on the host.
#[derive(Debug, Clone)]
pub struct Outlet {
    /// Where the output is kept.
    pub log: Log,
    /// Who else gets it.
    pub audience: Audience,
    /// What becomes of output that the log does not take.
    pub when_full: WhenFull,
    /// Whether the last lines were lost.
    pub losing: Arc<AtomicBool>,
    lost: Arc<AtomicU64>,
    /// None of a container made without.
    input: Option<mpsc::Sender<Typed>>,
}

impl Outlet {
    /// That of a container with this log and without input.
    pub fn new(log: Log, when_full: WhenFull) -> Self {
        Self {
            log,
            audience: Audience::default(),
            when_full,
            losing: Arc::default(),
            lost: Arc::default(),
            input: None,
        }
    }

    /// Gives it an input.
    pub fn with_input(self, guest: &Arc<Guest>, id: &str) -> Self {
        let (sender, typed) = mpsc::channel(1);
        tokio::spawn(type_in(Arc::clone(guest), id.to_owned(), typed));
        Self {
            input: Some(sender),
            ..self
        }
    }

    /// So many bytes of output are not in the log and will not be.
    pub fn lose(&self, bytes: u64) {
        self.lost.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes lost so far.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// To watch it and type into it from now on.
    pub fn attach(&self) -> Attachment {
        Attachment {
            output: self.audience.join(),
            input: self.input.clone(),
        }
    }
}

/// One client's part of a container.
#[derive(Debug)]
pub struct Attachment {
    /// Ends with the container, or when nobody read for too long.
    output: mpsc::Receiver<Piece>,
    input: Option<mpsc::Sender<Typed>>,
}

/// What of a container matters to its clients.
#[derive(Debug, Clone)]
pub struct Terms {
    /// The container.
    pub id: String,
    /// Its input ends with that of the first client (CRI `ContainerConfig.stdin_once`).
    pub stdin_once: bool,
    /// It has a terminal, whose input nobody can end.
    pub terminal: bool,
}

/// Serves a client until the container or the client ends.
pub async fn attend(
    attachment: Attachment,
    guest: Arc<Guest>,
    terms: Terms,
    session: Session,
) -> Outcome {
    let Attachment { mut output, input } = attachment;
    let Session {
        stdin,
        mut stdout,
        mut stderr,
        sizes,
        gone,
    } = session;
    let only_input = stdout.is_none() && stderr.is_none();
    let shown = async {
        while let Some((stream, bytes)) = output.recv().await {
            let target = match stream {
                Stream::Stdout => &mut stdout,
                Stream::Stderr => &mut stderr,
            };
            write(target, &bytes).await;
        }
    };
    let ends = terms.stdin_once && !terms.terminal;
    let typed = async {
        if let Some(stdin) = stdin {
            take(stdin, input, ends).await;
        }
        if !only_input {
            std::future::pending().await
        }
    };
    tokio::select! {
        () = shown => Outcome::Exit(0),
        () = typed => Outcome::Exit(0),
        () = resize(&guest, &terms.id, "", sizes) => Outcome::Exit(0),
        () = gone => Outcome::Failed("the client is gone".to_owned()),
    }
}

/// Writes to a client, and no more after a failure: that it is gone is seen elsewhere.
pub async fn write(target: &mut Option<Writer>, bytes: &[u8]) {
    if let Some(writer) = target
        && (writer.write_all(bytes).await.is_err() || writer.flush().await.is_err())
    {
        *target = None;
    }
}

/// Hands on what a client types; without anybody to read it, it is taken and dropped, so that the
/// client's connection does not stand still.
async fn take(mut client: Reader, input: Option<mpsc::Sender<Typed>>, ends: bool) {
    let mut buffer = vec![0; INPUT];
    loop {
        match client.read(&mut buffer).await {
            Ok(0) => break,
            Ok(count) => {
                let bytes = buffer.get(..count).unwrap_or_default();
                if let Some(input) = &input {
                    // It lives as long as the container.
                    let _ = input
                        .send(Typed::Bytes(Bytes::copy_from_slice(bytes)))
                        .await;
                }
            }
            // Not an end: the client is lost, others may go on.
            Err(_) => return,
        }
    }
    if let Some(input) = input.filter(|_| ends) {
        let _ = input.send(Typed::End).await;
    }
}

/// Brings to the container what clients type, through one stream: it must not end when a client
/// does.
async fn type_in(guest: Arc<Guest>, id: String, mut typed: mpsc::Receiver<Typed>) {
    let mut stream = None;
    while let Some(typed) = typed.recv().await {
        if let Err(error) = bring(&guest, &id, &mut stream, typed).await {
            stream = None;
            tracing::debug!(container = %id, %error, "input is not taken");
        }
    }
}

async fn bring(
    guest: &Guest,
    id: &str,
    stream: &mut Option<UnixStream>,
    typed: Typed,
) -> Result<(), String> {
    let stream = match stream {
        Some(stream) => stream,
        None => {
            let limit = Deadline::after(GUEST);
            let opened = guest.open_stream(id, "", Stdio::Stdin, 0, limit).await;
            stream.insert(opened.map_err(|error| error.to_string())?.0)
        }
    };
    let brought = match typed {
        Typed::Bytes(bytes) => stream.write_all(&bytes).await,
        Typed::End => stream.shutdown().await,
    };
    brought.map_err(|error| error.to_string())
}

/// Gives a terminal the sizes of a client's, as long as there are any to come. Never ends.
pub async fn resize(
    guest: &Guest,
    container_id: &str,
    exec_id: &str,
    mut sizes: mpsc::Receiver<Size>,
) {
    while let Some(size) = sizes.recv().await {
        let request = ResizeRequest {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            columns: size.columns.into(),
            rows: size.rows.into(),
        };
        if let Err(error) = guest.resize(request, Deadline::after(GUEST)).await {
            tracing::debug!(container = %container_id, %error, "a terminal keeps its size");
        }
    }
    std::future::pending().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_does_not_read_is_done_without() {
        let audience = Audience::default();
        let (mut reads, mut sleeps) = (audience.join(), audience.join());
        let reader = tokio::spawn(async move {
            let mut count = 0;
            while let Some((_, bytes)) = reads.recv().await {
                count += bytes.len();
            }
            count
        });
        for _ in 0..3 * PIECES {
            audience.tell(Stream::Stdout, b"four").await;
        }
        for _ in 0..PIECES {
            assert_eq!(sleeps.recv().await.unwrap().1, "four");
        }
        assert!(sleeps.recv().await.is_none(), "it has not been let go");
        drop(audience);
        assert_eq!(reader.await.unwrap(), 3 * PIECES * 4);
    }

    #[tokio::test]
    async fn input_ends_with_a_clients_only_where_it_is_to() {
        for ends in [true, false] {
            let (sender, mut typed) = mpsc::channel(4);
            take(Box::new(&b"words"[..]), Some(sender), ends).await;
            let first = typed.recv().await;
            assert!(matches!(first, Some(Typed::Bytes(bytes)) if bytes == "words"));
            let second = typed.recv().await;
            assert_eq!(matches!(second, Some(Typed::End)), ends);
        }
    }
}

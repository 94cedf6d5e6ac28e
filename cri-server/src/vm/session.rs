//! The task that owns the connection to a VMM.

use std::os::fd::{AsFd, OwnedFd};

use bulkhead_vmm_api::control::{Action, FromVmm, Reply, ToVmm};
use bulkhead_vmm_api::{Control, OpenDevice};
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use super::Pending;
use super::sys::{Watched, watch};

/// An action for the VMM; the error of the answer is the VMM's sentence.
pub struct Ask {
    pub operation: String,
    pub action: Action,
    pub device: Option<OpenDevice>,
    pub reply: oneshot::Sender<Result<Reply, String>>,
}

/// Speaks to one VMM until it ends or nobody asks any more.
pub struct Session {
    control: AsyncFd<Watched<Control>>,
    asks: mpsc::Receiver<Ask>,
    pending: Pending,
    port: u32,
    streams: mpsc::Sender<UnixStream>,
}

impl Session {
    /// Speaks over `control`.
    pub fn new(
        control: Control,
        asks: mpsc::Receiver<Ask>,
        port: u32,
        streams: mpsc::Sender<UnixStream>,
    ) -> std::io::Result<Self> {
        Ok(Self {
            control: watch(control)?,
            asks,
            pending: Pending::new(),
            port,
            streams,
        })
    }

    /// Runs to the end.
    pub async fn run(mut self) {
        if let Err(error) = self.serve().await {
            tracing::warn!(%error, "the connection to a VMM is lost");
        }
    }

    async fn serve(&mut self) -> std::io::Result<()> {
        loop {
            tokio::select! {
                ask = self.asks.recv() => match ask {
                    Some(ask) => self.request(ask).await?,
                    None => return Ok(()),
                },
                message = receive(&mut self.control) => match message? {
                    Some(message) => self.message(message).await?,
                    None => return Ok(()),
                },
            }
        }
    }

    async fn request(&mut self, ask: Ask) -> std::io::Result<()> {
        let request = ToVmm::Request {
            operation: ask.operation.clone(),
            action: ask.action,
        };
        let files = ask.device.as_ref().map_or(&[][..], OpenDevice::files);
        self.pending.insert(ask.operation, ask.reply);
        self.send(&request, files).await
    }

    async fn message(&mut self, message: FromVmm) -> std::io::Result<()> {
        match message {
            FromVmm::Reply { operation, result } => {
                if let Some(reply) = self.pending.remove(&operation) {
                    // Whoever asked may have given up.
                    let _ = reply.send(result);
                }
                Ok(())
            }
            FromVmm::Dial { stream, port } => {
                let theirs = if port == self.port {
                    self.stream()
                } else {
                    None
                };
                let files: Vec<OwnedFd> = theirs.into_iter().collect();
                self.send(&ToVmm::Stream { stream }, &files).await
            }
        }
    }

    /// Makes a stream, hands one end over and returns the other; `None` when too many wait.
    fn stream(&self) -> Option<OwnedFd> {
        let permit = self.streams.try_reserve().ok()?;
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().ok()?;
        ours.set_nonblocking(true).ok()?;
        theirs.set_nonblocking(true).ok()?;
        permit.send(UnixStream::from_std(ours).ok()?);
        Some(theirs.into())
    }

    async fn send(&self, message: &ToVmm, files: &[OwnedFd]) -> std::io::Result<()> {
        loop {
            let mut ready = self.control.writable().await?;
            let sent = ready.try_io(|socket| {
                let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
                socket.get_ref().0.send(message, &files)
            });
            if let Ok(result) = sent {
                return result;
            }
        }
    }
}

async fn receive(control: &mut AsyncFd<Watched<Control>>) -> std::io::Result<Option<FromVmm>> {
    loop {
        let mut ready = control.readable_mut().await?;
        if let Ok(message) = ready.try_io(|socket| socket.get_mut().0.receive()) {
            return message;
        }
    }
}

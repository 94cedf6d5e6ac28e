//! One VMM process: its start, its control socket, its end.

mod process;
mod session;
mod sys;
mod tail;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_vmm_api::control::{Action, Reply};
use bulkhead_vmm_api::{Control, ExitRecord, InterfaceCounters, Launch, LaunchError, OpenDevice};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};

use crate::deadline::{Deadline, Passed};

pub use process::Process;
pub use tail::tail;

/// Streams the guest has dialled and nobody has taken yet, at most; further ones are refused.
pub const WAITING_STREAMS: usize = 16;

/// How long the end of a VMM whose socket is closed may take to be seen.
const END_SEEN: Duration = Duration::from_secs(2);

/// Where a VMM's files are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// `control.sock`.
    pub control: PathBuf,
    /// The exit record.
    pub exit_record: PathBuf,
    /// What the VMM writes to its standard error.
    pub messages: PathBuf,
}

impl Files {
    /// The files of the pod that has `directory` to itself.
    pub fn under(directory: &Path) -> Self {
        Self {
            control: directory.join("control.sock"),
            exit_record: directory.join("exit.json"),
            messages: directory.join("messages"),
        }
    }
}

/// How a VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// A clause for the operator, such as "the guest's kernel panicked".
    pub reason: String,
    /// The last bytes of the guest's console; may be empty.
    pub console_tail: String,
}

/// What went wrong with a VMM.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// It was not started.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// One of its files, or the process itself, cannot be used.
    #[error("Cannot {step} {}: {source}", path.display())]
    File {
        /// What was tried.
        step: &'static str,
        /// On which path.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// It refused an action.
    #[error("The VMM refused to {action}: {reason}")]
    Refused {
        /// What it was asked.
        action: &'static str,
        /// Its sentence.
        reason: String,
    },
    /// It answered something else than was asked.
    #[error("The VMM gave a wrong answer when asked to {0}")]
    WrongAnswer(&'static str),
    /// Its VM has ended.
    #[error("The VM has ended: {0}")]
    Ended(String),
    /// It did not answer in time.
    #[error("The VMM did not {0} in time")]
    Late(&'static str),
}

/// A running VMM. It runs on when this value is dropped.
#[derive(Debug)]
pub struct Vm {
    process: Process,
    asks: mpsc::Sender<session::Ask>,
    ended: watch::Receiver<Option<Ended>>,
}

impl Vm {
    /// Starts a VMM. The streams its guest dials on `port` arrive at `streams`; dials of other
    /// ports are refused.
    pub async fn launch(
        launch: Launch,
        files: Files,
        port: u32,
        streams: mpsc::Sender<UnixStream>,
    ) -> Result<Self, VmError> {
        let child = blocking("start", &files.control, move || Ok(launch.spawn())).await??;
        let pidfd = child.pidfd().try_clone_to_owned();
        let pidfd = pidfd.map_err(file("watch", &files.control))?;
        let pid = child.pid();
        let process = blocking("identify", &files.control, move || Process::of(pid)).await?;
        Self::new(process, pidfd, Some(child), files, port, streams).await
    }

    /// Takes up a VMM that an earlier server has started; `None` if it runs no more.
    pub async fn adopt(
        process: Process,
        files: Files,
        port: u32,
        streams: mpsc::Sender<UnixStream>,
    ) -> Result<Option<Self>, VmError> {
        let found = process.clone();
        let pidfd = blocking("find the VMM of", &files.control, move || found.open()).await?;
        match pidfd {
            None => Ok(None),
            Some(pidfd) => Self::new(process, pidfd, None, files, port, streams)
                .await
                .map(Some),
        }
    }

    async fn new(
        process: Process,
        pidfd: OwnedFd,
        child: Option<bulkhead_vmm_api::Vmm>,
        files: Files,
        port: u32,
        streams: mpsc::Sender<UnixStream>,
    ) -> Result<Self, VmError> {
        let (end, ended) = watch::channel(None);
        let watched = process::Watch::new(pidfd, child, files.clone())
            .map_err(file("watch", &files.control))?;
        tokio::spawn(async move {
            // Nobody may be interested any more.
            let _ = end.send(Some(watched.end().await));
        });
        let (asks, requests) = mpsc::channel(WAITING_STREAMS);
        let vm = Self {
            process,
            asks,
            ended,
        };
        let path = files.control.clone();
        let connect = move || Control::connect(&path);
        let control = match blocking("connect to", &files.control, connect).await {
            Ok(control) => control,
            // Nobody listens once the VMM has ended: why it has is the better answer.
            Err(error) => {
                let patience = Deadline::after(END_SEEN);
                return Err(match patience.bound(vm.wait()).await {
                    Ok(ended) => VmError::Ended(ended.reason),
                    Err(Passed) => error,
                });
            }
        };
        let session = session::Session::new(control, requests, port, streams)
            .map_err(file("watch", &files.control))?;
        tokio::spawn(session.run());
        Ok(vm)
    }

    /// The process, as a record keeps it.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Turns to something when the VM has ended.
    pub fn ended(&self) -> watch::Receiver<Option<Ended>> {
        self.ended.clone()
    }

    /// Waits for the VM's end.
    pub async fn wait(&self) -> Ended {
        let mut ended = self.ended();
        let end = ended.wait_for(Option::is_some).await;
        end.ok()
            .and_then(|end| end.clone())
            .unwrap_or_else(|| Ended {
                reason: "its end was not seen".to_owned(),
                console_tail: String::new(),
            })
    }

    /// Attaches a device and returns its window.
    pub async fn attach(
        &self,
        operation: String,
        device: OpenDevice,
        deadline: Deadline,
    ) -> Result<u8, VmError> {
        let doing = "attach a disk";
        let action = Action::Attach {
            device: device.device().clone(),
        };
        match self
            .ask(doing, operation, action, Some(device), deadline)
            .await?
        {
            Reply::Attached { window } => Ok(window),
            _ => Err(VmError::WrongAnswer(doing)),
        }
    }

    /// Empties a window.
    pub async fn detach(
        &self,
        operation: String,
        window: u8,
        deadline: Deadline,
    ) -> Result<(), VmError> {
        let action = Action::Detach { window };
        let reply = self.ask("detach a disk", operation, action, None, deadline);
        reply.await.map(|_| ())
    }

    /// The last bytes of the guest's console, whether it still runs or not.
    pub async fn console_tail(&self, operation: String, deadline: Deadline) -> String {
        let reply = self.ask("tell how it is", operation, Action::Stats, None, deadline);
        match reply.await {
            Ok(Reply::Stats { console_tail, .. }) => console_tail,
            _ => match &*self.ended.borrow() {
                Some(ended) => ended.console_tail.clone(),
                None => String::new(),
            },
        }
    }

    /// What the VM's network interfaces have moved; nothing when the VMM does not say so.
    pub async fn interfaces(
        &self,
        operation: String,
        deadline: Deadline,
    ) -> Vec<InterfaceCounters> {
        let reply = self.ask("tell how it is", operation, Action::Stats, None, deadline);
        match reply.await {
            Ok(Reply::Stats { interfaces, .. }) => interfaces,
            _ => Vec::new(),
        }
    }

    /// Ends the VM: it is asked to, and killed when it has not ended by the deadline.
    pub async fn shut_down(&self, operation: String, deadline: Deadline) -> Result<Ended, VmError> {
        let asked = self.ask("shut down", operation, Action::Shutdown, None, deadline);
        if let Err(error) = asked.await
            && !matches!(error, VmError::Ended(_))
        {
            tracing::warn!(%error, pid = self.process.pid, "killing the VMM");
            self.process.kill();
        }
        match deadline.bound(self.wait()).await {
            Ok(ended) => Ok(ended),
            Err(Passed) => {
                self.process.kill();
                let patience = Deadline::after(Duration::from_secs(5));
                let ended = patience.bound(self.wait()).await;
                ended.map_err(|Passed| VmError::Late("end"))
            }
        }
    }

    async fn ask(
        &self,
        doing: &'static str,
        operation: String,
        action: Action,
        device: Option<OpenDevice>,
        deadline: Deadline,
    ) -> Result<Reply, VmError> {
        let (reply, answer) = oneshot::channel();
        let ask = session::Ask {
            operation,
            action,
            device,
            reply,
        };
        let exchange = async {
            if self.asks.send(ask).await.is_err() {
                return Err(None);
            }
            answer.await.map_err(|_| None)?.map_err(Some)
        };
        match deadline.bound(exchange).await {
            Err(Passed) => Err(VmError::Late(doing)),
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(Some(reason))) => Err(VmError::Refused {
                action: doing,
                reason,
            }),
            Ok(Err(None)) => {
                // The socket closes a moment before the process is gone.
                let patience = deadline.at_most(END_SEEN);
                match patience.bound(self.wait()).await {
                    Ok(ended) => Err(VmError::Ended(ended.reason)),
                    Err(Passed) => Err(VmError::Ended("its control socket is closed".to_owned())),
                }
            }
        }
    }
}

/// What a VMM left behind; `None` if it was killed or the file is gone. Blocks.
pub fn exit_record(path: &Path) -> Option<ExitRecord> {
    let file = std::fs::File::open(path).ok()?;
    ExitRecord::read(&file).ok()?
}

type Pending = HashMap<String, oneshot::Sender<Result<Reply, String>>>;

fn file(step: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> VmError + use<> {
    let path = path.to_owned();
    move |source| VmError::File { step, path, source }
}

async fn blocking<T: Send + 'static>(
    step: &'static str,
    path: &Path,
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, VmError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(std::io::Error::other(error)))
        .map_err(file(step, path))
}

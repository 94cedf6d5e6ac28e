//! A further command in a container: run to its end (CRI `ExecSync`), or for a client (CRI `Exec`).

use std::sync::Arc;
use std::time::Duration;

use bulkhead_agent_api::v1::{ExecRequest, RemoveExecRequest, Stdio, WaitRequest};
use oci_spec::runtime::Process;
use tokio::io::{AsyncWriteExt, copy, sink};
use tokio::net::UnixStream;

use super::{attach, output};
use crate::deadline::{Deadline, Passed};
use crate::guest::{Guest, GuestError};
use crate::streaming::{Outcome, Reader, Session};

/// What is kept of each output stream, in bytes; the rest is drained and dropped.
pub const OUTPUT_BYTES: usize = 16 << 20;
/// How long ending a command may take that outlived its time.
const REMOVAL: Duration = Duration::from_secs(10);
/// How long the guest may take to start a client's command.
const START: Duration = Duration::from_secs(60);

/// What a command left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// The start of its standard output.
    pub stdout: Vec<u8>,
    /// The start of its standard error.
    pub stderr: Vec<u8>,
    /// Its exit status, or 128 + n after signal n.
    pub code: i32,
}

/// Why a command has no output to show.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// Its description is no JSON; cannot happen to one we made.
    #[error("The command cannot be described to the guest: {0}")]
    Describe(#[from] serde_json::Error),
    /// The guest did not run it.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// It was killed.
    #[error("The command did not end within its time limit and was killed")]
    Late,
    /// The guest did not say how it ended.
    #[error("The guest did not say how the command ended")]
    NoExit,
    /// Nobody is there for whom it ran.
    #[error("The client of the command is gone")]
    Gone,
}

/// A command to be started.
#[derive(Debug)]
pub struct Command {
    /// Where.
    pub container_id: String,
    /// Not used before in this container.
    pub exec_id: String,
    /// What.
    pub process: Process,
}

/// Runs a command and waits for its end, but not longer than until `limit`: then it is killed with
/// all it has started, and none of it is left when this answers.
///
/// Output ends when the last process that has it has closed it, so a daemon that the command leaves
/// behind with it counts as the command still running.
pub async fn run(
    guest: Arc<Guest>,
    command: Command,
    limit: Deadline,
) -> Result<Output, ExecError> {
    let process = serde_json::to_vec(&command.process)?;
    let mut exec = Exec {
        guest,
        container_id: command.container_id,
        exec_id: command.exec_id,
    };
    match exec.attend(process, limit).await {
        Err(ExecError::Late) => {
            exec.removal().await;
            Err(ExecError::Late)
        }
        done => done,
    }
}

/// Runs a command for a client until it has ended and the client has its output, or the client is
/// gone; none of it is left then.
///
/// A command whose output another process holds open has ended once nothing has come for a while.
pub async fn attend(guest: Arc<Guest>, command: Command, session: Session) -> Outcome {
    let process = match serde_json::to_vec(&command.process) {
        Ok(process) => process,
        Err(error) => return Outcome::Failed(ExecError::from(error).to_string()),
    };
    let exec = Exec {
        guest,
        container_id: command.container_id,
        exec_id: command.exec_id,
    };
    let terminal = command.process.terminal().unwrap_or(false);
    match exec.serve(process, terminal, session).await {
        Ok(code) => Outcome::Exit(code),
        Err(error) => Outcome::Failed(error.to_string()),
    }
}

/// A command in a container. Dropped, the guest is told to forget it and to kill what of it has not
/// ended.
#[derive(Debug)]
struct Exec {
    guest: Arc<Guest>,
    container_id: String,
    exec_id: String,
}

impl Drop for Exec {
    fn drop(&mut self) {
        // Removed already.
        if self.exec_id.is_empty() {
            return;
        }
        // Bounded by its deadline.
        tokio::spawn(self.removal());
    }
}

impl Exec {
    async fn attend(&self, process: Vec<u8>, limit: Deadline) -> Result<Output, ExecError> {
        self.start(process, false, limit).await?;
        let (stdout, stderr) = tokio::try_join!(
            self.open(Stdio::Stdout, limit),
            self.open(Stdio::Stderr, limit)
        )?;
        let ends = async {
            tokio::join!(
                output::collect(stdout.0, stdout.1, OUTPUT_BYTES),
                output::collect(stderr.0, stderr.1, OUTPUT_BYTES),
                self.exit(limit),
            )
        };
        let ended = limit.bound(ends).await;
        let (stdout, stderr, code) = ended.map_err(|Passed| ExecError::Late)?;
        Ok(Output {
            stdout,
            stderr,
            code: code?,
        })
    }

    async fn serve(
        &self,
        process: Vec<u8>,
        terminal: bool,
        session: Session,
    ) -> Result<i32, ExecError> {
        let limit = Deadline::after(START);
        self.start(process, session.stdin.is_some(), limit).await?;
        let stdout = self.open(Stdio::Stdout, limit).await?;
        let stderr = match terminal {
            true => None,
            false => Some(self.open(Stdio::Stderr, limit).await?),
        };
        let stdin = match session.stdin {
            Some(client) => Some((client, self.open(Stdio::Stdin, limit).await?.0)),
            None => None,
        };
        let shown = async {
            tokio::join!(output::give(stdout.0, stdout.1, session.stdout), async {
                if let Some((source, offset)) = stderr {
                    output::give(source, offset, session.stderr).await;
                }
            },);
            std::future::pending().await
        };
        let typed = async {
            if let Some((client, process)) = stdin {
                type_in(client, process).await;
            }
            std::future::pending().await
        };
        tokio::select! {
            // Told when the client has all output, or none comes any more.
            code = self.exit(Deadline::after(Duration::MAX)) => code,
            () = shown => Err(ExecError::NoExit),
            () = typed => Err(ExecError::NoExit),
            () = attach::resize(&self.guest, &self.container_id, &self.exec_id, session.sizes) => {
                Err(ExecError::NoExit)
            }
            () = session.gone => Err(ExecError::Gone),
        }
    }

    async fn start(&self, process: Vec<u8>, stdin: bool, limit: Deadline) -> Result<(), ExecError> {
        let request = ExecRequest {
            operation_id: self.exec_id.clone(),
            container_id: self.container_id.clone(),
            exec_id: self.exec_id.clone(),
            process,
            stdin,
        };
        self.guest.exec(request, limit).await.map_err(late)?;
        Ok(())
    }

    async fn open(&self, stdio: Stdio, limit: Deadline) -> Result<(UnixStream, u64), ExecError> {
        let (container, exec) = (&self.container_id, &self.exec_id);
        let opened = self.guest.open_stream(container, exec, stdio, 0, limit);
        opened.await.map_err(late)
    }

    async fn exit(&self, limit: Deadline) -> Result<i32, ExecError> {
        let request = WaitRequest {
            container_id: self.container_id.clone(),
            exec_id: self.exec_id.clone(),
        };
        let ended = self.guest.wait(request, limit).await.map_err(late)?;
        Ok(ended.exit.ok_or(ExecError::NoExit)?.code)
    }

    /// The removal, to be awaited; it is then not done again.
    fn removal(&mut self) -> impl Future<Output = ()> + Send + 'static {
        let guest = Arc::clone(&self.guest);
        let request = RemoveExecRequest {
            operation_id: format!("{}-remove", self.exec_id),
            container_id: std::mem::take(&mut self.container_id),
            exec_id: std::mem::take(&mut self.exec_id),
        };
        async move {
            if let Err(error) = guest.remove_exec(request, Deadline::after(REMOVAL)).await {
                tracing::debug!(%error, "an exec was not removed");
            }
        }
    }
}

/// Hands on what a client types, and its end. A process that does not take it is none of the
/// client's business: the rest is dropped, so that the connection does not stand still.
async fn type_in(mut client: Reader, mut process: UnixStream) {
    let taken = match copy(&mut client, &mut process).await {
        Ok(_) => process.shutdown().await,
        Err(_) => copy(&mut client, &mut sink()).await.map(drop),
    };
    if let Err(error) = taken {
        tracing::debug!(%error, "input is not taken");
    }
    // Closed only now that the command has ended: the guest would take it for a lost server.
    std::future::pending::<()>().await;
}

fn late(error: GuestError) -> ExecError {
    match error {
        GuestError::Late(_) => ExecError::Late,
        other => ExecError::Guest(other),
    }
}

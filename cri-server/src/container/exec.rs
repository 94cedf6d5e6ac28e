//! A further command in a container, run to its end (CRI `ExecSync`).

use std::sync::Arc;
use std::time::Duration;

use bulkhead_agent_api::v1::{ExecRequest, RemoveExecRequest, Stdio, WaitRequest};
use oci_spec::runtime::Process;

use super::output;
use crate::deadline::{Deadline, Passed};
use crate::guest::{Guest, GuestError};

/// What is kept of each output stream, in bytes; the rest is drained and dropped.
pub const OUTPUT_BYTES: usize = 16 << 20;
/// How long ending a command may take that outlived its time.
const REMOVAL: Duration = Duration::from_secs(10);

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
        let (container_id, exec_id) = (&self.container_id, &self.exec_id);
        let request = ExecRequest {
            operation_id: exec_id.clone(),
            container_id: container_id.clone(),
            exec_id: exec_id.clone(),
            process,
            stdin: false,
        };
        self.guest.exec(request, limit).await.map_err(late)?;
        let open = |stdio| {
            self.guest
                .open_stream(container_id, exec_id, stdio, 0, limit)
        };
        let (stdout, stderr) =
            tokio::try_join!(open(Stdio::Stdout), open(Stdio::Stderr)).map_err(late)?;
        let wait = WaitRequest {
            container_id: container_id.clone(),
            exec_id: exec_id.clone(),
        };
        let ends = async {
            tokio::join!(
                output::collect(stdout.0, stdout.1, OUTPUT_BYTES),
                output::collect(stderr.0, stderr.1, OUTPUT_BYTES),
                self.guest.wait(wait, limit),
            )
        };
        let ended = limit.bound(ends).await;
        let (stdout, stderr, exit) = ended.map_err(|Passed| ExecError::Late)?;
        Ok(Output {
            stdout,
            stderr,
            code: exit.map_err(late)?.exit.ok_or(ExecError::NoExit)?.code,
        })
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

fn late(error: GuestError) -> ExecError {
    match error {
        GuestError::Late(_) => ExecError::Late,
        other => ExecError::Guest(other),
    }
}

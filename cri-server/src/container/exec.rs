//! A command run in a container to its end (CRI `ExecSync`).

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

/// The exec in the guest; dropped, the guest is told to forget it and to kill what is left.
struct Running {
    guest: Arc<Guest>,
    container_id: String,
    exec_id: String,
}

impl Drop for Running {
    fn drop(&mut self) {
        let guest = Arc::clone(&self.guest);
        let request = RemoveExecRequest {
            operation_id: format!("{}-remove", self.exec_id),
            container_id: std::mem::take(&mut self.container_id),
            exec_id: std::mem::take(&mut self.exec_id),
        };
        // Bounded by its deadline.
        tokio::spawn(async move {
            if let Err(error) = guest.remove_exec(request, Deadline::after(REMOVAL)).await {
                tracing::debug!(%error, "an exec was not removed");
            }
        });
    }
}

/// Runs `process` in the container and waits for it, but not longer than until `limit`.
/// When the caller gives up, the command is killed.
pub async fn run(
    guest: Arc<Guest>,
    container_id: String,
    exec_id: String,
    process: &Process,
    limit: Deadline,
) -> Result<Output, ExecError> {
    let request = ExecRequest {
        operation_id: exec_id.clone(),
        container_id: container_id.clone(),
        exec_id: exec_id.clone(),
        process: serde_json::to_vec(process)?,
        stdin: false,
    };
    let running = Running {
        guest: Arc::clone(&guest),
        container_id: container_id.clone(),
        exec_id: exec_id.clone(),
    };
    guest.exec(request, limit).await.map_err(late)?;
    let open = |stdio| guest.open_stream(&container_id, &exec_id, stdio, 0, limit);
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
            guest.wait(wait, limit),
        )
    };
    let ended = limit.bound(ends).await;
    drop(running);
    let (stdout, stderr, exit) = ended.map_err(|Passed| ExecError::Late)?;
    let exit = exit.map_err(late)?.exit.ok_or(ExecError::NoExit)?;
    Ok(Output {
        stdout,
        stderr,
        code: exit.code,
    })
}

fn late(error: GuestError) -> ExecError {
    match error {
        GuestError::Late(_) => ExecError::Late,
        other => ExecError::Guest(other),
    }
}

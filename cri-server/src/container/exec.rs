//! A further command in a container (CRI `ExecSync`, and `Exec` over streams).

use std::sync::Arc;
use std::time::Duration;

use bulkhead_agent_api::v1::{ExecRequest, RemoveExecRequest, ResizeRequest, Stdio, WaitRequest};
use oci_spec::runtime::Process;
use tokio::net::UnixStream;

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
    /// Whether its standard input is a stream; a terminal's always is.
    pub stdin: bool,
}

/// A command in a container. Dropped, the guest is told to forget it and to kill what of it has not
/// ended.
#[derive(Debug)]
pub struct Exec {
    guest: Arc<Guest>,
    container_id: String,
    exec_id: String,
    /// To write; shutting it down is the end of input, which a terminal is typed as ^D.
    pub stdin: Option<UnixStream>,
    /// To read, and to acknowledge: the offset behind what was dealt with, as 8 bytes, little end
    /// first. With the offset of its first byte.
    pub stdout: Option<(UnixStream, u64)>,
    /// As `stdout`; none of a terminal.
    pub stderr: Option<(UnixStream, u64)>,
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
    /// Starts a command with its streams. When that fails or is given up, nothing of it is left.
    pub async fn start(
        guest: Arc<Guest>,
        command: Command,
        limit: Deadline,
    ) -> Result<Self, ExecError> {
        let Command {
            container_id,
            exec_id,
            process,
            stdin,
        } = command;
        let terminal = process.terminal().unwrap_or(false);
        let request = ExecRequest {
            operation_id: exec_id.clone(),
            container_id: container_id.clone(),
            exec_id: exec_id.clone(),
            process: serde_json::to_vec(&process)?,
            stdin,
        };
        let mut exec = Self {
            guest,
            container_id,
            exec_id,
            stdin: None,
            stdout: None,
            stderr: None,
        };
        match exec.guest.exec(request, limit).await.map_err(late) {
            Ok(_) => {}
            Err(ExecError::Late) => {
                exec.end().await;
                return Err(ExecError::Late);
            }
            Err(error) => return Err(error),
        }
        let open = async |stdio, wanted| match wanted {
            true => exec.open(stdio, limit).await.map(Some),
            false => Ok(None),
        };
        let (stdin, stdout, stderr) = tokio::try_join!(
            open(Stdio::Stdin, stdin || terminal),
            open(Stdio::Stdout, true),
            open(Stdio::Stderr, !terminal),
        )
        .map_err(late)?;
        exec.stdin = stdin.map(|(stream, _)| stream);
        exec.stdout = stdout;
        exec.stderr = stderr;
        Ok(exec)
    }

    async fn open(&self, stdio: Stdio, limit: Deadline) -> Result<(UnixStream, u64), GuestError> {
        self.guest
            .open_stream(&self.container_id, &self.exec_id, stdio, 0, limit)
            .await
    }

    /// Waits for the end of the command and, for a bounded time, of its output; answers its exit
    /// status, or 128 + n after signal n.
    pub async fn wait(&self, limit: Deadline) -> Result<i32, ExecError> {
        let request = WaitRequest {
            container_id: self.container_id.clone(),
            exec_id: self.exec_id.clone(),
        };
        let answer = self.guest.wait(request, limit).await.map_err(late)?;
        Ok(answer.exit.ok_or(ExecError::NoExit)?.code)
    }

    /// Gives its terminal a size in characters.
    #[expect(dead_code, reason = "for Exec over streams, not served yet")]
    pub async fn resize(&self, columns: u16, rows: u16, limit: Deadline) -> Result<(), ExecError> {
        let request = ResizeRequest {
            container_id: self.container_id.clone(),
            exec_id: self.exec_id.clone(),
            columns: columns.into(),
            rows: rows.into(),
        };
        self.guest.resize(request, limit).await.map_err(late)?;
        Ok(())
    }

    /// Collects the output and waits for the end, but not longer than until `limit`: then the
    /// command is killed with all it has started, and none of it is left when this answers.
    ///
    /// Output ends when the last process that has it has closed it, so a daemon that the command
    /// leaves behind with it counts as the command still running.
    pub async fn collect(mut self, limit: Deadline) -> Result<Output, ExecError> {
        let (stdout, stderr) = (self.stdout.take(), self.stderr.take());
        let collect = async |stream: Option<(UnixStream, u64)>| match stream {
            Some((stream, offset)) => output::collect(stream, offset, OUTPUT_BYTES).await,
            None => Vec::new(),
        };
        let ends = async { tokio::join!(collect(stdout), collect(stderr), self.wait(limit)) };
        match limit.bound(ends).await {
            Ok((_, _, Err(ExecError::Late))) | Err(Passed) => {
                self.end().await;
                Err(ExecError::Late)
            }
            Ok((stdout, stderr, code)) => Ok(Output {
                stdout,
                stderr,
                code: code?,
            }),
        }
    }

    /// Kills what has not ended, and waits until it is gone.
    pub async fn end(mut self) {
        self.removal().await;
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

//! Commands in running containers, and running containers themselves, at this terminal.

use bulkhead_cri_api::v1::{AttachRequest, ExecRequest};
use clap::Args;

use super::client::Client;
use super::failure::Failure;
use super::stream::{self, Wants};

/// A command in a running container.
#[derive(Args)]
#[group(skip)]
pub struct Exec {
    /// Passes standard input on
    #[arg(long, short)]
    interactive: bool,
    /// Gives it a terminal: this one
    #[arg(long, short)]
    tty: bool,
    /// Id of the container, or the start of it
    container: String,
    /// The command, and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

impl Exec {
    /// Runs it; the exit status is the command's.
    pub async fn run(self, client: &Client) -> Result<u8, Failure> {
        let request = ExecRequest {
            container_id: self.container,
            cmd: self.command,
            tty: self.tty,
            stdin: self.interactive,
            stdout: true,
            stderr: !self.tty,
        };
        let answer = client.runtime.clone().exec(request).await;
        let answer = answer.map_err(|status| Failure::call("run the command", &status))?;
        let wants = Wants {
            stdin: self.interactive,
            terminal: self.tty,
        };
        stream::join(&answer.into_inner().url, wants).await
    }
}

/// A running container.
#[derive(Args)]
#[group(skip)]
pub struct Attach {
    /// Passes standard input on, if the container was made to have one
    #[arg(long, short)]
    interactive: bool,
    /// Id of the container, or the start of it
    container: String,
}

impl Attach {
    /// Shows what it writes from now on, until it ends.
    pub async fn run(self, client: &Client) -> Result<u8, Failure> {
        // Whether it has a terminal is known to the container alone, and told in verbose status.
        let terminal = client.has_terminal(&self.container).await?;
        let request = AttachRequest {
            container_id: self.container,
            stdin: self.interactive,
            tty: terminal,
            stdout: true,
            stderr: !terminal,
        };
        let answer = client.runtime.clone().attach(request).await;
        let answer = answer.map_err(|status| Failure::call("attach to the container", &status))?;
        let wants = Wants {
            stdin: self.interactive,
            terminal: terminal && self.interactive,
        };
        stream::join(&answer.into_inner().url, wants).await
    }
}

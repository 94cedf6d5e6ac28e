//! The command line.

mod client;
mod exec;
mod failure;
mod log;
mod logs;
mod private;
mod pull;
mod run;
mod stats;
mod stream;
mod sys;
mod table;
mod timings;
mod value;

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::config::Config;
use crate::{doctor, service};
use client::{Client, NoServer};
use failure::Failure;

const EXAMPLES: &str = "\
Examples:
  bulkhead doctor                                   can pods run on this machine?
  sudo bulkhead run docker.io/library/busybox -- uname -a
  sudo bulkhead serve                               a CRI server for crictl or a kubelet
  sudo bulkhead ps -a                               its pods and containers
  sudo bulkhead logs -f 0123                        what container 0123… writes
  sudo bulkhead exec -it 0123 sh                    a shell in it
  sudo bulkhead stats                               what they use";

const RUN_EXAMPLES: &str = "\
Talks to a running server; where none answers, root gets a server that lives as long as the
command and leaves nothing. Ctrl-C stops the container, a second one kills it.

The exit status is the container's own (128 + n after signal n); 125 is a failure of bulkhead,
126 a command that cannot be executed, 127 one that is not there.

Examples:
  sudo bulkhead run docker.io/library/busybox -- uname -a
  sudo bulkhead run -e GREETING=hello --memory 256M docker.io/library/busybox -- env";

/// Runs containers, each pod in a virtual machine of its own.
#[derive(Parser)]
#[command(name = "bulkhead", version, after_help = EXAMPLES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs a container in a virtual machine, in the foreground
    #[command(after_help = RUN_EXAMPLES)]
    Run(run::Run),
    /// Lists pods and their containers
    Ps {
        /// Those that have ended, too
        #[arg(long, short)]
        all: bool,
        #[command(flatten)]
        server: Server,
    },
    /// Prints what a container has written
    Logs {
        /// Goes on until the container has ended
        #[arg(long, short)]
        follow: bool,
        /// Id of the container, or the start of it
        container: String,
        #[command(flatten)]
        server: Server,
    },
    /// Runs a command in a running container
    #[command(after_help = "The exit status is the command's own; 125 is a failure of bulkhead.")]
    Exec {
        #[command(flatten)]
        server: Server,
        #[command(flatten)]
        wanted: exec::Exec,
    },
    /// Shows what a running container writes from now on, and passes input on to it
    Attach {
        #[command(flatten)]
        server: Server,
        #[command(flatten)]
        wanted: exec::Attach,
    },
    /// Shows what pods and containers use; on a terminal it goes on until Ctrl-C
    #[command(
        after_help = "A pod's figures are the host's, with all that its VM takes; a container's \
                            are those of the guest."
    )]
    Stats {
        #[command(flatten)]
        server: Server,
    },
    /// Prints the end of what a pod's kernel has written to its console
    Console {
        /// Id of the pod, or the start of it
        pod: String,
        #[command(flatten)]
        server: Server,
    },
    /// Lists images
    Images {
        #[command(flatten)]
        server: Server,
    },
    /// Says whether pods can run on this machine, and what to do where they cannot
    #[command(after_help = "The exit status is 0 if pods can run here.")]
    Doctor {
        /// Prints a line for each finding, for programs, and counts what only tests need
        #[arg(long)]
        machine_check: bool,
        /// Runs the micro guest in this process and prints its outcome
        #[arg(long, hide = true)]
        micro_guest: bool,
    },
    /// Serves the CRI
    #[command(
        after_help = "Ends by SIGTERM or Ctrl-C; pods run on. The log goes to stderr, \
                            RUST_LOG=debug makes it longer."
    )]
    Serve {
        /// Configuration [default: /etc/bulkhead/config.toml if it exists]
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Serves one command, whose state is in this directory, until stdin closes
        #[arg(long, hide = true, conflicts_with = "config")]
        private: Option<PathBuf>,
    },
    /// Prints the version, and a running server's
    Version {
        #[command(flatten)]
        server: Server,
    },
}

/// Which server to talk to.
#[derive(clap::Args)]
struct Server {
    /// Socket of the server [default: the configured one]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

impl Server {
    fn socket(&self) -> Result<PathBuf, Failure> {
        match &self.socket {
            Some(socket) => Ok(socket.clone()),
            None => configured_socket(None),
        }
    }
}

/// Runs the command named by the process arguments and returns its exit status.
pub fn run() -> ExitCode {
    sys::give_memory_back();
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version come this way, too. Exit status 2 may be a container's own.
            let status = if error.use_stderr() { failure::OWN } else { 0 };
            let _ = error.print();
            return ExitCode::from(status);
        }
    };
    match dispatch(arguments.command) {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            eprintln!("bulkhead: {failure}");
            ExitCode::from(failure.status)
        }
    }
}

fn dispatch(command: Command) -> Result<u8, Failure> {
    match command {
        Command::Run(wanted) => {
            let socket = configured_socket(wanted.config.as_deref())?;
            block_on(wanted.run(&socket))
        }
        Command::Ps { all, server } => {
            let socket = server.socket()?;
            print(&block_on(async {
                table::pods(&Client::require(&socket).await?, all).await
            })?)
        }
        Command::Logs {
            follow,
            container,
            server,
        } => {
            let socket = server.socket()?;
            block_on(async {
                logs::logs(&Client::require(&socket).await?, &container, follow).await
            })
        }
        Command::Exec { server, wanted } => {
            let socket = server.socket()?;
            block_on(async { wanted.run(&Client::require(&socket).await?).await })
        }
        Command::Attach { server, wanted } => {
            let socket = server.socket()?;
            block_on(async { wanted.run(&Client::require(&socket).await?).await })
        }
        Command::Stats { server } => {
            let socket = server.socket()?;
            block_on(async { stats::stats(&Client::require(&socket).await?).await })
        }
        Command::Console { pod, server } => {
            let socket = server.socket()?;
            let client = async { Client::require(&socket).await?.console(&pod).await };
            print(&block_on(client)?)
        }
        Command::Images { server } => {
            let socket = server.socket()?;
            print(&block_on(async {
                table::images(&Client::require(&socket).await?).await
            })?)
        }
        Command::Doctor {
            micro_guest: true, ..
        } => print(&serde_json::to_string(&doctor::micro_guest()).map_err(Failure::own)?),
        Command::Doctor { machine_check, .. } => {
            let report = doctor::examine(machine_check);
            print(&if machine_check {
                report.lines()
            } else {
                report.show(std::io::stdout().is_terminal())
            })?;
            Ok(u8::from(!report.can_run_pods()))
        }
        Command::Serve {
            private: Some(directory),
            ..
        } => {
            log_to_stderr();
            block_on(private::serve(&directory))?;
            Ok(0)
        }
        Command::Serve {
            config,
            private: None,
        } => {
            log_to_stderr();
            let config = Config::load(config.as_deref()).map_err(Failure::own)?;
            block_on(async { service::serve(config).await.map_err(Failure::own) })?;
            Ok(0)
        }
        Command::Version { server } => version(&server),
    }
}

fn version(server: &Server) -> Result<u8, Failure> {
    let mut text = format!("bulkhead {}\n", env!("CARGO_PKG_VERSION"));
    let socket = server.socket()?;
    let answer = block_on(async {
        match Client::connect(&socket).await {
            Ok(client) => client.version().await.map(Some),
            // One that was named must answer; one that might be there need not.
            Err(_) if server.socket.is_none() => Ok(None),
            Err(NoServer::Failed(failure)) => Err(failure),
            Err(NoServer::Absent) => Err(Failure::own(format!(
                "no server answers at {}",
                socket.display()
            ))),
        }
    })?;
    if let Some(version) = answer {
        text.push_str(&format!(
            "server {} {}\n",
            version.runtime_name, version.runtime_version
        ));
    }
    print(&text)
}

fn configured_socket(config: Option<&Path>) -> Result<PathBuf, Failure> {
    Ok(Config::load(config).map_err(Failure::own)?.socket())
}

fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(Failure::own)?;
    let result = runtime.block_on(work);
    // Work on files that nobody waits for any more must not hold up the end.
    runtime.shutdown_background();
    result
}

fn print(text: &str) -> Result<u8, Failure> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(Failure::own(error)),
        _ => Ok(0),
    }
}

fn log_to_stderr() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Arguments::command().debug_assert();
    }
}

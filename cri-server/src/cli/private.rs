//! A server for one `bulkhead run`: its state lives in a directory that ends with the command.
//!
//! The server is a child whose standard input is held open by the command. When it closes, be it
//! that the command is done or that it was killed, the server removes its pods and its state.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use bulkhead_cri_api::v1::{ListPodSandboxRequest, RemovePodSandboxRequest};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use super::client::{Client, NoServer};
use super::failure::Failure;
use crate::config::{self, Config};
use crate::service;

/// How long the server may take until it answers, and until it has ended.
const START_LIMIT: Duration = Duration::from_secs(30);
const END_LIMIT: Duration = Duration::from_secs(120);
const START_STEP: Duration = Duration::from_millis(20);

const CONFIGURATION: &str = "config.toml";
const LOG: &str = "server.log";
const LOGS: &str = "logs";

/// A private server that runs. Dropping it lets it end by itself; [`Private::end`] waits for that.
pub struct Private {
    directory: PathBuf,
    child: Child,
}

impl Private {
    /// Starts a server and connects to it. It is configured as the host's server is, by `config`
    /// or the usual file, but for the places of its state.
    pub async fn start(config: Option<&Path>) -> Result<(Self, Client), Failure> {
        let made =
            |error: io::Error| Failure::own(format!("cannot make a private server: {error}"));
        let table = base(config)?;
        let directory = make_directory().map_err(made)?;
        let started = async {
            let log = prepare(&directory, table).map_err(made)?;
            let child = Command::new(std::env::current_exe().map_err(made)?)
                .arg("serve")
                .arg("--private")
                .arg(&directory)
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(log)
                // A Ctrl-C at the terminal is for the command alone, which then ends this one.
                .process_group(0)
                .spawn()
                .map_err(made)?;
            Ok(Self {
                directory: directory.clone(),
                child,
            })
        };
        let mut private = match started.await {
            Ok(private) => private,
            Err(failure) => {
                let _ = fs::remove_dir_all(&directory);
                return Err(failure);
            }
        };
        match timeout(START_LIMIT, private.connect()).await {
            Ok(Ok(client)) => Ok((private, client)),
            Ok(Err(failure)) => {
                private.end().await;
                Err(failure)
            }
            Err(_) => {
                let seconds = START_LIMIT.as_secs();
                let said = private.last_words();
                private.end().await;
                Err(Failure::own(format!(
                    "the private server does not answer after {seconds} s: {said}"
                )))
            }
        }
    }

    /// Where containers' logs may be written.
    pub fn logs(&self) -> PathBuf {
        self.directory.join(LOGS)
    }

    async fn connect(&mut self) -> Result<Client, Failure> {
        let socket = self.directory.join("run/bulkhead.sock");
        loop {
            match Client::connect(&socket).await {
                Ok(client) => return Ok(client),
                Err(NoServer::Failed(failure)) => return Err(failure),
                Err(NoServer::Absent) => {}
            }
            let ended = self.child.try_wait();
            if !matches!(ended, Ok(None)) {
                let said = self.last_words();
                return Err(Failure::own(format!(
                    "the private server does not start: {said}"
                )));
            }
            sleep(START_STEP).await;
        }
    }

    /// The end of what the server said.
    fn last_words(&self) -> String {
        let log = fs::read(self.directory.join(LOG)).unwrap_or_default();
        let text = String::from_utf8_lossy(&log);
        let last = text.lines().rev().find(|line| !line.trim().is_empty());
        last.unwrap_or("it said nothing")
            .trim()
            .chars()
            .take(1000)
            .collect()
    }

    /// Lets the server remove its pods and its state, and waits for its end.
    pub async fn end(mut self) {
        drop(self.child.stdin.take());
        if timeout(END_LIMIT, self.child.wait()).await.is_err() {
            eprintln!(
                "bulkhead: the private server takes long to end; what it leaves is in {}",
                self.directory.display()
            );
            return;
        }
        match fs::remove_dir_all(&self.directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                eprintln!("bulkhead: {} remains: {error}", self.directory.display());
            }
            _ => {}
        }
    }
}

/// What the child does: serves until its standard input closes, then leaves nothing.
pub async fn serve(directory: &Path) -> Result<(), Failure> {
    let config = Config::load(Some(&directory.join(CONFIGURATION))).map_err(Failure::own)?;
    let socket = config.socket();
    let mut terminate = signal(SignalKind::terminate()).map_err(Failure::own)?;
    let (sender, closed) = oneshot::channel::<()>();
    // Reading blocks, and may do so for as long as this process lives.
    std::thread::spawn(move || {
        let mut byte = [0];
        while !matches!(io::stdin().read(&mut byte), Ok(0) | Err(_)) {}
        drop(sender);
    });
    let stop = async move {
        tokio::select! {
            _ = closed => {}
            _ = terminate.recv() => {}
        }
        remove_pods(&socket).await;
    };
    let served = service::serve_until(config, stop).await;
    // The logs of a failed start are read by the command, which then removes the rest.
    if served.is_ok() {
        let _ = fs::remove_dir_all(directory);
    }
    served.map_err(Failure::own)
}

async fn remove_pods(socket: &Path) {
    let Ok(client) = Client::connect(socket).await else {
        return;
    };
    let mut runtime = client.runtime.clone();
    let pods = match runtime
        .list_pod_sandbox(ListPodSandboxRequest::default())
        .await
    {
        Ok(answer) => answer.into_inner().items,
        Err(status) => {
            tracing::error!(%status, "pods cannot be listed for removal");
            return;
        }
    };
    for pod in pods {
        let request = RemovePodSandboxRequest {
            pod_sandbox_id: pod.id.clone(),
        };
        if let Err(status) = runtime.remove_pod_sandbox(request).await {
            tracing::error!(sandbox = pod.id, %status, "pod cannot be removed");
        }
    }
}

/// The configuration the host's server would have, as a table.
fn base(config: Option<&Path>) -> Result<toml::Table, Failure> {
    let path = config.unwrap_or(Path::new(config::DEFAULT_PATH));
    let text = match fs::read_to_string(path) {
        Err(error) if config.is_none() && error.kind() == io::ErrorKind::NotFound => String::new(),
        other => other
            .map_err(|error| Failure::own(format!("cannot read {}: {error}", path.display())))?,
    };
    text.parse()
        .map_err(|error| Failure::own(format!("{} is wrong: {error}", path.display())))
}

/// A directory for us alone, on a disk: images are too large for memory.
fn make_directory() -> io::Result<PathBuf> {
    let place = std::env::var_os("TMPDIR").filter(|place| !place.is_empty());
    let place = place.map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    let directory = place.join(format!("bulkhead-run-{}", super::run::random_name()?));
    DirBuilder::new().mode(0o700).create(&directory)?;
    Ok(directory)
}

/// Writes the configuration, makes room for containers' logs, and opens the server's own.
fn prepare(directory: &Path, mut table: toml::Table) -> io::Result<File> {
    let place = |name: &str| -> io::Result<toml::Value> {
        let path = directory.join(name);
        let text = path.to_str().ok_or(io::ErrorKind::InvalidFilename)?;
        Ok(toml::Value::String(text.to_owned()))
    };
    table.insert("root".to_owned(), place("root")?);
    table.insert("run".to_owned(), place("run")?);
    table.remove("socket");
    let create = |name: &str| {
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(directory.join(name))
    };
    DirBuilder::new().mode(0o700).create(directory.join(LOGS))?;
    create(CONFIGURATION)?.write_all(table.to_string().as_bytes())?;
    create(LOG)
}

//! `bulkhead run`: one container in one pod, in the foreground.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bulkhead_cri_api::v1::{
    ContainerConfig, ContainerMetadata, ContainerState, ContainerStatus, CreateContainerRequest,
    ImageSpec, KeyValue, LinuxContainerConfig, LinuxContainerResources,
    LinuxContainerSecurityContext, LinuxPodSandboxConfig, ListPodSandboxRequest, PodSandboxConfig,
    PodSandboxFilter, PodSandboxMetadata, RemovePodSandboxRequest, RunPodSandboxRequest,
    SecurityProfile, StartContainerRequest, StopContainerRequest,
};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{MissedTickBehavior, interval};

use super::client::{Client, NoServer};
use super::failure::{Failure, NOT_EXECUTABLE, NOT_FOUND};
use super::log::Log;
use super::private::Private;
use super::timings::{self, Timings};
use super::{pull, value};

/// Marks a command's pod, so that it is found again when its id was never told.
const LABEL: &str = "bulkhead.run/command";
const LOG: &str = "container.log";
/// How long a container has to end by itself after the first Ctrl-C, in seconds.
const GRACE_SECONDS: i64 = 10;
/// How often the end of the container is looked for; its output does not wait for that.
const LOOK: Duration = Duration::from_millis(100);
/// How long the server may be away: it can be restarted while pods run on.
const AWAY_LIMIT: Duration = Duration::from_secs(30);

/// What is to run.
#[derive(Debug, clap::Args)]
pub struct Run {
    /// The image, such as docker.io/library/busybox or registry.example/app:1.2
    image: String,
    /// What to run instead of the image's own command, with arguments; give it behind `--`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
    /// Name of the pod, and its hostname [default: a random one]
    #[arg(long, value_parser = value::name)]
    name: Option<String>,
    /// Sets an environment variable; without a value, passes on this process's
    #[arg(long, short, value_name = "NAME[=VALUE]", value_parser = value::variable)]
    env: Vec<(String, String)>,
    /// The most memory the container may use, such as 256M or 2G
    #[arg(long, value_name = "BYTES", value_parser = value::bytes)]
    memory: Option<i64>,
    /// Prints at the end where the milliseconds went
    #[arg(long)]
    timings: bool,
    /// Socket of a running server [default: the configured one, or else a server of its own]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Configuration of the server
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
}

impl Run {
    /// Runs it to its end and returns the exit status; `default_socket` is where a server would be.
    pub async fn run(&self, default_socket: &Path) -> Result<u8, Failure> {
        let mut signals = Signals::open().map_err(Failure::own)?;
        let (client, private) = self.reach(default_socket).await?;
        let logs = match &private {
            Some(private) => private.logs(),
            None => shared_logs().map_err(Failure::own)?,
        };
        let session = Session::new(self, client, logs.clone());
        let result = match session {
            Ok(session) => {
                let mut timings = Timings::begin();
                let result = session.run(&mut signals, &mut timings).await;
                timings.end("run", String::new());
                session.remove().await;
                timings.end("remove", String::new());
                if self.timings {
                    eprint!("{}", timings.show());
                }
                result
            }
            Err(failure) => Err(failure),
        };
        match private {
            Some(private) => private.end().await,
            // Ours alone; what is in it was shown.
            None => drop(std::fs::remove_dir_all(&logs)),
        }
        result
    }

    async fn reach(&self, default_socket: &Path) -> Result<(Client, Option<Private>), Failure> {
        if let Some(socket) = &self.socket {
            return Ok((Client::require(socket).await?, None));
        }
        match Client::connect(default_socket).await {
            Ok(client) => return Ok((client, None)),
            Err(NoServer::Failed(failure)) => return Err(failure),
            Err(NoServer::Absent) => {}
        }
        if !rustix::process::geteuid().is_root() {
            return Err(Failure::own(format!(
                "no server answers at {}, and only root can bring one up: run this with sudo, \
                 or start `bulkhead serve`",
                default_socket.display()
            )));
        }
        let (private, client) = Private::start(self.config.as_deref()).await?;
        Ok((client, Some(private)))
    }

    fn resources(&self) -> LinuxContainerResources {
        LinuxContainerResources {
            memory_limit_in_bytes: self.memory.unwrap_or(0),
            ..LinuxContainerResources::default()
        }
    }
}

/// One pod on one server.
struct Session<'a> {
    wanted: &'a Run,
    client: Client,
    logs: PathBuf,
    /// Unlike that of any other command.
    identity: String,
    pod: PodSandboxConfig,
}

impl<'a> Session<'a> {
    fn new(wanted: &'a Run, client: Client, logs: PathBuf) -> Result<Self, Failure> {
        let identity = random_name().map_err(Failure::own)?;
        let name = wanted
            .name
            .clone()
            .unwrap_or_else(|| format!("run-{identity}"));
        let directory = logs
            .to_str()
            .ok_or_else(|| Failure::own(format!("{} is not UTF-8; set TMPDIR", logs.display())))?;
        let pod = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.clone(),
                uid: identity.clone(),
                namespace: "bulkhead-run".to_owned(),
                attempt: 0,
            }),
            hostname: name,
            log_directory: directory.to_owned(),
            labels: [(LABEL.to_owned(), identity.clone())].into(),
            linux: Some(LinuxPodSandboxConfig {
                resources: Some(wanted.resources()),
                ..LinuxPodSandboxConfig::default()
            }),
            ..PodSandboxConfig::default()
        };
        Ok(Self {
            wanted,
            client,
            logs,
            identity,
            pod,
        })
    }

    async fn run(&self, signals: &mut Signals, timings: &mut Timings) -> Result<u8, Failure> {
        let image = tokio::select! {
            image = self.prepare() => image?,
            number = signals.next() => return Ok(128 + number),
        };
        timings.end("image", String::new());
        // To be told of the log's making, one must look before it is made.
        let mut log = Log::open(&self.logs.join(LOG)).map_err(|error| {
            Failure::own(format!("cannot watch {}: {error}", self.logs.display()))
        })?;
        let container = {
            let mut start = std::pin::pin!(self.start(image, timings));
            tokio::select! {
                container = &mut start => container?,
                number = signals.next() => {
                    // Half a pod is best removed when it is whole; a second signal will not wait.
                    tokio::select! {
                        _ = start => {}
                        _ = signals.next() => {}
                    }
                    return Ok(128 + number);
                }
            }
        };
        self.follow(&container, &mut log, signals).await
    }

    async fn prepare(&self) -> Result<String, Failure> {
        self.client.require_readiness().await?;
        pull::ensure(&self.client, &self.wanted.image, &self.pod).await
    }

    /// Brings the container up and returns its id.
    async fn start(&self, image: String, timings: &mut Timings) -> Result<String, Failure> {
        let mut runtime = self.client.runtime.clone();
        let request = RunPodSandboxRequest {
            config: Some(self.pod.clone()),
            ..Default::default()
        };
        let pod = runtime
            .run_pod_sandbox(request)
            .await
            .map_err(|status| Failure::call("start the pod", &status))?
            .into_inner()
            .pod_sandbox_id;
        let parts = match self.wanted.timings {
            true => timings::of_start(
                &self
                    .client
                    .pod_info(&pod, "info")
                    .await?
                    .unwrap_or_default(),
            ),
            false => String::new(),
        };
        timings.end("pod", parts);
        let request = CreateContainerRequest {
            pod_sandbox_id: pod,
            config: Some(self.container(image)),
            sandbox_config: Some(self.pod.clone()),
        };
        let container = runtime
            .create_container(request)
            .await
            .map_err(|status| Failure::call("make the container", &status))?
            .into_inner()
            .container_id;
        timings.end("create", String::new());
        let request = StartContainerRequest {
            container_id: container.clone(),
        };
        if let Err(status) = runtime.start_container(request).await {
            let failure = Failure::call("start the container", &status);
            let end = self.client.container(&container).await.ok();
            return Err(Failure {
                status: start_status(end.as_ref(), &status),
                ..failure
            });
        }
        timings.end("start", String::new());
        Ok(container)
    }

    fn container(&self, image: String) -> ContainerConfig {
        let envs = self.wanted.env.iter();
        ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: "main".to_owned(),
                attempt: 0,
            }),
            image: Some(ImageSpec {
                image,
                user_specified_image: self.wanted.image.clone(),
                ..ImageSpec::default()
            }),
            args: self.wanted.command.clone(),
            envs: envs
                .map(|(key, value)| KeyValue {
                    key: key.clone(),
                    value: value.clone(),
                })
                .collect(),
            log_path: LOG.to_owned(),
            linux: Some(LinuxContainerConfig {
                resources: Some(self.wanted.resources()),
                security_context: Some(LinuxContainerSecurityContext {
                    // RuntimeDefault.
                    seccomp: Some(SecurityProfile::default()),
                    ..LinuxContainerSecurityContext::default()
                }),
            }),
            ..ContainerConfig::default()
        }
    }

    /// Copies the container's output until it ends, and passes signals on as requests to end.
    async fn follow(
        &self,
        container: &str,
        log: &mut Log,
        signals: &mut Signals,
    ) -> Result<u8, Failure> {
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut stop = None;
        let mut asked = 0;
        let mut seen = Instant::now();
        loop {
            tokio::select! {
                changed = log.changed() => changed.map_err(Failure::own)?,
                number = signals.next() => {
                    tracing::debug!(number, "stopping the container");
                    let grace = if asked == 0 { GRACE_SECONDS } else { 0 };
                    asked += 1;
                    stop = Some(Box::pin(self.stop(container, grace)));
                }
                stopped = wait_for(&mut stop) => {
                    stop = None;
                    stopped?;
                }
                _ = look.tick() => match self.client.container(container).await {
                    Ok(status) if status.state() == ContainerState::ContainerExited => {
                        if let Err(end) = log.show() {
                            return end;
                        }
                        if let Some(why) = notable_end(&status) {
                            eprintln!("bulkhead: the container has ended: {why}");
                        }
                        return Ok(u8::try_from(status.exit_code).unwrap_or(u8::MAX));
                    }
                    Ok(_) => seen = Instant::now(),
                    Err(failure) if seen.elapsed() > AWAY_LIMIT => return Err(failure),
                    Err(_) => {}
                },
            }
            if let Err(end) = log.show() {
                return end;
            }
        }
    }

    /// Copies what is new; what to end with, when it cannot.
    async fn stop(&self, container: &str, timeout: i64) -> Result<(), Failure> {
        let request = StopContainerRequest {
            container_id: container.to_owned(),
            timeout,
        };
        let answer = self.client.runtime.clone().stop_container(request).await;
        answer
            .map(|_| ())
            .map_err(|status| Failure::call("stop the container", &status))
    }

    /// Removes what this command made; what it never made is no failure.
    async fn remove(&self) {
        let mut runtime = self.client.runtime.clone();
        let filter = PodSandboxFilter {
            label_selector: [(LABEL.to_owned(), self.identity.clone())].into(),
            ..PodSandboxFilter::default()
        };
        let request = ListPodSandboxRequest {
            filter: Some(filter),
        };
        let failure = match runtime.list_pod_sandbox(request).await {
            Err(status) => Some(Failure::call("look for the pod to remove", &status)),
            Ok(answer) => {
                let mut failure = None;
                for pod in answer.into_inner().items {
                    let request = RemovePodSandboxRequest {
                        pod_sandbox_id: pod.id.clone(),
                    };
                    if let Err(status) = runtime.remove_pod_sandbox(request).await {
                        let what = format!("remove pod {}", pod.id);
                        failure = Some(Failure::call(what, &status));
                    }
                }
                failure
            }
        };
        if let Some(failure) = failure {
            eprintln!("bulkhead: {failure}");
        }
    }
}

/// The future's result; never, when there is none.
async fn wait_for<F: Future + Unpin>(future: &mut Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

/// The signals that ask a command to end.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Signals {
    fn open() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// The number of the next one.
    async fn next(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => 2,
            _ = self.terminate.recv() => 15,
            _ = self.hangup.recv() => 1,
        }
    }
}

/// Why a container has ended, when its exit status does not tell: nobody asked it to.
fn notable_end(end: &ContainerStatus) -> Option<String> {
    match (end.reason.as_str(), end.message.as_str()) {
        ("Completed" | "Error", "") => None,
        ("Completed" | "Error", message) => Some(message.to_owned()),
        (reason, "") => Some(reason.to_owned()),
        (reason, message) => Some(format!("{reason}: {message}")),
    }
}

/// The exit status for a container that did not start: 126 or 127 if that was its command's
/// fault, as shells have it.
fn start_status(end: Option<&ContainerStatus>, status: &tonic::Status) -> u8 {
    let code = end.and_then(|end| u8::try_from(end.exit_code).ok());
    if let Some(code @ (NOT_EXECUTABLE | NOT_FOUND)) = code {
        return code;
    }
    let message = status.message().to_lowercase();
    if message.contains("no such file") || message.contains("not found") {
        NOT_FOUND
    } else if message.contains("permission denied") || message.contains("exec format") {
        NOT_EXECUTABLE
    } else {
        super::failure::OWN
    }
}

/// A directory for logs that a server on this host can write to and only we can read.
fn shared_logs() -> io::Result<PathBuf> {
    use std::os::unix::fs::DirBuilderExt;
    let place = std::env::var_os("TMPDIR").filter(|place| !place.is_empty());
    let place = place.map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    let directory = place.join(format!("bulkhead-logs-{}", random_name()?));
    std::fs::DirBuilder::new().mode(0o700).create(&directory)?;
    Ok(directory)
}

/// Twelve hexadecimal digits nobody can guess.
pub fn random_name() -> io::Result<String> {
    let mut bytes = [0_u8; 6];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_that_fails_has_the_shells_exit_status() {
        let says = |message: &str| tonic::Status::failed_precondition(message);
        assert_eq!(
            start_status(None, &says("/x: No such file or directory")),
            127
        );
        assert_eq!(start_status(None, &says("/x: Permission denied")), 126);
        assert_eq!(start_status(None, &says("the guest is gone")), 125);
        let end = ContainerStatus {
            exit_code: 127,
            ..ContainerStatus::default()
        };
        assert_eq!(start_status(Some(&end), &says("")), 127);
    }
}

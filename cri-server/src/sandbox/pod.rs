//! A pod as others see it: a view to read, and a task to ask.

use std::sync::Arc;
use std::time::Duration;

use bulkhead_agent_api::v1::{
    SignalRequest, StatsRequest, StatsResponse, UsageRequest, UsageResponse, WaitRequest,
};
use bulkhead_cri_api::v1 as cri;
use bulkhead_vmm_api::InterfaceCounters;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};

use super::SandboxError;
use super::boot::{Live, Phases};
use super::host::{Host, new_id};
use super::owner::{Answer, Request};
use super::record::{Container, Record};
use super::state::{ContainerState, PodState};
use crate::container::attach::{self, Terms};
use crate::container::exec::{self, Command, Output};
use crate::container::spec::exec_process;
use crate::deadline::{Deadline, Passed};
use crate::guest::Guest;
use crate::streaming::{Outcome, Session};
use crate::vm;

/// Linux' number of the signal that cannot be caught.
pub const KILL: u32 = 9;
/// How long a killed container's end, its log included, is awaited.
const END: Duration = Duration::from_secs(30);

/// How long a program of the pod may take to have a connection.
const FORWARD: Duration = Duration::from_secs(20);
/// How long the guest may take to tell figures.
const FIGURES: Duration = Duration::from_secs(2);

/// A pod's owner task.
#[derive(Debug, Clone)]
pub struct Pod {
    id: String,
    requests: mpsc::Sender<Request>,
    view: watch::Receiver<Arc<View>>,
}

/// A pod at one moment.
#[derive(Debug)]
pub struct View {
    record: Record,
    live: Option<Arc<Live>>,
}

impl View {
    /// What is to be seen of `record`, and its guest while it runs.
    pub(super) fn new(record: Record, live: Option<Arc<Live>>) -> Self {
        Self { record, live }
    }

    /// The pod's record.
    pub(crate) fn record(&self) -> &Record {
        &self.record
    }

    /// Whether anybody knows of the pod yet.
    pub fn is_known(&self) -> bool {
        self.record.state != PodState::Starting
    }

    /// Whether it runs.
    pub fn is_ready(&self) -> bool {
        matches!(self.record.state, PodState::Ready { .. })
    }

    /// How long the pod's start took, if this server has started it.
    pub fn phases(&self) -> Option<Phases> {
        self.live.as_ref()?.phases
    }

    fn container(&self, id: &str) -> Result<&Container, SandboxError> {
        let container = self.record.containers.get(id);
        container.ok_or_else(|| SandboxError::no_container(id))
    }

    fn live(&self) -> Result<&Arc<Live>, SandboxError> {
        self.live.as_ref().ok_or_else(|| SandboxError::NotReady {
            id: self.record.id.clone(),
            reason: match &self.record.state {
                PodState::NotReady { reason } => reason.clone(),
                PodState::Starting => "it is starting".to_owned(),
                PodState::Ready { .. } => "its guest is not connected".to_owned(),
            },
        })
    }
}

impl Pod {
    pub(super) fn new(
        id: String,
        requests: mpsc::Sender<Request>,
        view: watch::Receiver<Arc<View>>,
    ) -> Self {
        Self { id, requests, view }
    }

    /// The pod's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The pod as it is now.
    pub fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.borrow())
    }

    /// Ends the pod and gives back what it holds; its record stays (CRI `StopPodSandbox`).
    pub async fn stop(&self) -> Result<(), SandboxError> {
        match self.ask(Request::Stop).await {
            // Removed is more than stopped.
            Err(SandboxError::Gone(_)) => Ok(()),
            other => other,
        }
    }

    /// Ends the pod and forgets it (CRI `RemovePodSandbox`).
    pub async fn remove(&self) -> Result<(), SandboxError> {
        match self.ask(Request::Remove).await {
            Err(SandboxError::Gone(_)) => Ok(()),
            other => other,
        }
    }

    /// Makes a container and returns its id.
    pub async fn create_container(
        &self,
        config: cri::ContainerConfig,
        deadline: Deadline,
    ) -> Result<String, SandboxError> {
        let config = Box::new(config);
        self.ask(|reply| Request::Create(config, deadline, reply))
            .await
    }

    /// Starts a container that was made.
    pub async fn start_container(
        &self,
        id: String,
        deadline: Deadline,
    ) -> Result<(), SandboxError> {
        self.ask(|reply| Request::Start(id, deadline, reply)).await
    }

    /// Changes limits of a container; what is zero or empty stays.
    pub async fn update_container(
        &self,
        id: String,
        asked: cri::LinuxContainerResources,
        deadline: Deadline,
    ) -> Result<(), SandboxError> {
        let asked = Box::new(asked);
        self.ask(|reply| Request::Update(id, asked, deadline, reply))
            .await
    }

    /// Changes limits of the pod; what is zero or empty stays.
    pub async fn update(
        &self,
        overhead: cri::LinuxContainerResources,
        resources: cri::LinuxContainerResources,
        deadline: Deadline,
    ) -> Result<(), SandboxError> {
        let asked = Box::new([overhead, resources]);
        self.ask(|reply| Request::UpdatePod(asked, deadline, reply))
            .await
    }

    /// The end of the guest's console, while the pod's VM is there or its end is not dealt with.
    pub async fn console(&self, host: &Host) -> Option<String> {
        let limit = Deadline::after(FIGURES);
        if let Ok(live) = self.view().live() {
            return Some(live.vm.console_tail(new_id().ok()?, limit).await);
        }
        let file = host.vm_files(&self.id).exit_record;
        let read = tokio::task::spawn_blocking(move || vm::exit_record(&file));
        Some(read.await.ok()??.console_tail)
    }

    /// What the guest's agent takes for itself; nothing when it does not say so at once.
    pub async fn usage(&self) -> Option<UsageResponse> {
        let live = Arc::clone(self.view().live().ok()?);
        let limit = Deadline::after(FIGURES);
        live.guest.usage(UsageRequest {}, limit).await.ok()
    }

    /// What the pod's containers and network have used, as its guest tells.
    pub async fn stats(&self) -> Result<StatsResponse, SandboxError> {
        let live = Arc::clone(self.view().live()?);
        let limit = Deadline::after(FIGURES);
        Ok(live.guest.stats(StatsRequest {}, limit).await?)
    }

    /// What the VM's network interfaces have moved; nothing when the VMM does not say so at once.
    pub async fn interfaces(&self) -> Vec<InterfaceCounters> {
        let view = self.view();
        let (Ok(live), Ok(id)) = (view.live(), new_id()) else {
            return Vec::new();
        };
        live.vm.interfaces(id, Deadline::after(FIGURES)).await
    }

    /// Asks a container to stop, and kills it after `grace`. One that does not run is left alone.
    pub async fn stop_container(&self, id: &str, grace: Duration) -> Result<(), SandboxError> {
        if self.view().container(id)?.state == ContainerState::Created {
            let id = id.to_owned();
            self.ask(|reply| Request::Settle(id, reply)).await?;
        }
        let view = self.view();
        let container = view.container(id)?;
        if !matches!(container.state, ContainerState::Running { .. }) {
            return Ok(());
        }
        if !grace.is_zero() {
            let grace = Deadline::after(grace);
            self.signal(&view, id, container.stop_signal, false).await?;
            if grace.bound(self.ended(id)).await.is_ok() {
                return Ok(());
            }
        }
        self.signal(&view, id, KILL, true).await?;
        let end = Deadline::after(END).bound(self.ended(id)).await;
        end.map_err(|Passed| SandboxError::Unkillable(id.to_owned()))
    }

    /// Removes a container, killing it first.
    pub async fn remove_container(&self, id: &str) -> Result<(), SandboxError> {
        self.stop_container(id, Duration::ZERO).await?;
        let remove = || self.ask(|reply| Request::RemoveContainer(id.to_owned(), reply));
        match remove().await {
            // The guest is still about to start it: nobody waits for that any more.
            Err(SandboxError::Guest(error))
                if error.code() == Some(tonic::Code::FailedPrecondition) => {}
            other => return other,
        }
        let view = self.view();
        self.signal(&view, id, KILL, true).await?;
        let request = WaitRequest {
            container_id: id.to_owned(),
            exec_id: String::new(),
        };
        let ended = view.live()?.guest.wait(request, Deadline::after(END)).await;
        if let Err(error) = ended {
            tracing::debug!(container = %id, %error, "a container's end is not told");
        }
        remove().await
    }

    /// Makes a container's log anew.
    pub async fn reopen_log(&self, id: String) -> Result<(), SandboxError> {
        self.ask(|reply| Request::ReopenLog(id, reply)).await
    }

    /// Runs a command in a running container to its end (CRI `ExecSync`). When the caller gives
    /// up, the command is killed.
    pub async fn exec(
        &self,
        id: &str,
        line: &[String],
        limit: Deadline,
    ) -> Result<Output, SandboxError> {
        let (guest, command) = self.command(id, line, false)?;
        Ok(exec::run(guest, command, limit).await?)
    }

    /// Refuses a command that cannot be run, as far as that is known without running it.
    pub fn check_exec(&self, id: &str, line: &[String]) -> Result<(), SandboxError> {
        self.command(id, line, false).map(drop)
    }

    /// Runs a command in a running container for a client (CRI `Exec`).
    pub async fn exec_for(
        &self,
        id: &str,
        line: &[String],
        terminal: bool,
        session: Session,
    ) -> Outcome {
        match self.command(id, line, terminal) {
            Ok((guest, command)) => exec::attend(guest, command, session).await,
            Err(error) => Outcome::Failed(error.to_string()),
        }
    }

    fn command(
        &self,
        id: &str,
        line: &[String],
        terminal: bool,
    ) -> Result<(Arc<Guest>, Command), SandboxError> {
        let view = self.view();
        let container = view.container(id)?;
        running(container)?;
        let command = Command {
            container_id: id.to_owned(),
            exec_id: new_id()?,
            process: exec_process(&container.process, line, terminal)?,
        };
        Ok((Arc::clone(&view.live()?.guest), command))
    }

    /// Refuses a container that does not run.
    pub fn check_attach(&self, id: &str) -> Result<(), SandboxError> {
        running(self.view().container(id)?)
    }

    /// Joins a client with a running container until one of them ends (CRI `Attach`).
    pub async fn attach_for(&self, id: &str, session: Session) -> Outcome {
        let view = self.view();
        let prepared = async {
            let config = &view.container(id)?.config;
            let terms = Terms {
                id: id.to_owned(),
                stdin_once: config.stdin_once,
                terminal: config.tty,
            };
            let guest = Arc::clone(&view.live()?.guest);
            let asked = self.ask(|reply| Request::Attach(id.to_owned(), reply));
            Ok::<_, SandboxError>((asked.await?, guest, terms))
        };
        match prepared.await {
            Ok((attachment, guest, terms)) => {
                attach::attend(attachment, guest, terms, session).await
            }
            Err(error) => Outcome::Failed(error.to_string()),
        }
    }

    /// Refuses a pod that is not ready.
    pub fn check_forward(&self) -> Result<(), SandboxError> {
        self.view().live().map(drop)
    }

    /// A connection to a port of the pod's loopback (CRI `PortForward`).
    pub async fn forward(&self, port: u16) -> Result<UnixStream, SandboxError> {
        let guest = Arc::clone(&self.view().live()?.guest);
        Ok(guest.forward(port, Deadline::after(FORWARD)).await?)
    }

    async fn signal(
        &self,
        view: &View,
        id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), SandboxError> {
        let request = SignalRequest {
            operation_id: new_id()?,
            container_id: id.to_owned(),
            exec_id: String::new(),
            signal,
            all,
        };
        let sent = view
            .live()?
            .guest
            .signal(request, Deadline::after(END))
            .await;
        match sent {
            Ok(_) => Ok(()),
            // It has just ended, or its VM has: its end will be seen.
            Err(error) if error.lost() => Ok(()),
            Err(error) if error.code() == Some(tonic::Code::NotFound) => Ok(()),
            Err(error) if error.code() == Some(tonic::Code::FailedPrecondition) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until the container runs no more or does not exist.
    async fn ended(&self, id: &str) {
        let mut view = self.view.clone();
        let over = |view: &Arc<View>| {
            let container = view.record.containers.get(id);
            container.is_none_or(|container| !container.state.lives())
        };
        // The owner has ended: nothing runs any more.
        let _ = view.wait_for(over).await;
    }

    async fn ask<T>(&self, request: impl FnOnce(Answer<T>) -> Request) -> Result<T, SandboxError> {
        let (reply, answer) = oneshot::channel();
        let sent = self.requests.send(request(reply)).await;
        sent.map_err(|_| SandboxError::gone(&self.id))?;
        answer.await.map_err(|_| SandboxError::gone(&self.id))?
    }
}

/// Refuses a container that does not run.
pub fn running(container: &Container) -> Result<(), SandboxError> {
    let state = match container.state {
        ContainerState::Running { .. } => return Ok(()),
        ContainerState::Creating | ContainerState::Created => "created",
        ContainerState::Exited(_) => "exited",
    };
    Err(SandboxError::WrongState {
        id: container.id.clone(),
        state,
        needed: "running",
    })
}

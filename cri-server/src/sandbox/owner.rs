//! The task that owns a pod.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_agent_api::v1;
use bulkhead_cri_api::v1 as cri;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::MissedTickBehavior;
use tracing::Instrument;

use super::boot::{Ground, Live};
use super::host::{self, Host, new_id};
use super::pod::{KILL, Pod, View};
use super::record::Record;
use super::state::{ContainerState, PodState};
use super::{Place, SandboxError, Views};
use crate::container::attach::{Attachment, Outlet};
use crate::deadline::Deadline;
use crate::guest::Guest;
use crate::image::Lease;
use crate::vm::{self, Ended, Vm};

/// Requests that wait for the owner, at most; further callers wait.
const QUEUE: usize = 64;
/// How long the guest may take to end its containers and to sync when the pod is stopped.
const CONTAINERS_END: Duration = Duration::from_secs(10);
const GUEST_END: Duration = Duration::from_secs(5);
/// How often the guest is told the time.
const CLOCK: Duration = Duration::from_secs(60);

/// Where a caller waits.
pub type Answer<T> = oneshot::Sender<Result<T, SandboxError>>;

/// What the owner is asked.
#[derive(Debug)]
pub enum Request {
    /// Make a container.
    Create(Box<cri::ContainerConfig>, Deadline, Answer<String>),
    /// Start one.
    Start(String, Deadline, Answer<()>),
    /// Find out whether one was started whose start was not answered.
    Settle(String, Answer<()>),
    /// Change the limits of one.
    Update(
        String,
        Box<cri::LinuxContainerResources>,
        Deadline,
        Answer<()>,
    ),
    /// Change the limits of the pod: overhead, resources.
    UpdatePod(Box<[cri::LinuxContainerResources; 2]>, Deadline, Answer<()>),
    /// Remove one that does not run.
    RemoveContainer(String, Answer<()>),
    /// Make a log anew.
    ReopenLog(String, Answer<()>),
    /// Let a client watch one and type into it.
    Attach(String, Answer<Attachment>),
    /// End the pod.
    Stop(Answer<()>),
    /// End and forget the pod.
    Remove(Answer<()>),
}

/// What the owner's own tasks tell it.
#[derive(Debug)]
pub enum Event {
    /// A container's program has ended and its log is written.
    Exited {
        /// The container.
        id: String,
        /// How it ended; a sentence if the guest could not say.
        exit: Result<v1::Exit, String>,
    },
}

/// A pod, owned.
pub struct Owner {
    pub(super) host: Arc<Host>,
    pub(super) record: Record,
    pub(super) live: Option<Arc<Live>>,
    /// By container id, while they run.
    pub(super) outlets: HashMap<String, Outlet>,
    /// What keeps the images of this pod from being removed, by image id.
    pub(super) leases: HashMap<String, Lease>,
    pub(super) report: mpsc::Sender<Event>,
    events: mpsc::Receiver<Event>,
    requests: mpsc::Receiver<Request>,
    views: Views,
    /// Given back when the owner ends.
    _place: Place,
}

impl Owner {
    /// Starts a new pod; `reply` is told when it is ready or has failed.
    pub(super) fn start(
        host: Arc<Host>,
        record: Record,
        place: Place,
        deadline: Deadline,
        reply: Answer<String>,
    ) -> Pod {
        // The caller's, though the owner outlives the call.
        let span = tracing::info_span!("boot", sandbox = %record.id);
        let (mut owner, pod) = Self::new(host, record, place);
        tokio::spawn(async move {
            let id = owner.record.id.clone();
            match owner.boot(deadline).instrument(span).await {
                Ok(()) => match reply.send(Ok(id.clone())) {
                    Ok(()) => owner.run().await,
                    Err(_) => {
                        tracing::info!(sandbox = %id, "nobody waits for the pod any more");
                        owner.vanish().await;
                    }
                },
                Err(error) => {
                    tracing::warn!(sandbox = %id, %error, "a pod has failed to start");
                    let left = owner.vanish().await;
                    // The caller may be gone.
                    let _ = reply.send(Err(error));
                    if left {
                        // It is listed as not ready and can be removed.
                        owner.run().await;
                    }
                }
            }
        });
        pod
    }

    /// Takes up a pod of an earlier server.
    pub(super) async fn take_up(
        host: Arc<Host>,
        record: Record,
        place: Place,
    ) -> Result<Pod, SandboxError> {
        let (mut owner, pod) = Self::new(host, record, place);
        owner.reconnect().await;
        tokio::spawn(async move {
            // Nobody was told of a pod that was starting.
            if owner.record.state == PodState::Starting && !owner.vanish().await {
                return;
            }
            owner.run().await;
        });
        Ok(pod)
    }

    fn new(host: Arc<Host>, record: Record, place: Place) -> (Self, Pod) {
        let (requests_sender, requests) = mpsc::channel(QUEUE);
        let (report, events) = mpsc::channel(QUEUE);
        let view = Arc::new(View::new(record.clone(), None));
        let (views, seen) = watch::channel(view);
        let pod = Pod::new(record.id.clone(), requests_sender, seen);
        let owner = Self {
            host,
            record,
            live: None,
            outlets: HashMap::new(),
            leases: HashMap::new(),
            report,
            events,
            requests,
            views,
            _place: place,
        };
        (owner, pod)
    }

    async fn boot(&mut self, deadline: Deadline) -> Result<(), SandboxError> {
        let live = self.ground().boot(deadline).await?;
        self.live = Some(Arc::new(live));
        self.publish();
        Ok(())
    }

    fn ground(&mut self) -> Ground<'_> {
        Ground {
            host: &self.host,
            record: &mut self.record,
        }
    }

    /// Takes a pod down of which nobody knows. Returns whether something of it is left, for which
    /// the pod stays as one that is not ready.
    async fn vanish(&mut self) -> bool {
        self.live = None;
        let taken_down = self.ground().tear_down().await;
        let removed = match taken_down {
            Ok(()) => self
                .host
                .records
                .remove(&self.record.id)
                .await
                .map_err(Into::into),
            Err(error) => Err(error),
        };
        let Err(error) = removed else {
            return false;
        };
        tracing::error!(sandbox = %self.record.id, %error, "a failed pod is not cleaned up");
        self.record.state = PodState::NotReady {
            reason: format!("it failed to start and could not be cleaned up: {error}"),
        };
        self.commit().await;
        true
    }

    /// Connects to the VMM of a ready pod; a pod without one is not ready.
    async fn reconnect(&mut self) {
        let PodState::Ready { vmm, agent, .. } = self.record.state.clone() else {
            return;
        };
        let lost = match self.adopt(&vmm, &agent).await {
            Ok(live) => {
                self.live = Some(Arc::new(live));
                self.resume_containers().await;
                self.publish();
                return;
            }
            Err(reason) => reason,
        };
        tracing::warn!(sandbox = %self.record.id, reason = %lost, "a pod was lost");
        self.lose(lost).await;
    }

    async fn adopt(&self, vmm: &vm::Process, agent: &str) -> Result<Live, String> {
        let (sender, streams) = mpsc::channel(vm::WAITING_STREAMS);
        let files = self.host.vm_files(&self.record.id);
        let ended = |files: &vm::Files| match vm::exit_record(&files.exit_record) {
            Some(record) => format!("while no server ran, {}", record.reason),
            None => "its VMM ended while no server ran".to_owned(),
        };
        if self.record.boot != self.host.boot {
            return Err("the machine was restarted".to_owned());
        }
        let vm = Vm::adopt(vmm.clone(), files.clone(), bulkhead_agent_api::PORT, sender).await;
        let vm = vm.map_err(|error| error.to_string())?;
        let vm = vm.ok_or_else(|| ended(&files))?;
        let guest = Arc::new(Guest::new(self.record.secret, true, streams));
        let limit = Deadline::after(self.host.config.vm.boot_timeout());
        let identity = guest
            .identify(limit)
            .await
            .map_err(|error| error.to_string())?;
        if identity.boot_id != agent {
            return Err("another guest answers in its place".to_owned());
        }
        Ok(Live {
            vm,
            guest,
            phases: None,
        })
    }

    /// Serves the pod until it is removed or the server ends.
    async fn run(mut self) {
        let mut clock = tokio::time::interval(CLOCK);
        clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let live = self.live.clone();
            let ended = async {
                match &live {
                    Some(live) => live.vm.wait().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                Some(event) = self.events.recv() => self.event(event).await,
                ended = ended => self.vm_ended(ended).await,
                _ = clock.tick() => self.set_time(),
                request = self.requests.recv() => match request {
                    None => return,
                    Some(Request::Remove(reply)) => {
                        let removed = self.remove().await;
                        let over = removed.is_ok();
                        if over {
                            // The place is given back before the caller hears of it.
                            drop(self);
                            let _ = reply.send(removed);
                            return;
                        }
                        let _ = reply.send(removed);
                    }
                    Some(request) => self.request(request).await,
                },
            }
        }
    }

    /// Callers that have gone away are told nothing; what they asked for was done.
    async fn request(&mut self, request: Request) {
        match request {
            Request::Create(config, deadline, reply) => {
                let created = self.create_container(*config, deadline).await;
                let _ = reply.send(created);
            }
            Request::Start(id, deadline, reply) => {
                let _ = reply.send(self.start_container(&id, deadline).await);
            }
            Request::Settle(id, reply) => {
                let _ = reply.send(self.settle_container(&id).await);
            }
            Request::Update(id, asked, deadline, reply) => {
                let _ = reply.send(self.update_container(&id, &asked, deadline).await);
            }
            Request::UpdatePod(asked, deadline, reply) => {
                let [overhead, resources] = *asked;
                let _ = reply.send(self.update_pod(&overhead, &resources, deadline).await);
            }
            Request::RemoveContainer(id, reply) => {
                let _ = reply.send(self.remove_container(&id).await);
            }
            Request::ReopenLog(id, reply) => {
                let _ = reply.send(self.reopen_log(&id).await);
            }
            Request::Attach(id, reply) => {
                let _ = reply.send(self.attach_to(&id));
            }
            Request::Stop(reply) | Request::Remove(reply) => {
                let _ = reply.send(self.stop().await);
            }
        }
    }

    async fn event(&mut self, event: Event) {
        let Event::Exited { id, exit } = event;
        self.outlets.remove(&id);
        let Some(container) = self.record.containers.get_mut(&id) else {
            return;
        };
        match exit {
            Ok(exit) => {
                let lost = exit.lost_bytes;
                let message = match lost {
                    0 => String::new(),
                    lost => format!("{lost} bytes of its output were lost"),
                };
                let finished_at = exit.finished_at_nanoseconds;
                let state = &mut container.state;
                state.exit(finished_at, exit.code, exit.oom_killed, message);
            }
            Err(reason) => {
                let message = format!("the pod's VM is gone: {reason}");
                container.state.lose(host::now(), message);
            }
        }
        self.place_again().await;
        self.commit().await;
    }

    /// Tells the guest the time; nobody waits for it.
    fn set_time(&self) {
        let Some(live) = self.live.clone() else {
            return;
        };
        let id = self.record.id.clone();
        // Bounded by its deadline.
        tokio::spawn(async move {
            let request = v1::SetTimeRequest {
                wall_clock_nanoseconds: host::now(),
            };
            if let Err(error) = live
                .guest
                .set_time(request, Deadline::after(GUEST_END))
                .await
            {
                tracing::debug!(sandbox = %id, %error, "the guest's clock is not set");
            }
        });
    }

    async fn vm_ended(&mut self, ended: Ended) {
        tracing::warn!(
            sandbox = %self.record.id, reason = %ended.reason, console = %ended.console_tail,
            "a VM has ended"
        );
        self.live = None;
        // What the containers wrote last is on its way through their streams, which have ended.
        self.drain_events(CONTAINERS_END).await;
        self.lose(ended.reason).await;
    }

    /// The pod's VM is gone.
    async fn lose(&mut self, reason: String) {
        self.outlets.clear();
        for container in self.record.containers.values_mut() {
            let message = format!("the pod's VM is gone: {reason}");
            container.state.lose(host::now(), message);
        }
        self.record.state = PodState::NotReady { reason };
        self.commit().await;
    }

    /// Takes in the ends of running containers, for at most `patience`.
    async fn drain_events(&mut self, patience: Duration) {
        let patience = Deadline::after(patience);
        while self
            .record
            .containers
            .values()
            .any(|container| matches!(container.state, ContainerState::Running { .. }))
        {
            match patience.bound(self.events.recv()).await {
                Ok(Some(event)) => self.event(event).await,
                _ => return,
            }
        }
    }

    async fn stop(&mut self) -> Result<(), SandboxError> {
        if let Some(live) = self.live.clone() {
            self.kill_containers(&live).await?;
            let operation = new_id()?;
            let limit = Deadline::after(GUEST_END);
            let request = v1::ShutdownRequest {
                operation_id: operation.clone(),
            };
            if let Err(error) = live.guest.shutdown(request, limit).await {
                tracing::debug!(sandbox = %self.record.id, %error, "the guest did not shut down");
            }
            live.vm
                .shut_down(operation, Deadline::after(GUEST_END))
                .await?;
            self.live = None;
            self.drain_events(CONTAINERS_END).await;
        }
        if !matches!(self.record.state, PodState::NotReady { .. }) {
            self.lose("it was stopped".to_owned()).await;
        }
        self.leases.clear();
        self.record.disks.clear();
        self.ground().tear_down().await?;
        self.publish();
        Ok(())
    }

    async fn kill_containers(&mut self, live: &Live) -> Result<(), SandboxError> {
        let running: Vec<String> = self
            .record
            .containers
            .values()
            .filter(|container| matches!(container.state, ContainerState::Running { .. }))
            .map(|container| container.id.clone())
            .collect();
        for id in &running {
            let request = v1::SignalRequest {
                operation_id: new_id()?,
                container_id: id.clone(),
                exec_id: String::new(),
                signal: KILL,
                all: true,
            };
            let limit = Deadline::after(GUEST_END);
            if let Err(error) = live.guest.signal(request, limit).await {
                tracing::debug!(container = %id, %error, "a container was not killed");
            }
        }
        self.drain_events(CONTAINERS_END).await;
        Ok(())
    }

    async fn remove(&mut self) -> Result<(), SandboxError> {
        self.stop().await?;
        self.host.records.remove(&self.record.id).await?;
        self.host.events.tell_deleted(&self.views.borrow());
        Ok(())
    }

    /// Writes the record and shows it. A record that cannot be written is shown all the same: what
    /// happened has happened.
    pub(super) async fn commit(&mut self) {
        if let Err(error) = self.host.records.save(&self.record).await {
            tracing::error!(%error, "a pod's record is out of date");
        }
        self.publish();
    }

    pub(super) fn publish(&self) {
        let view = Arc::new(View::new(self.record.clone(), self.live.clone()));
        let before = self.views.send_replace(Arc::clone(&view));
        self.host.events.tell(&before, &view);
    }
}

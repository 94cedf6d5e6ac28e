//! What the owner does with containers.

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use bulkhead_agent_api::v1;
use bulkhead_cri_api::v1 as cri;

use super::SandboxError;
use super::boot::{Live, blocking};
use super::host::{self, new_id};
use super::image::{self, Resolved};
use super::output::{Streams, outlet};
use super::owner::Owner;
use super::pod::running;
use super::record::{Container, Disk, User};
use super::state::{ContainerState, PodState};
use crate::container::attach::Attachment;
use crate::container::file::Copied;
use crate::container::log::{Log, Offsets};
use crate::container::spec::{self, Plan, SpecError};
use crate::container::{file, seccomp, signal};
use crate::deadline::Deadline;

impl Owner {
    /// Makes a container in the guest, held before its program.
    pub(super) async fn create_container(
        &mut self,
        config: cri::ContainerConfig,
        deadline: Deadline,
    ) -> Result<String, SandboxError> {
        let live = self.live()?;
        let metadata = config.metadata.clone().unwrap_or_default();
        if metadata.name.is_empty() {
            return Err(SpecError::Invalid {
                field: "metadata.name",
                reason: "it is empty".to_owned(),
            }
            .into());
        }
        let mut others = self.record.containers.values();
        if let Some(other) = others.find(|other| other.config.metadata == config.metadata) {
            return Err(SandboxError::NameTaken {
                name: format!("{} attempt {}", metadata.name, metadata.attempt),
                holder: other.id.clone(),
            });
        }
        let reference = config.image.clone().unwrap_or_default().image;
        let image = image::resolve(&self.host.images, &reference).await?;
        let mut plan = spec::plan(&config, &self.record.config, &image.defaults)?;
        let linux = config.linux.clone().unwrap_or_default();
        let limits = linux.resources.unwrap_or_default();
        self.fits_the_vm(&Default::default(), &limits)?;
        if let Some(path) = plan.profile.take() {
            let read = path.clone();
            let text = blocking(move || Ok(seccomp::read(&read)?)).await?;
            plan.confine(&path, &text)?;
        }
        if let Some(target) = &plan.pid_target {
            self.check_target(target)?;
        }
        let log_path = log_path(&self.record.config.log_directory, &config.log_path)?;
        let (files, copies) = self.files(&plan).await?;
        let stop_signal = signal::stop(config.stop_signal(), image.stop_signal.as_deref());
        let (image_id, image_ref) = (image.id.clone(), image.reference.clone());
        let image_serial = self.attach(&live, image, deadline).await?;

        let id = new_id()?;
        let request = v1::CreateContainerRequest {
            operation_id: format!("create-{id}"),
            container_id: id.clone(),
            spec: serde_json::to_vec(&plan.spec)
                .map_err(|error| SandboxError::Broken(error.to_string()))?,
            image_serial,
            stdin: config.stdin,
            files,
            strict_groups: plan.strict_groups,
            pid_target: plan.pid_target.unwrap_or_default(),
        };
        let container = Container {
            id: id.clone(),
            created_at: host::now(),
            stop_signal,
            config,
            image_id,
            image_ref,
            process: plan.spec.process().clone().unwrap_or_default(),
            user: None,
            log_path,
            copies,
            state: ContainerState::Creating,
        };
        self.lift_for(&limits, deadline).await?;
        self.place(&id, &limits).await?;
        self.record.containers.insert(id.clone(), container);
        self.host.records.save(&self.record).await?;
        match live.guest.create_container(request, deadline).await {
            Ok(created) => {
                if let Some(container) = self.record.containers.get_mut(&id) {
                    // Further processes run as the same ids, whatever becomes of the names.
                    let mut user = container.process.user().clone();
                    user.set_uid(created.uid)
                        .set_gid(created.gid)
                        .set_additional_gids(Some(created.supplementary_gids.clone()))
                        .set_username(None);
                    container.process.set_user(user);
                    container.user = Some(User {
                        uid: created.uid,
                        gid: created.gid,
                        groups: created.supplementary_gids,
                    });
                    container.state = ContainerState::Created;
                }
                self.commit().await;
                Ok(id)
            }
            Err(error) => {
                forget(&live, &id).await;
                self.record.containers.remove(&id);
                self.place_again().await;
                self.commit().await;
                Err(error.into())
            }
        }
    }

    /// Only a running container of the same pod has a PID namespace to join.
    fn check_target(&self, target: &str) -> Result<(), SandboxError> {
        let reason = match self.record.containers.get(target) {
            None => format!("the pod has no container {target}"),
            Some(container) if !matches!(container.state, ContainerState::Running { .. }) => {
                format!("the container {target} does not run")
            }
            Some(_) => return Ok(()),
        };
        Err(SpecError::Invalid {
            field: "namespace_options.target_id",
            reason,
        }
        .into())
    }

    /// The files to be made in the guest, and those of the host among them that may be written.
    async fn files(&self, plan: &Plan) -> Result<(Vec<v1::File>, Vec<Copied>), SandboxError> {
        let mounted = plan.files.clone();
        let read = move || {
            let read: Result<Vec<_>, _> = mounted.iter().map(file::read).collect();
            Ok(read?)
        };
        let (mut files, copies): (Vec<_>, Vec<_>) = blocking(read).await?.into_iter().unzip();
        let copies = file::seen(&files, copies);
        let identity = file::identity(
            &files,
            &self.record.hostname,
            &self.record.state.addresses(),
        );
        files.extend(identity);
        Ok((files, copies))
    }

    /// Makes sure that the image's disk is in the VM; returns the disk's serial.
    async fn attach(
        &mut self,
        live: &Live,
        image: Resolved,
        deadline: Deadline,
    ) -> Result<String, SandboxError> {
        let serial = image.serial.clone();
        if !self.record.disks.contains_key(&image.id) {
            let device = image.open().await?;
            // The disk may have been here before: not the same operation.
            let operation = new_id()?;
            let window = live.vm.attach(operation.clone(), device, deadline).await?;
            let request = v1::AttachDiskRequest {
                operation_id: operation.clone(),
                window: window.into(),
                serial: serial.clone(),
            };
            if let Err(error) = live.guest.attach_disk(request, deadline).await {
                let undo = format!("{operation}-undo");
                if let Err(error) = live.vm.detach(undo, window, deadline).await {
                    tracing::warn!(window, %error, "a window stays occupied");
                }
                return Err(error.into());
            }
            let disk = Disk {
                serial: serial.clone(),
                window,
            };
            self.record.disks.insert(image.id.clone(), disk);
        }
        self.leases.insert(image.id, image.lease);
        Ok(serial)
    }

    /// Lets a container's program run.
    pub(super) async fn start_container(
        &mut self,
        id: &str,
        deadline: Deadline,
    ) -> Result<(), SandboxError> {
        let live = self.live()?;
        let container = self.record.containers.get(id);
        let container = container.ok_or_else(|| SandboxError::no_container(id))?;
        let state = match container.state {
            ContainerState::Created => None,
            ContainerState::Creating => Some("not made yet"),
            ContainerState::Running { .. } => Some("running"),
            ContainerState::Exited(_) => Some("exited"),
        };
        if let Some(state) = state {
            return Err(SandboxError::WrongState {
                id: id.to_owned(),
                state,
                needed: "created",
            });
        }
        let created_at = container.created_at;
        let terminal = container.config.tty;
        let copies = container.copies.clone();
        let log = Log::open(self.host.log_place(&self.record.id, container)).await?;
        let offsets = Offsets::default();
        let streams = Streams::open(&live, id, terminal, offsets, copies, deadline).await?;
        let started = live.guest.start_container(start(id), deadline).await;
        let Some(container) = self.record.containers.get_mut(id) else {
            return Err(SandboxError::no_container(id));
        };
        match started {
            Ok(started) => {
                container.state = ContainerState::Running {
                    // The guest's clock may lag behind the host's.
                    started_at: started.started_at_nanoseconds.max(created_at),
                };
                let outlet = outlet(&self.host, &live, container, log);
                self.outlets.insert(id.to_owned(), outlet.clone());
                self.commit().await;
                let report = self.report.clone();
                tokio::spawn(streams.follow(live, id.to_owned(), outlet, report));
                Ok(())
            }
            Err(error) => {
                let refused = error.code() == Some(tonic::Code::FailedPrecondition);
                if refused {
                    container
                        .state
                        .fail_to_start(host::now(), error.to_string());
                    self.commit().await;
                }
                Err(error.into())
            }
        }
    }

    /// Asks the guest about a container whose start it may have carried out without its answer having
    /// come, and takes up one that it has started.
    pub(super) async fn settle_container(&mut self, id: &str) -> Result<(), SandboxError> {
        let state = |owner: &Self| Some(owner.record.containers.get(id)?.state.clone());
        let (Some(ContainerState::Created), Ok(live)) = (state(self), self.live()) else {
            return Ok(());
        };
        let limit = Deadline::after(self.host.config.vm.boot_timeout());
        let listed = live
            .guest
            .list_containers(v1::ListContainersRequest {}, limit);
        let listed = listed.await?.containers;
        let found = listed.iter().find(|listed| listed.container_id == id);
        let exited = match found.map(v1::ContainerState::state) {
            Some(v1::container_state::State::Running) => false,
            Some(v1::container_state::State::Exited) => true,
            _ => return Ok(()),
        };
        let started = live.guest.start_container(start(id), limit).await;
        let Some(container) = self.record.containers.get_mut(id) else {
            return Ok(());
        };
        match started {
            Err(error) if exited && error.code() == Some(tonic::Code::FailedPrecondition) => {
                let message = error.to_string();
                container.state.fail_to_start(host::now(), message);
            }
            started => {
                // The guest may have forgotten its answer; that the program runs it has said.
                let started_at = started.map_or(host::now(), |it| it.started_at_nanoseconds);
                container.state = ContainerState::Running {
                    started_at: started_at.max(container.created_at),
                };
                self.follow_again(id, &live).await;
            }
        }
        self.commit().await;
        Ok(())
    }

    /// Follows a running container that nobody follows, whatever of its output can be had.
    async fn follow_again(&mut self, id: &str, live: &Arc<Live>) {
        let Some(container) = self.record.containers.get(id) else {
            return;
        };
        let resumed = Log::resume(self.host.log_place(&self.record.id, container)).await;
        let (log, offsets) = match resumed {
            Ok(resumed) => resumed,
            // Only a thread that died.
            Err(error) => return tracing::error!(container = %id, %error, "it is not followed"),
        };
        let (terminal, copies) = (container.config.tty, container.copies.clone());
        let outlet = outlet(&self.host, live, container, log);
        self.outlets.insert(id.to_owned(), outlet.clone());
        let (live, id, report) = (Arc::clone(live), id.to_owned(), self.report.clone());
        tokio::spawn(async move {
            let streams = Streams::open_again(&live, &id, terminal, offsets, copies).await;
            streams.follow(live, id, outlet, report).await;
        });
    }

    /// Takes up the containers of a guest that an earlier server has left.
    pub(super) async fn resume_containers(&mut self) {
        let Ok(live) = self.live() else {
            return;
        };
        let ids: Vec<String> = self.record.containers.keys().cloned().collect();
        for id in ids {
            let Some(container) = self.record.containers.get(&id) else {
                continue;
            };
            match container.state {
                ContainerState::Creating => {
                    forget(&live, &id).await;
                    self.record.containers.remove(&id);
                }
                ContainerState::Running { .. } => self.follow_again(&id, &live).await,
                ContainerState::Created => {
                    if let Err(error) = self.settle_container(&id).await {
                        tracing::warn!(container = %id, %error, "it may have been started");
                    }
                }
                ContainerState::Exited(_) => {}
            }
        }
        self.place_again().await;
        let images: Vec<String> = self.record.disks.keys().cloned().collect();
        for image in images {
            match image::keep_again(&self.host.images, &image).await {
                Ok(lease) => drop(self.leases.insert(image, lease)),
                Err(error) => tracing::warn!(%error, "the image of a running pod is gone"),
            }
        }
    }

    /// Forgets a container that does not run; one that is unknown is as good as removed.
    pub(super) async fn remove_container(&mut self, id: &str) -> Result<(), SandboxError> {
        let Some(container) = self.record.containers.get(id) else {
            return Ok(());
        };
        if matches!(container.state, ContainerState::Running { .. }) {
            return Err(SandboxError::WrongState {
                id: id.to_owned(),
                state: "running",
                needed: "stopped",
            });
        }
        if let Ok(live) = self.live() {
            let request = v1::RemoveContainerRequest {
                operation_id: new_id()?,
                container_id: id.to_owned(),
            };
            let limit = Deadline::after(self.host.config.vm.boot_timeout());
            match live.guest.remove_container(request, limit).await {
                Err(error) if error.code() != Some(tonic::Code::NotFound) => {
                    return Err(error.into());
                }
                _ => {}
            }
        }
        let image_id = container.image_id.clone();
        let record = self.host.log_place(&self.record.id, container).record;
        // It goes with the pod's directory at the latest.
        let _ = blocking(move || Ok(std::fs::remove_file(record))).await;
        self.record.containers.remove(id);
        self.place_again().await;
        self.detach(&image_id).await;
        self.commit().await;
        Ok(())
    }

    /// Takes the image's disk out of the VM if no container uses it any more. Where that fails the
    /// disk stays, for the next container of the image.
    async fn detach(&mut self, image_id: &str) {
        let mut containers = self.record.containers.values();
        if containers.any(|container| container.image_id == image_id) {
            return;
        }
        let (Ok(live), Some(disk)) = (self.live(), self.record.disks.get(image_id)) else {
            return;
        };
        let limit = Deadline::after(self.host.config.vm.boot_timeout());
        let detached = async {
            let operation = new_id()?;
            let request = v1::DetachDiskRequest {
                operation_id: operation.clone(),
                window: disk.window.into(),
                serial: disk.serial.clone(),
            };
            live.guest.detach_disk(request, limit).await?;
            // The guest has let go: whatever the VMM says, the disk is not to be used again.
            if let Err(error) = live.vm.detach(operation, disk.window, limit).await {
                tracing::warn!(window = disk.window, %error, "a window stays occupied");
            }
            Ok::<_, SandboxError>(())
        };
        match detached.await {
            Ok(()) => {
                self.record.disks.remove(image_id);
                self.leases.remove(image_id);
            }
            Err(error) => tracing::warn!(image = %image_id, %error, "a disk is not detached"),
        }
    }

    /// A running container's output from now on, and its input.
    pub(super) fn attach_to(&self, id: &str) -> Result<Attachment, SandboxError> {
        let container = self.record.containers.get(id);
        running(container.ok_or_else(|| SandboxError::no_container(id))?)?;
        let outlet = self.outlets.get(id);
        let missing = || SandboxError::Broken(format!("nobody follows the container {id}"));
        Ok(outlet.ok_or_else(missing)?.attach())
    }

    /// Makes a running container's log anew.
    pub(super) async fn reopen_log(&mut self, id: &str) -> Result<(), SandboxError> {
        let container = self.record.containers.get(id);
        running(container.ok_or_else(|| SandboxError::no_container(id))?)?;
        match self.outlets.get(id) {
            Some(outlet) => Ok(outlet.log.reopen().await?),
            None => Ok(()),
        }
    }

    pub(super) fn live(&self) -> Result<Arc<Live>, SandboxError> {
        self.live.clone().ok_or_else(|| SandboxError::NotReady {
            id: self.record.id.clone(),
            reason: match &self.record.state {
                PodState::NotReady { reason } => reason.clone(),
                _ => "its guest is not connected".to_owned(),
            },
        })
    }
}

/// The agent starts a container once. What it answered stays true, and an answer that was lost is
/// given again to the same request.
fn start(id: &str) -> v1::StartContainerRequest {
    v1::StartContainerRequest {
        operation_id: format!("start-{id}"),
        container_id: id.to_owned(),
    }
}

/// Removes what a failed creation may have left in the guest.
async fn forget(live: &Live, id: &str) {
    let Ok(operation_id) = new_id() else {
        return;
    };
    let request = v1::RemoveContainerRequest {
        operation_id,
        container_id: id.to_owned(),
    };
    let limit = Deadline::after(std::time::Duration::from_secs(10));
    if let Err(error) = live.guest.remove_container(request, limit).await {
        tracing::debug!(container = %id, %error, "nothing of a failed container to remove");
    }
}

/// `log_path` below `log_directory`; none if either is empty (CRI `ContainerConfig.log_path`).
fn log_path(directory: &str, path: &str) -> Result<Option<PathBuf>, SandboxError> {
    if directory.is_empty() || path.is_empty() {
        return Ok(None);
    }
    let below = Path::new(path)
        .components()
        .all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if !below || !directory.starts_with('/') {
        return Err(SpecError::Invalid {
            field: "log_path",
            reason: format!("{path:?} is not a path below the log directory {directory:?}"),
        }
        .into());
    }
    Ok(Some(Path::new(directory).join(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_stays_below_its_directory() {
        assert_eq!(log_path("", "0.log").unwrap(), None);
        assert_eq!(log_path("/logs", "").unwrap(), None);
        let expected = Some(PathBuf::from("/logs/c/0.log"));
        assert_eq!(log_path("/logs", "c/0.log").unwrap(), expected);
        assert!(log_path("/logs", "../0.log").is_err());
        assert!(log_path("/logs", "/etc/passwd").is_err());
    }
}

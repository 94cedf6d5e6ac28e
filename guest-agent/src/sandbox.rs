//! The pod's own state: what Prepare sets up, the containers, and the end of all.

mod files;
mod forward;
mod prepare;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bulkhead_agent_api::v1::{
    ChangedFilesResponse, CreateContainerRequest, File, InterfaceStats, PrepareRequest,
};
use bulkhead_agent_api::{Greeting, Purpose, Secret};
use rustix::time::{ClockId, Timespec};
use tokio::sync::{OnceCell, Semaphore, watch};

use crate::container::apart::Apart;
use crate::container::plan::{self, Place, Places};
use crate::container::spec::{Resources, Spec};
use crate::container::{
    self, Cgroup, Container, ContainerError, Endpoint, LaunchError, NewContainer, State,
    Surroundings, device, layer, off, pause, user,
};
use crate::dial::Dialer;
use crate::disk::{DiskError, Disks};
use crate::network::{self, NetworkError};
use crate::reap::Reaper;

pub use files::Copied;

/// Most containers of a pod, those that exited among them.
const MOST_CONTAINERS: usize = 512;

/// Why the pod is not as the host wants it.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// Not at this time.
    #[error("{0}")]
    State(String),
    /// The kernel refused.
    #[error("cannot {what}: {source}")]
    Step {
        /// The step, as the rest of a sentence.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A stream to the host.
    #[error("{0}")]
    Stream(#[from] crate::stdio::StreamError),
    /// The host does not take the agent's dial.
    #[error("cannot dial the host: {0}")]
    Dial(io::Error),
    /// The network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A container.
    #[error(transparent)]
    Container(#[from] ContainerError),
}

impl From<LaunchError> for SandboxError {
    fn from(error: LaunchError) -> Self {
        Self::Container(error.into())
    }
}

fn step<T, E: Into<io::Error>>(what: &str, done: Result<T, E>) -> Result<T, SandboxError> {
    done.map_err(|source| SandboxError::Step {
        what: what.to_owned(),
        source: source.into(),
    })
}

/// The wall clock, in nanoseconds since 1970.
pub fn now_nanoseconds() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| i64::try_from(now.as_nanos()).unwrap_or(i64::MAX))
}

/// What Prepare leaves for containers.
#[derive(Debug)]
struct Prepared {
    resolv_conf: String,
    /// The pod's own namespaces, if it has any.
    apart: Option<Arc<Apart>>,
    /// The PID namespace of the containers that make none of their own.
    pids: OnceCell<Arc<OwnedFd>>,
}

impl Prepared {
    async fn pids(&self) -> Result<Arc<OwnedFd>, ContainerError> {
        let made = self.pids.get_or_try_init(async || {
            let namespace = off(pause::start).await??;
            Ok::<_, ContainerError>(Arc::new(namespace))
        });
        made.await.map(Arc::clone)
    }
}

/// A container's ids in effect.
#[derive(Debug)]
pub struct Created {
    /// Number of the held process.
    pub pid: i32,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// The pod.
#[derive(Debug)]
pub struct Sandbox {
    surroundings: Surroundings,
    dialer: Arc<Dialer>,
    disks: Disks,
    preparing: AtomicBool,
    prepared: OnceLock<Prepared>,
    // Held to look up and insert only. `None`: being made.
    containers: Mutex<BTreeMap<String, Option<Container>>>,
    /// Connections that may still be forwarded.
    forwards: Arc<Semaphore>,
}

impl Sandbox {
    /// Starts the pod's tasks.
    pub fn start(reaper: Reaper, dialer: Arc<Dialer>, attended: watch::Receiver<bool>) -> Self {
        Self {
            surroundings: Surroundings { reaper, attended },
            dialer,
            disks: Disks::start(),
            preparing: AtomicBool::new(false),
            prepared: OnceLock::new(),
            containers: Mutex::default(),
            forwards: Arc::new(Semaphore::new(forward::MOST)),
        }
    }

    /// The pod's disks.
    pub fn disks(&self) -> &Disks {
        &self.disks
    }

    /// Makes the pod ready for its first container. A failure leaves it unready for good: the
    /// host ends the VM.
    pub async fn prepare(&self, request: PrepareRequest) -> Result<(), SandboxError> {
        if self.preparing.swap(true, Ordering::Relaxed) {
            return Err(SandboxError::State(
                "the sandbox was prepared before".into(),
            ));
        }
        self.disks.scratch(request.scratch_serial.clone()).await?;
        if !request.resources.is_empty() {
            let limits = plan::read_resources(&request.resources).map_err(ContainerError::from)?;
            limit_pod(limits).await?;
        }
        let shared_pids = request.shared_pid_namespace;
        let prepared = off(move || prepare::prepare(request)).await??;
        if shared_pids {
            prepared.pids().await?;
        }
        self.prepared
            .set(prepared)
            .map_err(|_| SandboxError::State("the sandbox was prepared before".into()))
    }

    fn list(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Option<Container>>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// A container by its id.
    pub fn container(&self, id: &str) -> Result<Container, ContainerError> {
        let known = self.list().get(id).cloned().flatten();
        known.ok_or_else(|| ContainerError::NotFound(format!("no container {id}")))
    }

    /// Every container, by id.
    pub fn containers(&self) -> Vec<(String, Container)> {
        let list = self.list();
        let all = list
            .iter()
            .filter_map(|(id, known)| Some((id.clone(), known.clone()?)));
        all.collect()
    }

    /// The figures of the interfaces that are the pod's.
    pub async fn interfaces(&self) -> Vec<InterfaceStats> {
        let apart = self
            .prepared
            .get()
            .and_then(|prepared| prepared.apart.clone());
        let figures = off(move || match apart {
            Some(apart) => apart
                .inside(|| Ok::<_, LaunchError>(network::figures()))
                .unwrap_or_default(),
            None => network::figures(),
        });
        figures.await.unwrap_or_default()
    }

    /// Makes a container with its process held before its exec; on failure nothing of it stays.
    pub async fn create(&self, request: CreateContainerRequest) -> Result<Created, SandboxError> {
        let id = request.container_id.clone();
        check_id("container id", &id)?;
        self.reserve(&id)?;
        let done = self.make(request).await;
        if done.is_err() {
            let _ = self.disks.release(id.clone()).await;
        }
        let mut list = self.list();
        match done {
            Ok((container, created)) => {
                list.insert(id, Some(container));
                Ok(created)
            }
            Err(error) => {
                list.remove(&id);
                Err(error)
            }
        }
    }

    fn reserve(&self, id: &str) -> Result<(), ContainerError> {
        let mut list = self.list();
        if list.contains_key(id) {
            return Err(ContainerError::Exists(format!("container {id} exists")));
        }
        if list.len() >= MOST_CONTAINERS {
            return Err(ContainerError::Exhausted(format!(
                "the pod has {MOST_CONTAINERS} containers"
            )));
        }
        list.insert(id.to_owned(), None);
        Ok(())
    }

    async fn make(
        &self,
        request: CreateContainerRequest,
    ) -> Result<(Container, Created), SandboxError> {
        let prepared = self
            .prepared
            .get()
            .ok_or_else(|| SandboxError::State("the sandbox is not prepared yet".into()))?;
        let id = request.container_id.clone();
        let image = self
            .disks
            .image(request.image_serial.clone(), id.clone())
            .await?;
        let spec = plan::read_spec(&request.spec).map_err(ContainerError::from)?;
        let pids = match request.pid_target.as_str() {
            "" if plan::own_pids(&spec) => None,
            "" => Some(prepared.pids().await?),
            target => Some(self.container(target)?.init().await?),
        };
        let resolv_conf = prepared.resolv_conf.clone();
        let apart = prepared.apart.clone();
        let (new, created) =
            off(move || set_out(request, spec, image, apart, pids, &resolv_conf)).await??;
        let (cgroup, id) = (new.cgroup.clone(), new.id.clone());
        match Container::create(new, self.surroundings.clone()).await {
            Ok((container, pid)) => Ok((container, Created { pid, ..created })),
            Err(error) => {
                // What cannot be removed now stays; why the container cannot be made says more.
                let _ = container::discard(cgroup, id).await;
                Err(error.into())
            }
        }
    }

    /// Changes limits of a container, or of the group around all of them when `id` is empty.
    pub async fn update(
        &self,
        id: &str,
        resources: &[u8],
        oom_score: Option<i32>,
    ) -> Result<(), SandboxError> {
        let resources = plan::read_resources(resources).map_err(ContainerError::from)?;
        if let Some(score) = oom_score.filter(|score| !(-1000..=1000).contains(score)) {
            let what = format!("oom_score_adj {score} is not within -1000 and 1000");
            return Err(SandboxError::Invalid(what));
        }
        match id {
            "" => limit_pod(resources).await,
            id => Ok(self.container(id)?.update(resources, oom_score).await?),
        }
    }

    /// What a container that has ended has written to the files made for it.
    pub async fn changed_files(&self, id: &str) -> Result<ChangedFilesResponse, SandboxError> {
        let container = self.container(id)?;
        let (State::Exited(_), _) = container.state().await? else {
            let what = format!("container {id} has not exited");
            return Err(SandboxError::State(what));
        };
        Ok(off(move || files::changed(container.copies())).await?)
    }

    /// Removes a container that does not run.
    pub async fn remove(&self, id: &str) -> Result<(), SandboxError> {
        match self.container(id)?.remove().await {
            // Its owner has ended in an earlier removal, which failed later.
            Ok(()) | Err(ContainerError::NotFound(_)) => {}
            Err(error) => return Err(error.into()),
        }
        self.disks.release(id.to_owned()).await?;
        self.list().remove(id);
        Ok(())
    }

    /// Dials the host and joins the stream with one end of a process's stdio.
    pub async fn open(
        &self,
        endpoint: Endpoint,
        token: u64,
        offset: u64,
    ) -> Result<(), SandboxError> {
        let greeting = |purpose, offset| Greeting {
            purpose,
            secret: Secret::NONE,
            token,
            offset,
        };
        match endpoint {
            Endpoint::Output(opening) => {
                let offset = opening.seek(offset).await?;
                let stream = self.dialer.open(greeting(Purpose::Output, offset)).await;
                opening
                    .feed(stream.map_err(SandboxError::Dial)?, offset)
                    .await?;
            }
            Endpoint::Input(opening) => {
                let stream = self.dialer.open(greeting(Purpose::Input, 0)).await;
                let stream = stream.map_err(SandboxError::Dial)?;
                let closed = || SandboxError::State("stdin is closed".into());
                opening.send(stream).await.map_err(|_| closed())?;
            }
        }
        Ok(())
    }

    /// Ends every process of the pod and puts the disks away.
    pub async fn shut_down(&self) -> Result<(), SandboxError> {
        let kill = format!("{}/cgroup.kill", container::cgroup::POD);
        step("kill the pod's processes", fs::write(kill, "1"))?;
        for (_, container) in self.containers() {
            // Bounded by the drain of the output, which the server ends early by fetching it.
            let _ = tokio::time::timeout(Duration::from_secs(2), container.wait(None)).await;
        }
        Ok(self.disks.finish().await?)
    }
}

async fn limit_pod(resources: Resources) -> Result<(), SandboxError> {
    let done = off(move || Cgroup::pod().update(&resources)).await?;
    Ok(done.map_err(ContainerError::from)?)
}

/// Sets the wall clock, in nanoseconds since 1970.
pub fn set_time(nanoseconds: i64) -> Result<(), SandboxError> {
    const SECOND: i64 = 1_000_000_000;
    if nanoseconds <= 0 {
        return Err(SandboxError::Invalid(
            "the wall clock must lie after 1970".into(),
        ));
    }
    let time = Timespec {
        tv_sec: nanoseconds / SECOND,
        tv_nsec: nanoseconds % SECOND,
    };
    step(
        "set the clock",
        rustix::time::clock_settime(ClockId::Realtime, time),
    )
}

/// Makes sure that an id can be a file's name, whatever it is told to be (`what`).
pub fn check_id(what: &str, id: &str) -> Result<(), SandboxError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    // Dots only would be another directory; a controller's file has a dot after its name.
    let sound = (1..=128).contains(&id.len()) && !id.contains('.') && id.chars().all(plain);
    match sound {
        true => Ok(()),
        false => Err(SandboxError::Invalid(format!(
            "{what} {id:?} must be 1 to 128 letters, digits, dashes or underscores"
        ))),
    }
}

/// Works out and makes what a container needs before its process.
fn set_out(
    request: CreateContainerRequest,
    mut spec: Spec,
    image: String,
    apart: Option<Arc<Apart>>,
    pids: Option<Arc<OwnedFd>>,
    resolv_conf: &str,
) -> Result<(NewContainer, Created), SandboxError> {
    let id = request.container_id;
    if let Some(process) = &mut spec.process {
        let merge = !request.strict_groups;
        user::resolve(&mut process.user, &image, merge).map_err(ContainerError::from)?;
    }
    let scratch = layer::place(&id).to_string_lossy().into_owned();
    let home = layer::files(&id).to_string_lossy().into_owned();
    let mut files = request.files;
    let brought = |path: &str| {
        spec.mounts.iter().any(|mount| mount.destination == path)
            || files.iter().any(|file| file.path == path)
    };
    if !resolv_conf.is_empty() && !brought("/etc/resolv.conf") {
        files.push(File {
            path: "/etc/resolv.conf".into(),
            content: resolv_conf.into(),
            mode: 0o644,
            ..File::default()
        });
    }
    let places = Places {
        cgroup: format!("{}/{id}", container::cgroup::POD),
        image: image.clone(),
        scratch,
        files: files
            .iter()
            .enumerate()
            .map(|(at, file)| (file.path.clone(), format!("{home}/{at}"), file.read_only))
            .collect(),
        shared_pids: pids.is_some(),
        mapping: apart.as_ref().map(|apart| apart.mapping.clone()),
    };
    // All that can be wrong with the request comes before anything is made.
    let plan = plan::container(&spec, &places).map_err(ContainerError::from)?;
    let created = Created {
        pid: 0,
        uid: plan.program.uid,
        gid: plan.program.gid,
        groups: plan.program.groups.clone(),
    };
    let resources = spec
        .linux
        .as_ref()
        .and_then(|linux| linux.resources.as_ref());
    let listed = resources.map(|resources| resources.devices.as_slice());
    let rules = device::rules(listed.unwrap_or_default()).map_err(ContainerError::from)?;
    if let Place::New { tree, .. } = &plan.place {
        device::check(&tree.devices).map_err(ContainerError::from)?;
    }
    let cgroup = Cgroup::create(&id, resources).map_err(ContainerError::from)?;
    let confined = step(
        "confine the container's devices",
        device::confine(&cgroup.path(), &rules),
    );
    let filled = confined
        .and_then(|()| step("make a place for the container's changes", layer::make(&id)))
        .and_then(|()| files::write(&home, &files, places.mapping.as_ref()));
    let copies = match filled {
        Ok(copies) => copies,
        Err(error) => {
            let _ = container::remove(&cgroup, &id);
            return Err(error);
        }
    };
    let new = NewContainer {
        id,
        plan,
        cgroup,
        image,
        apart,
        pids,
        stdin: request.stdin,
        copies,
    };
    Ok((new, created))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_id_is_one_directory() {
        assert!(check_id("container id", "0123abc_-").is_ok());
        for id in ["", "..", "a/b", "memory.max"] {
            assert!(check_id("container id", id).is_err(), "{id}");
        }
    }
}

//! The pods. Each has one owner task that alone changes its state and record; what is here only
//! finds the task, and reserves names.

mod boot;
mod ceiling;
mod container;
mod dns;
mod error;
mod event;
mod host;
mod image;
mod limit;
mod output;
mod owner;
mod place;
mod pod;
mod record;
mod scratch;
mod size;
mod state;
mod undo;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_cri_api::v1 as cri;
use tokio::sync::{oneshot, watch};

use crate::container::spec;
use crate::deadline::Deadline;
use record::Record;

pub use boot::Phases;
pub use error::SandboxError;
pub use event::{Event, Events, Lagged, Step};
pub use host::{Host, now};
pub use pod::{Pod, View};
pub use record::Container;
pub use state::{ContainerState, PodState};

/// The handler this runtime is known by; no handler means the same.
pub const HANDLER: &str = "bulkhead";
/// The longest id or name that is taken, in bytes.
const LONGEST_NAME: usize = 1024;

/// All pods of a server.
#[derive(Clone)]
pub struct Sandboxes {
    host: Arc<Host>,
    index: Arc<Mutex<Index>>,
}

/// What makes two pods the same to the kubelet.
type Name = (String, String, String, u32);

#[derive(Debug, Default)]
struct Index {
    names: HashMap<Name, String>,
    pods: BTreeMap<String, Pod>,
}

/// A pod's place in the index, given back when this is dropped.
#[derive(Debug)]
struct Place {
    index: Arc<Mutex<Index>>,
    name: Name,
    id: String,
}

impl Place {
    fn reserve(
        index: &Arc<Mutex<Index>>,
        metadata: &cri::PodSandboxMetadata,
        id: &str,
    ) -> Result<Self, SandboxError> {
        let name = (
            metadata.name.clone(),
            metadata.namespace.clone(),
            metadata.uid.clone(),
            metadata.attempt,
        );
        let mut locked = locked(index);
        if let Some(holder) = locked.names.get(&name) {
            return Err(SandboxError::NameTaken {
                name: format!("{}/{} attempt {}", name.1, name.0, name.3),
                holder: holder.clone(),
            });
        }
        locked.names.insert(name.clone(), id.to_owned());
        Ok(Self {
            index: Arc::clone(index),
            name,
            id: id.to_owned(),
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut locked = locked(&self.index);
        locked.names.remove(&self.name);
        locked.pods.remove(&self.id);
    }
}

impl Sandboxes {
    /// Takes up the pods that records tell of.
    pub async fn open(host: Arc<Host>) -> Result<Self, SandboxError> {
        let sandboxes = Self {
            host,
            index: Arc::default(),
        };
        for record in sandboxes.host.records.load().await? {
            let taken = match record {
                Ok(record) => sandboxes.take_up(record).await,
                Err(error) => Err(error.into()),
            };
            if let Err(error) = taken {
                // The evidence stays where it is.
                tracing::error!(%error, "a pod is not taken up");
            }
        }
        sandboxes.host.images.leases_complete().await?;
        Ok(sandboxes)
    }

    async fn take_up(&self, record: Record) -> Result<(), SandboxError> {
        let metadata = record.config.metadata.clone().unwrap_or_default();
        let place = Place::reserve(&self.index, &metadata, &record.id)?;
        owner::Owner::take_up(Arc::clone(&self.host), record, place)
            .await
            .map(|pod| self.enter(pod))
    }

    /// Makes a pod and waits until it is ready (CRI `RunPodSandbox`). If the caller goes away, the
    /// pod is taken down again.
    pub async fn run(
        &self,
        config: cri::PodSandboxConfig,
        handler: String,
        deadline: Deadline,
    ) -> Result<String, SandboxError> {
        if !handler.is_empty() && handler != HANDLER {
            return Err(SandboxError::Handler(handler));
        }
        let metadata = check(&config)?;
        let id = host::new_id()?;
        let place = Place::reserve(&self.index, &metadata, &id)?;
        let checked = Arc::clone(&self.host);
        boot::blocking(move || checked.ready().map_err(SandboxError::Unavailable)).await?;
        let record = Record::new(id.clone(), config, handler, &self.host.boot)?;
        let (reply, answer) = oneshot::channel();
        let pod = owner::Owner::start(Arc::clone(&self.host), record, place, deadline, reply);
        self.enter(pod);
        answer.await.map_err(|_| SandboxError::gone(&id))?
    }

    /// Every pod somebody knows of.
    pub fn list(&self) -> Vec<Arc<View>> {
        let locked = locked(&self.index);
        let views = locked.pods.values().map(Pod::view);
        views.filter(|view| view.is_known()).collect()
    }

    /// What the ready pods take of the host's memory, by their cgroups, in bytes.
    pub async fn memory(&self) -> u64 {
        let views = self.list();
        let ready = views.iter().filter(|view| view.is_ready());
        let groups = ready.filter_map(|view| {
            let record = view.record();
            Some(self.host.cgroup(&record.id, &record.config).ok()?.path())
        });
        let groups: Vec<_> = groups.collect();
        let read = move || {
            let sizes = groups.iter().map(|path| {
                let size = std::fs::read_to_string(path.join("memory.current")).ok()?;
                size.trim().parse::<u64>().ok()
            });
            // A pod that has just ended has none.
            sizes.flatten().sum()
        };
        tokio::task::spawn_blocking(read).await.unwrap_or_default()
    }

    /// The tasks of the pods somebody knows of.
    pub fn pods(&self) -> Vec<Pod> {
        let locked = locked(&self.index);
        let pods = locked.pods.values();
        pods.filter(|pod| pod.view().is_known()).cloned().collect()
    }

    /// The pod whose id is `id` or alone begins with it.
    pub fn pod(&self, id: &str) -> Option<Pod> {
        let locked = locked(&self.index);
        let pods = locked.pods.iter();
        unique(id, pods.filter(|(_, pod)| pod.view().is_known())).cloned()
    }

    /// The pod of the container whose id is `id` or alone begins with it, and the whole id.
    pub fn container(&self, id: &str) -> Option<(Pod, String)> {
        let locked = locked(&self.index);
        let all: Vec<(String, Pod)> = locked
            .pods
            .values()
            .flat_map(|pod| {
                let view = pod.view();
                let known = view.record().containers.values();
                let known = known.filter(|container| container.is_known());
                let ids: Vec<_> = known.map(|container| container.id.clone()).collect();
                ids.into_iter().map(|id| (id, pod.clone()))
            })
            .collect();
        let found = unique(id, all.iter().map(|(id, pod)| (id, (id, pod))))?;
        Some((found.1.clone(), found.0.clone()))
    }

    /// The machine.
    pub fn host(&self) -> &Arc<Host> {
        &self.host
    }

    fn enter(&self, pod: Pod) {
        let mut locked = locked(&self.index);
        // A start that failed at once has given its place back already.
        if locked.names.values().any(|holder| holder == pod.id()) {
            locked.pods.insert(pod.id().to_owned(), pod);
        }
    }
}

/// The value whose id is `id`, else the only one whose id begins with it.
fn unique<'a, T>(id: &str, values: impl Iterator<Item = (&'a String, T)>) -> Option<T> {
    let mut found = None;
    let mut several = false;
    for (candidate, value) in values {
        if candidate == id {
            return Some(value);
        }
        if !id.is_empty() && candidate.starts_with(id) {
            several |= found.is_some();
            found = Some(value);
        }
    }
    found.filter(|_| !several)
}

fn check(config: &cri::PodSandboxConfig) -> Result<cri::PodSandboxMetadata, SandboxError> {
    let metadata = config.metadata.clone().unwrap_or_default();
    let invalid = |field, reason: &str| {
        SandboxError::from(spec::SpecError::Invalid {
            field,
            reason: reason.to_owned(),
        })
    };
    if metadata.name.is_empty() {
        return Err(invalid("metadata.name", "it is empty"));
    }
    let names = [&metadata.name, &metadata.namespace, &metadata.uid];
    if names.iter().any(|name| name.len() > LONGEST_NAME) {
        return Err(invalid("metadata", "a name is longer than 1024 bytes"));
    }
    spec::check_pod(config)?;
    Ok(metadata)
}

fn locked(index: &Mutex<Index>) -> MutexGuard<'_, Index> {
    index.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What others see of a pod, replaced as a whole.
type Views = watch::Sender<Arc<View>>;

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(attempt: u32) -> cri::PodSandboxMetadata {
        cri::PodSandboxMetadata {
            name: "web".into(),
            uid: "u".into(),
            namespace: "n".into(),
            attempt,
        }
    }

    #[test]
    fn a_name_is_taken_until_its_place_is_given_back() {
        let index = Arc::default();
        let first = Place::reserve(&index, &metadata(0), "1").unwrap();
        let refusal = Place::reserve(&index, &metadata(0), "2").unwrap_err();
        assert!(matches!(refusal, SandboxError::NameTaken { holder, .. } if holder == "1"));
        let again = Place::reserve(&index, &metadata(1), "3").unwrap();
        drop(first);
        let second = Place::reserve(&index, &metadata(0), "2").unwrap();
        drop((second, again));
        assert!(locked(&index).names.is_empty());
    }

    #[test]
    fn an_id_can_be_shortened_while_it_is_the_only_one() {
        let ids = ["abc".to_owned(), "abd".to_owned(), "ab".to_owned()];
        let find = |id: &str| unique(id, ids.iter().map(|id| (id, id.as_str())));
        assert_eq!(find("abc"), Some("abc"));
        assert_eq!(find("ab"), Some("ab"));
        assert_eq!(find("a"), None);
        assert_eq!(find("abd"), Some("abd"));
        assert_eq!(find(""), None);
        assert_eq!(find("x"), None);
    }

    #[test]
    fn a_pod_without_a_name_is_refused() {
        assert!(check(&cri::PodSandboxConfig::default()).is_err());
        let named = cri::PodSandboxConfig {
            metadata: Some(metadata(0)),
            ..Default::default()
        };
        assert!(check(&named).is_ok());
    }
}

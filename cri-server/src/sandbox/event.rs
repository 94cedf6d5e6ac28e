//! What happens to pods and containers, told to whoever subscribes (CRI `GetContainerEvents`).

use std::sync::Arc;

use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, watch};

use super::host::now;
use super::pod::View;
use super::record::Record;
use super::state::{ContainerState, PodState};

/// Events that wait for the slowest subscriber, at most. One that lags further behind has lost
/// some, and is told so.
const WAITING: usize = 1024;

/// One step in a life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// It is there.
    Created,
    /// It runs.
    Started,
    /// It runs no more.
    Stopped,
    /// It is there no more.
    Deleted,
}

/// A step that a pod or a container has made.
#[derive(Debug, Clone)]
pub struct Event {
    /// The pod's or the container's id.
    pub id: String,
    /// The step.
    pub step: Step,
    /// Nanoseconds since 1970.
    pub at: i64,
    /// The pod afterwards; before, when it is deleted.
    pub view: Arc<View>,
}

/// Where events are told.
#[derive(Debug)]
pub struct Events {
    told: broadcast::Sender<Event>,
    over: watch::Sender<bool>,
}

impl Default for Events {
    fn default() -> Self {
        Self {
            told: broadcast::Sender::new(WAITING),
            over: watch::Sender::new(false),
        }
    }
}

/// All events from one moment on.
#[derive(Debug)]
pub struct Subscription {
    told: broadcast::Receiver<Event>,
    over: watch::Receiver<bool>,
}

/// The subscriber has read so slowly that this many events are lost to it.
#[derive(Debug, PartialEq, Eq)]
pub struct Lagged(pub u64);

impl Subscription {
    /// The next event; nothing once the server ends.
    pub async fn next(&mut self) -> Result<Option<Event>, Lagged> {
        tokio::select! {
            told = self.told.recv() => match told {
                Ok(event) => Ok(Some(event)),
                Err(RecvError::Lagged(lost)) => Err(Lagged(lost)),
                Err(RecvError::Closed) => Ok(None),
            },
            _ = self.over.wait_for(|over| *over) => Ok(None),
        }
    }
}

impl Events {
    /// All events from now on.
    pub fn subscribe(&self) -> Subscription {
        Subscription {
            told: self.told.subscribe(),
            over: self.over.subscribe(),
        }
    }

    /// Ends all subscriptions.
    pub fn end(&self) {
        self.over.send_replace(true);
    }

    /// Tells what has changed from one view of a pod to the next.
    pub(super) fn tell(&self, before: &View, after: &Arc<View>) {
        for (id, step) in steps(before.record(), after.record()) {
            self.send(id, step, after);
        }
    }

    /// Tells that a pod and its containers are no more.
    pub(super) fn tell_deleted(&self, last: &Arc<View>) {
        let record = last.record();
        let known = record.containers.values();
        for container in known.filter(|container| container.is_known()) {
            self.send(container.id.clone(), Step::Deleted, last);
        }
        self.send(record.id.clone(), Step::Deleted, last);
    }

    fn send(&self, id: String, step: Step, view: &Arc<View>) {
        // Nobody may listen.
        let _ = self.told.send(Event {
            id,
            step,
            at: now(),
            view: Arc::clone(view),
        });
    }
}

/// The steps between two states, each life's in their order. The pod's own surround those of its
/// containers.
fn steps(before: &Record, after: &Record) -> Vec<(String, Step)> {
    let of = |id: &str, from: Option<Step>, to: Option<Step>| {
        let all = [Step::Created, Step::Started, Step::Stopped];
        let passed = all
            .into_iter()
            .filter(move |&step| Some(step) > from && Some(step) <= to);
        let id = id.to_owned();
        passed.map(move |step| (id.clone(), step))
    };
    let (was, is) = (pod(&before.state), pod(&after.state));
    let never_ready = was.is_none() && is == Some(Step::Stopped);
    let ends = |&(_, step): &(String, Step)| step == Step::Stopped;
    let own = of(&after.id, was, is).filter(|(_, step)| !(never_ready && *step == Step::Started));
    let (end, mut all): (Vec<_>, Vec<_>) = own.partition(ends);
    for (id, container) in &after.containers {
        let before = before
            .containers
            .get(id)
            .and_then(|before| step(&before.state));
        let never_ran =
            matches!(&container.state, ContainerState::Exited(exit) if exit.started_at == 0);
        let passed = of(id, before, step(&container.state));
        all.extend(passed.filter(|(_, step)| !(never_ran && *step == Step::Started)));
    }
    for (id, container) in &before.containers {
        if container.is_known() && !after.containers.contains_key(id) {
            all.push((id.clone(), Step::Deleted));
        }
    }
    all.extend(end);
    all
}

/// The last step a pod has made; none while nobody knows of it.
fn pod(state: &PodState) -> Option<Step> {
    match state {
        PodState::Starting => None,
        PodState::Ready { .. } => Some(Step::Started),
        PodState::NotReady { .. } => Some(Step::Stopped),
    }
}

fn step(state: &ContainerState) -> Option<Step> {
    match state {
        ContainerState::Creating => None,
        ContainerState::Created => Some(Step::Created),
        ContainerState::Running { .. } => Some(Step::Started),
        ContainerState::Exited(_) => Some(Step::Stopped),
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_cri_api::v1 as cri;

    use super::super::record::Container;
    use super::super::state::Exit;
    use super::*;

    fn record(reason: Option<&str>, containers: Vec<(&str, ContainerState)>) -> Record {
        let mut record = Record::new(
            "pod".into(),
            cri::PodSandboxConfig::default(),
            String::new(),
            "b",
        )
        .unwrap();
        if let Some(reason) = reason {
            let reason = reason.to_owned();
            record.state = PodState::NotReady { reason };
        }
        for (id, state) in containers {
            let container = Container::sample(id, cri::ContainerConfig::default(), state);
            record.containers.insert(id.to_owned(), container);
        }
        record
    }

    fn exited(started_at: i64) -> ContainerState {
        ContainerState::Exited(Exit {
            started_at,
            finished_at: 9,
            code: 0,
            reason: String::new(),
            message: String::new(),
        })
    }

    #[test]
    fn each_step_is_told_once_and_in_order() {
        let running = || ContainerState::Running { started_at: 5 };
        let empty = record(None, vec![]);
        let creating = record(None, vec![("c", ContainerState::Creating)]);
        assert!(steps(&empty, &creating).is_empty());
        let created = record(None, vec![("c", ContainerState::Created)]);
        assert_eq!(steps(&creating, &created), [("c".into(), Step::Created)]);
        let runs = record(None, vec![("c", running())]);
        assert_eq!(steps(&created, &runs), [("c".into(), Step::Started)]);
        assert!(steps(&runs, &runs).is_empty());
        let over = record(None, vec![("c", exited(5))]);
        assert_eq!(steps(&runs, &over), [("c".into(), Step::Stopped)]);
        assert_eq!(steps(&over, &empty), [("c".into(), Step::Deleted)]);
        // What passed between two views is not lost.
        let passed = steps(&creating, &over).into_iter();
        let passed: Vec<Step> = passed.map(|(_, step)| step).collect();
        assert_eq!(passed, [Step::Created, Step::Started, Step::Stopped]);
    }

    #[test]
    fn a_container_that_never_ran_was_never_started() {
        let created = record(None, vec![("c", ContainerState::Created)]);
        let failed = record(None, vec![("c", exited(0))]);
        assert_eq!(steps(&created, &failed), [("c".into(), Step::Stopped)]);
    }

    #[test]
    fn a_pod_that_ends_is_told_after_its_containers() {
        let mut before = record(Some("x"), vec![("c", ContainerState::Created)]);
        before.state = PodState::Starting;
        let after = record(Some("gone"), vec![("c", exited(0))]);
        let told = steps(&before, &after);
        let both = |step| [("pod".to_owned(), step), ("c".to_owned(), step)];
        let [pod, container] = both(Step::Stopped);
        let [made, _] = both(Step::Created);
        assert_eq!(told, [made, container, pod]);
    }

    #[tokio::test]
    async fn a_subscriber_that_lags_is_told_and_others_are_not_kept_waiting() {
        let events = Events::default();
        let mut slow = events.subscribe();
        let view = Arc::new(View::new(record(None, vec![]), None));
        for _ in 0..=WAITING {
            events.tell_deleted(&view);
        }
        assert!(matches!(slow.next().await, Err(Lagged(1))));
        let mut fresh = events.subscribe();
        events.tell_deleted(&view);
        assert_eq!(fresh.next().await.unwrap().unwrap().step, Step::Deleted);
        events.end();
        assert!(fresh.next().await.unwrap().is_none());
    }
}

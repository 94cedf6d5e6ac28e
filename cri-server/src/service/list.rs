//! Lists: what passes a filter, and in messages of bounded size for the `Stream…` calls.

use std::collections::HashMap;

use bulkhead_cri_api::v1 as cri;
use tokio_stream::Iter;
use tonic::{Response, Status};

use super::translate;
use crate::sandbox::{Container, Sandboxes, View};

/// Things in one message: well below the largest message.
const THINGS: usize = 100;

/// The messages of one list.
pub type Parts<T> = Iter<std::vec::IntoIter<Result<T, Status>>>;

/// Puts a list into messages; an empty one into none.
pub fn in_parts<L, T>(list: Vec<L>, message: impl Fn(Vec<L>) -> T) -> Response<Parts<T>> {
    let mut rest = list.into_iter();
    let parts = std::iter::from_fn(|| {
        let part: Vec<L> = rest.by_ref().take(THINGS).collect();
        (!part.is_empty()).then(|| Ok(message(part)))
    });
    let parts: Vec<_> = parts.collect();
    Response::new(tokio_stream::iter(parts))
}

/// The pods that pass a filter.
pub fn pods(sandboxes: &Sandboxes, filter: &cri::PodSandboxFilter) -> Vec<cri::PodSandbox> {
    let pods = sandboxes.list();
    let pods = pods.iter().map(|view| translate::pod(view));
    pods.filter(|pod| pod_passes(pod, filter)).collect()
}

/// The containers that pass a filter.
pub fn containers(sandboxes: &Sandboxes, filter: &cri::ContainerFilter) -> Vec<cri::Container> {
    let mut containers = Vec::new();
    for view in sandboxes.list() {
        let of_pod = view.record().containers.values();
        let known = of_pod.filter(|container| container.is_known());
        let listed = known.map(|container| translate::container(&view, container));
        containers.extend(listed.filter(|one| container_passes(one, filter)));
    }
    containers
}

/// Whether a pod passes a filter; all its parts must agree.
fn pod_passes(pod: &cri::PodSandbox, filter: &cri::PodSandboxFilter) -> bool {
    pod.id.starts_with(&filter.id)
        && filter
            .state
            .as_ref()
            .is_none_or(|state| state.state == pod.state)
        && selected(&pod.labels, &filter.label_selector)
}

/// Whether a container passes a filter; all its parts must agree.
fn container_passes(container: &cri::Container, filter: &cri::ContainerFilter) -> bool {
    container.id.starts_with(&filter.id)
        && container.pod_sandbox_id.starts_with(&filter.pod_sandbox_id)
        && filter
            .state
            .as_ref()
            .is_none_or(|state| state.state == container.state)
        && selected(&container.labels, &filter.label_selector)
}

/// Whether a pod's figures are asked for; all parts of the filter must agree.
pub fn stats_of_pod(view: &View, filter: &cri::PodSandboxStatsFilter) -> bool {
    let record = view.record();
    record.id.starts_with(&filter.id) && selected(&record.config.labels, &filter.label_selector)
}

/// Whether a container's figures are asked for; all parts of the filter must agree.
pub fn stats_of_container(
    view: &View,
    container: &Container,
    filter: &cri::ContainerStatsFilter,
) -> bool {
    view.record().id.starts_with(&filter.pod_sandbox_id)
        && container.id.starts_with(&filter.id)
        && selected(&container.config.labels, &filter.label_selector)
}

fn selected(labels: &HashMap<String, String>, selector: &HashMap<String, String>) -> bool {
    selector
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}

#[cfg(test)]
mod tests {
    use tokio_stream::StreamExt;

    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs
            .iter()
            .map(|(k, v)| (k.to_string(), v.to_string()))
            .collect()
    }

    #[test]
    fn filters_combine() {
        let pod = cri::PodSandbox {
            id: "abcdef".into(),
            state: cri::PodSandboxState::SandboxNotready.into(),
            labels: labels(&[("app", "web"), ("tier", "1")]),
            ..Default::default()
        };
        let filter = cri::PodSandboxFilter {
            id: "abc".into(),
            state: Some(cri::PodSandboxStateValue { state: pod.state }),
            label_selector: labels(&[("app", "web")]),
        };
        assert!(pod_passes(&pod, &cri::PodSandboxFilter::default()));
        assert!(pod_passes(&pod, &filter));
        let ready = cri::PodSandboxStateValue {
            state: cri::PodSandboxState::SandboxReady.into(),
        };
        let other_state = cri::PodSandboxFilter {
            state: Some(ready),
            ..filter.clone()
        };
        assert!(!pod_passes(&pod, &other_state));
        let other_label = cri::PodSandboxFilter {
            label_selector: labels(&[("app", "db")]),
            ..filter
        };
        assert!(!pod_passes(&pod, &other_label));
    }

    #[test]
    fn a_container_is_found_by_its_pod() {
        let container = cri::Container {
            id: "c1".into(),
            pod_sandbox_id: "p1".into(),
            ..Default::default()
        };
        let of = |pod: &str| cri::ContainerFilter {
            pod_sandbox_id: pod.into(),
            ..Default::default()
        };
        assert!(container_passes(&container, &of("p1")));
        assert!(!container_passes(&container, &of("p2")));
    }

    #[tokio::test]
    async fn a_long_list_comes_in_several_messages_and_an_empty_one_in_none() {
        let parts = in_parts((0..250).collect(), |part| part).into_inner();
        let parts: Vec<Vec<i32>> = parts.map(Result::unwrap).collect().await;
        let lengths: Vec<usize> = parts.iter().map(Vec::len).collect();
        assert_eq!(lengths, [100, 100, 50]);
        assert_eq!(parts.concat(), (0..250).collect::<Vec<_>>());
        let mut none = in_parts(Vec::<i32>::new(), |part| part).into_inner();
        assert!(none.next().await.is_none());
    }
}

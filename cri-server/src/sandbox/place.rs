//! Where on the host a pod's VM runs: on the CPUs and memory nodes of its containers.
//!
//! The guest knows nothing of the host's CPUs, so what a container names (CRI `cpuset_cpus`,
//! `cpuset_mems`) applies to the VM: it runs on those that any of its containers names. Containers
//! that name none run where the others do, those that have exited do not count.

use std::collections::BTreeMap;

use bulkhead_cri_api::v1 as cri;

use super::SandboxError;
use super::boot::blocking;
use super::owner::Owner;
use super::record::Container;
use super::state::ContainerState;
use crate::cgroup::Places;
use crate::numbers::Numbers;

impl Owner {
    /// Moves the VM to where its containers may run, the container `id` being one with `limits`.
    pub(super) async fn place(
        &self,
        id: &str,
        limits: &cri::LinuxContainerResources,
    ) -> Result<(), SandboxError> {
        self.move_to(places(&self.record.containers, Some((id, limits))))
            .await
    }

    /// Moves the VM to where those containers may run that there are. Nobody waits for it: the
    /// next change of a container tries again.
    pub(super) async fn place_again(&self) {
        if self.live.is_none() {
            return;
        }
        if let Err(error) = self.move_to(places(&self.record.containers, None)).await {
            tracing::warn!(sandbox = %self.record.id, %error, "a VM runs on more or other CPUs");
        }
    }

    async fn move_to(&self, places: Places) -> Result<(), SandboxError> {
        let cgroup = self.host.cgroup(&self.record.id, &self.record.config)?;
        blocking(move || Ok(cgroup.confine(&places)?)).await
    }
}

fn places(
    containers: &BTreeMap<String, Container>,
    changed: Option<(&str, &cri::LinuxContainerResources)>,
) -> Places {
    let others = containers.values().filter(|container| {
        let exited = matches!(container.state, ContainerState::Exited(_));
        !exited && changed.is_none_or(|(id, _)| id != container.id)
    });
    let others = others.filter_map(|other| other.config.linux.as_ref()?.resources.as_ref());
    let mut places = Places::default();
    for limits in others.chain(changed.map(|(_, limits)| limits)) {
        // What is no list was refused when it was asked for.
        let numbers = |list: &str| Numbers::parse(list).unwrap_or_default();
        places.cpus.add(numbers(&limits.cpuset_cpus));
        places.mems.add(numbers(&limits.cpuset_mems));
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(cpus: &str, mems: &str) -> cri::LinuxContainerResources {
        cri::LinuxContainerResources {
            cpuset_cpus: cpus.into(),
            cpuset_mems: mems.into(),
            ..Default::default()
        }
    }

    fn container(id: &str, cpus: &str, mems: &str, state: ContainerState) -> (String, Container) {
        let linux = cri::LinuxContainerConfig {
            resources: Some(limits(cpus, mems)),
            ..Default::default()
        };
        let config = cri::ContainerConfig {
            linux: Some(linux),
            ..Default::default()
        };
        (id.to_owned(), Container::sample(id, config, state))
    }

    #[test]
    fn a_vm_runs_where_any_of_its_containers_may() {
        let mut ended = ContainerState::Created;
        ended.fail_to_start(1, "test".into());
        let running = || ContainerState::Running { started_at: 1 };
        let containers = BTreeMap::from([
            container("a", "0-1", "0", running()),
            container("b", "4", "", ContainerState::Created),
            container("c", "7", "1", ended),
            container("d", "", "", running()),
        ]);
        let place = |changed| {
            let places = places(&containers, changed);
            (places.cpus.to_string(), places.mems.to_string())
        };
        assert_eq!(place(None), ("0-1,4".into(), "0".into()));
        let (more, other, none) = (limits("5", ""), limits("2", "1"), limits("", ""));
        assert_eq!(place(Some(("e", &more))), ("0-1,4-5".into(), "0".into()));
        assert_eq!(place(Some(("a", &other))), ("2,4".into(), "1".into()));
        assert_eq!(place(Some(("a", &none))), ("4".into(), String::new()));
    }
}

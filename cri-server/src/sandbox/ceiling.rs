//! What of a pod's own limits holds.
//!
//! A kubelet states for a pod the sum of those limits that its containers state (CRI
//! `LinuxPodSandboxConfig.resources`). Where a container states none, that sum bounds nothing: the
//! container may use what the VM has, and is not to live on what the others are limited to.

use bulkhead_cri_api::v1 as cri;

use super::SandboxError;
use super::boot::blocking;
use super::limit::on_host;
use super::owner::Owner;
use crate::container::resource;
use crate::deadline::Deadline;

type Limits = cri::LinuxContainerResources;

impl Owner {
    /// Lifts what does not hold beside a new container with `limits`.
    pub(super) async fn lift_for(
        &self,
        limits: &Limits,
        deadline: Deadline,
    ) -> Result<(), SandboxError> {
        let linux = self.record.config.linux.clone().unwrap_or_default();
        let stated = linux.resources.unwrap_or_default();
        let held = held(&stated, [limits]);
        if held == stated {
            return Ok(());
        }
        let (_, changed) = resource::change(&stated, &held)?;
        self.update_guest("", &resource::of_pod(changed), None, deadline)
            .await?;
        self.limit_host(self.record.config.clone(), held).await
    }

    /// Of limits asked for the pod, those that hold beside its containers.
    pub(super) fn held(&self, asked: &Limits) -> Limits {
        let none = Limits::default();
        let containers = self.record.containers.values().map(|container| {
            let linux = container.config.linux.as_ref();
            linux
                .and_then(|linux| linux.resources.as_ref())
                .unwrap_or(&none)
        });
        held(asked, containers)
    }

    /// Bounds the pod on the host by `held` and the overhead of `config`.
    pub(super) async fn limit_host(
        &self,
        mut config: cri::PodSandboxConfig,
        held: Limits,
    ) -> Result<(), SandboxError> {
        config.linux.get_or_insert_default().resources = Some(held);
        let cgroup = self.host.cgroup(&self.record.id, &config)?;
        let limits = on_host(&config);
        blocking(move || Ok(cgroup.limit(&limits)?)).await
    }
}

fn held<'a>(asked: &Limits, containers: impl IntoIterator<Item = &'a Limits>) -> Limits {
    let mut held = asked.clone();
    // 0 is left as it is; -1 lifts.
    let lift = |limit: &mut i64| *limit = -i64::from(*limit != 0);
    for container in containers {
        let own = container.unified.get("memory.max");
        if container.memory_limit_in_bytes <= 0 && own.is_none_or(|own| own == "max") {
            lift(&mut held.memory_limit_in_bytes);
            lift(&mut held.memory_swap_limit_in_bytes);
        }
        if container.cpu_quota <= 0 {
            lift(&mut held.cpu_quota);
        }
    }
    held
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(memory_limit_in_bytes: i64, cpu_quota: i64) -> Limits {
        Limits {
            memory_limit_in_bytes,
            cpu_quota,
            cpu_shares: 512,
            ..Limits::default()
        }
    }

    #[test]
    fn a_container_without_a_limit_lifts_the_pods() {
        let table = [
            ((100, 10), vec![], (100, 10)),
            ((100, 10), vec![(60, 6), (40, 4)], (100, 10)),
            ((60, 10), vec![(60, 6), (0, 4)], (-1, 10)),
            ((60, 6), vec![(60, 6), (0, 0)], (-1, -1)),
            ((60, 6), vec![(-1, -1)], (-1, -1)),
            ((0, 0), vec![(0, 0)], (0, 0)),
        ];
        for (pod, containers, expected) in table {
            let containers: Vec<_> = containers.into_iter().map(|(m, c)| limits(m, c)).collect();
            let held = held(&limits(pod.0, pod.1), &containers);
            assert_eq!(held, limits(expected.0, expected.1), "{pod:?}");
        }
        let mut by_file = limits(0, 4);
        by_file.unified = [("memory.max".to_owned(), "60".to_owned())].into();
        assert_eq!(held(&limits(60, 4), [&by_file]), limits(60, 4));
    }
}

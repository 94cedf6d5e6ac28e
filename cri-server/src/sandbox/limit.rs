//! What the owner does with limits: a container's in the guest, the pod's in the guest and on the
//! host.

use bulkhead_agent_api::v1;
use bulkhead_cri_api::v1 as cri;
use oci_spec::runtime::LinuxResources;

use super::SandboxError;
use super::host::new_id;
use super::owner::Owner;
use super::state::ContainerState;
use crate::cgroup::{self, Limits};
use crate::container::resource;
use crate::container::spec::SpecError;
use crate::deadline::Deadline;

/// The most threads and processes a pod has on the host: those of its VMM, at most 64 vCPUs and a
/// few for each device.
const PROCESSES: u64 = 512;
/// The kernel's period for CPU quotas, in microseconds, where the request names none.
pub const CPU_PERIOD: u64 = 100_000;

impl Owner {
    /// Changes limits of a container that has not exited (CRI `UpdateContainerResources`).
    pub(super) async fn update_container(
        &mut self,
        id: &str,
        asked: &cri::LinuxContainerResources,
        deadline: Deadline,
    ) -> Result<(), SandboxError> {
        let container = self.record.containers.get(id);
        let container = container.ok_or_else(|| SandboxError::no_container(id))?;
        let state = match container.state {
            ContainerState::Created | ContainerState::Running { .. } => None,
            ContainerState::Creating => Some("not made yet"),
            ContainerState::Exited(_) => Some("exited"),
        };
        if let Some(state) = state {
            return Err(SandboxError::WrongState {
                id: id.to_owned(),
                state,
                needed: "created or running",
            });
        }
        let linux = container.config.linux.clone().unwrap_or_default();
        let present = linux.resources.unwrap_or_default();
        let (whole, changed) = resource::change(&present, asked)?;
        self.fits_the_vm(&present, asked)?;
        let score = i32::try_from(asked.oom_score_adj).ok();
        let score = score.filter(|score| *score != 0);
        self.place(id, &whole).await?;
        if let Err(error) = self.update_guest(id, &changed, score, deadline).await {
            self.place_again().await;
            return Err(error);
        }
        if let Some(container) = self.record.containers.get_mut(id) {
            container.config.linux.get_or_insert_default().resources = Some(whole);
            if score.is_some() {
                container.process.set_oom_score_adj(score);
            }
        }
        self.commit().await;
        Ok(())
    }

    /// Changes limits of the pod as a whole (CRI `UpdatePodSandboxResources`).
    pub(super) async fn update_pod(
        &mut self,
        overhead: &cri::LinuxContainerResources,
        asked: &cri::LinuxContainerResources,
        deadline: Deadline,
    ) -> Result<(), SandboxError> {
        self.live()?;
        resource::check_pod(asked)?;
        resource::check_pod(overhead)?;
        let mut config = self.record.config.clone();
        let linux = config.linux.get_or_insert_default();
        let present = linux.resources.take().unwrap_or_default();
        let (whole, _) = resource::change(&present, asked)?;
        let (_, changed) = resource::change(&present, &self.held(asked))?;
        self.fits_the_vm(&present, asked)?;
        let present_overhead = linux.overhead.take().unwrap_or_default();
        let (overhead, _) = resource::change(&present_overhead, overhead)?;
        let held = self.held(&whole);
        linux.resources = Some(whole);
        linux.overhead = Some(overhead);
        let changed = resource::of_pod(changed);
        self.update_guest("", &changed, None, deadline).await?;
        self.limit_host(config.clone(), held).await?;
        self.record.config = config;
        self.commit().await;
        Ok(())
    }

    pub(super) async fn update_guest(
        &self,
        container_id: &str,
        limits: &LinuxResources,
        oom_score_adj: Option<i32>,
        deadline: Deadline,
    ) -> Result<(), SandboxError> {
        let request = v1::UpdateResourcesRequest {
            operation_id: new_id()?,
            container_id: container_id.to_owned(),
            resources: json(limits)?,
            oom_score_adj,
        };
        self.live()?
            .guest
            .update_resources(request, deadline)
            .await?;
        Ok(())
    }

    /// Refuses a memory limit beyond the VM, whose memory stays what it was booted with, unless it
    /// is the `present` one.
    pub(super) fn fits_the_vm(
        &self,
        present: &cri::LinuxContainerResources,
        asked: &cri::LinuxContainerResources,
    ) -> Result<(), SandboxError> {
        let memory_mib = self.record.memory_mib;
        let memory_mib = memory_mib.unwrap_or(self.host.config.vm.memory_mib);
        beyond(present, asked, u64::from(memory_mib) << 20)
            .map_or(Ok(()), |error| Err(error.into()))
    }
}

fn beyond(
    present: &cri::LinuxContainerResources,
    asked: &cri::LinuxContainerResources,
    vm: u64,
) -> Option<SpecError> {
    let limit = |of: &cri::LinuxContainerResources| u64::try_from(of.memory_limit_in_bytes).ok();
    let file = |of: &cri::LinuxContainerResources| of.unified.get("memory.max")?.parse().ok();
    [
        ("memory_limit_in_bytes", limit(present), limit(asked)),
        ("unified memory.max", file(present), file(asked)),
    ]
    .into_iter()
    .find_map(|(field, present, asked)| {
        let asked: u64 = asked.filter(|asked| *asked > vm && present != Some(*asked))?;
        let reason = format!(
            "{asked} bytes are more than the {vm} of the pod's VM, which keeps the size it was \
             started with; state the limit in linux.resources of the pod's configuration when it \
             is run, or raise vm.memory_mib in this server's configuration"
        );
        Some(SpecError::Unsupported { field, reason })
    })
}

/// A pod's limits for the guest, as the agent reads them; empty without any.
pub fn in_guest(pod: &cri::PodSandboxConfig) -> Result<Vec<u8>, SandboxError> {
    let asked = pod
        .linux
        .as_ref()
        .and_then(|linux| linux.resources.as_ref());
    match asked {
        Some(asked) => json(&resource::of_pod(resource::limits(asked)?)),
        None => Ok(Vec::new()),
    }
}

fn json(limits: &LinuxResources) -> Result<Vec<u8>, SandboxError> {
    serde_json::to_vec(limits).map_err(|error| SandboxError::Broken(error.to_string()))
}

/// What the pod may use of the host, all its processes together: what it asks for and, where that
/// is limited, its overhead. Its memory is bounded by the size of its VM.
pub fn on_host(pod: &cri::PodSandboxConfig) -> Limits {
    let linux = pod.linux.clone().unwrap_or_default();
    let (asked, overhead) = (
        linux.resources.unwrap_or_default(),
        linux.overhead.unwrap_or_default(),
    );
    let positive = |value: i64| u64::try_from(value).ok().filter(|value| *value > 0);
    let period = |of: &cri::LinuxContainerResources| positive(of.cpu_period).unwrap_or(CPU_PERIOD);
    let more = positive(overhead.cpu_quota).unwrap_or(0);
    let more = more.saturating_mul(period(&asked)) / period(&overhead);
    let quota = match asked.cpu_quota {
        0 => None,
        quota => Some(positive(quota).map(|quota| quota.saturating_add(more))),
    };
    let shares = positive(asked.cpu_shares);
    let shares =
        shares.map(|shares| shares.saturating_add(positive(overhead.cpu_shares).unwrap_or(0)));
    Limits {
        cpu: quota.map(|quota| (quota, period(&asked))),
        cpu_weight: shares.map(cgroup::weight),
        pids: Some(PROCESSES),
        ..Limits::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Asked = cri::LinuxContainerResources;

    fn pod(resources: Asked, overhead: Asked) -> cri::PodSandboxConfig {
        cri::PodSandboxConfig {
            linux: Some(cri::LinuxPodSandboxConfig {
                resources: Some(resources),
                overhead: Some(overhead),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn time(cpu_quota: i64, cpu_period: i64, cpu_shares: i64) -> Asked {
        Asked {
            cpu_quota,
            cpu_period,
            cpu_shares,
            ..Asked::default()
        }
    }

    #[test]
    fn a_pods_cpu_time_on_the_host_holds_its_overhead() {
        let limits = on_host(&pod(time(50_000, 100_000, 1024), time(5_000, 50_000, 256)));
        assert_eq!(limits.cpu, Some((Some(60_000), 100_000)));
        assert_eq!(limits.cpu_weight, Some(cgroup::weight(1280)));
        let lifted = on_host(&pod(time(-1, 0, 0), time(5_000, 0, 0)));
        assert_eq!(lifted.cpu, Some((None, CPU_PERIOD)));
        let unlimited = on_host(&pod(time(0, 0, 0), time(5_000, 0, 256)));
        assert_eq!((unlimited.cpu, unlimited.cpu_weight), (None, None));
    }

    #[test]
    fn only_a_limit_that_is_raised_beyond_the_vm_is_refused() {
        let memory = |memory_limit_in_bytes| Asked {
            memory_limit_in_bytes,
            ..Asked::default()
        };
        assert_eq!(beyond(&memory(1), &memory(100), 100), None);
        assert_eq!(beyond(&memory(200), &memory(200), 100), None);
        assert_eq!(beyond(&memory(1), &memory(-1), 100), None);
        let file = |value: &str| Asked {
            unified: [("memory.max".to_owned(), value.to_owned())].into(),
            ..Asked::default()
        };
        assert_eq!(beyond(&memory(1), &file("max"), 100), None);
        for asked in [memory(101), file("101")] {
            let refusal = beyond(&memory(1), &asked, 100).unwrap().to_string();
            assert!(
                refusal.contains("101 bytes are more than the 100"),
                "{refusal}"
            );
        }
    }

    #[test]
    fn the_guest_is_told_of_a_pods_memory_and_not_of_its_cpu_time() {
        let mut limits = time(50_000, 100_000, 1024);
        limits.memory_limit_in_bytes = 4096;
        let told = in_guest(&pod(limits, Asked::default())).unwrap();
        assert_eq!(told, br#"{"memory":{"limit":4096}}"#);
        assert!(
            in_guest(&cri::PodSandboxConfig::default())
                .unwrap()
                .is_empty()
        );
    }
}

//! A container's limits.

use bulkhead_cri_api::v1 as cri;
use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxPids, LinuxResources};

use super::spec::SpecError;

/// The limits of CRI `LinuxContainerResources`, a zero or absent field being no limit. Weights
/// stay in the OCI form (`cpu.shares`, 2 to 262144); the guest turns them into those of cgroup v2.
pub fn limits(asked: &cri::LinuxContainerResources) -> Result<LinuxResources, SpecError> {
    let mut cpu = LinuxCpu::default();
    if asked.cpu_shares > 0 {
        cpu.set_shares(Some(asked.cpu_shares.clamp(2, 262_144).unsigned_abs()));
    }
    if asked.cpu_quota > 0 {
        cpu.set_quota(Some(asked.cpu_quota));
    }
    if asked.cpu_period < 0 {
        return Err(SpecError::Invalid {
            field: "cpu_period",
            reason: format!("{} is negative", asked.cpu_period),
        });
    }
    if asked.cpu_period > 0 {
        cpu.set_period(Some(asked.cpu_period.unsigned_abs()));
    }
    // The host's CPU numbers mean nothing in the guest, whose vCPUs the pod has to itself:
    // cpuset_cpus and cpuset_mems are left to the pod's cgroup on the host.
    let mut memory = LinuxMemory::default();
    if asked.memory_limit_in_bytes > 0 {
        memory.set_limit(Some(asked.memory_limit_in_bytes));
    }
    if asked.memory_swap_limit_in_bytes > 0 {
        memory.set_swap(Some(asked.memory_swap_limit_in_bytes));
    }
    let limit = asked.hugepage_limits.iter().find(|limit| limit.limit > 0);
    if let Some(limit) = limit {
        return Err(SpecError::Unsupported {
            field: "hugepage_limits",
            reason: format!(
                "the guest has no huge pages of {} reserved",
                limit.page_size
            ),
        });
    }
    let mut pids = LinuxPids::default();
    pids.set_limit(-1);
    let mut limits = LinuxResources::default();
    limits
        .set_cpu(Some(cpu))
        .set_memory(Some(memory))
        .set_pids(Some(pids));
    if !asked.unified.is_empty() {
        limits.set_unified(Some(asked.unified.clone().into_iter().collect()));
    }
    Ok(limits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_fields_are_no_limits() {
        let limits = limits(&cri::LinuxContainerResources::default()).unwrap();
        assert_eq!(limits.cpu(), &Some(LinuxCpu::default()));
        assert_eq!(limits.memory(), &Some(LinuxMemory::default()));
        assert_eq!(limits.pids().unwrap().limit(), -1);
    }

    #[test]
    fn limits_are_taken_over_and_shares_kept_in_range() {
        let asked = cri::LinuxContainerResources {
            cpu_shares: 1,
            cpu_quota: 50_000,
            cpu_period: 100_000,
            memory_limit_in_bytes: 64 << 20,
            ..Default::default()
        };
        let limits = limits(&asked).unwrap();
        let cpu = limits.cpu().clone().unwrap();
        assert_eq!(cpu.shares(), Some(2));
        assert_eq!(cpu.quota(), Some(50_000));
        assert_eq!(cpu.period(), Some(100_000));
        assert_eq!(limits.memory().unwrap().limit(), Some(64 << 20));
    }
}

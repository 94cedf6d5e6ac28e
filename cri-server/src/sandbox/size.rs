//! How large a pod's VM is.
//!
//! A VM is as large as configured, and larger where its pod's limits are (CRI
//! `LinuxPodSandboxConfig.resources`): containers can use all they are limited to. Memory that the
//! guest does not touch is not taken from the host. A container whose memory limit is larger than
//! the VM all the same is refused.

use std::path::Path;

use bulkhead_cri_api::v1 as cri;

use super::SandboxError;
use super::limit::CPU_PERIOD;
use crate::config;
use crate::container::spec::SpecError;
use crate::numbers::Numbers;

/// What the guest's kernel and agent have to themselves beside the containers' memory, in bytes,
/// where the pod's overhead is not more.
const OWN: u64 = 64 << 20;
/// One part in so many of the memory goes to the kernel's account of its pages: 1/64 (a `struct
/// page` of 64 bytes for each 4 KiB) and, by the same again, its hash tables and reserves.
const ACCOUNTED: u64 = 32;
/// VMs have multiples of so much memory, in MiB: huge pages of the host fit.
const STEP_MIB: u64 = 2;
/// The most memory a VM can have, in MiB.
const MOST_MIB: u64 = 1 << 20;
/// The most vCPUs a VM can have.
const MOST_VCPUS: u64 = bulkhead_vmm_api::MAX_VCPUS as u64;
/// Where the host's kernel lists the CPUs that are online.
const ONLINE: &str = "/sys/devices/system/cpu/online";

/// A VM's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Memory in MiB.
    pub memory_mib: u32,
    /// vCPUs.
    pub vcpus: u8,
}

/// What the host has.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    /// Memory in bytes.
    memory: u64,
    /// CPUs that are online.
    cpus: u64,
}

impl Machine {
    /// Looks at this one. Blocks.
    pub fn look() -> Result<Self, SandboxError> {
        let info = rustix::system::sysinfo();
        let failed = |source| SandboxError::File {
            path: ONLINE.into(),
            source,
        };
        let online = std::fs::read_to_string(Path::new(ONLINE)).map_err(failed)?;
        let online = Numbers::parse(&online).map_err(|why| failed(std::io::Error::other(why)))?;
        Ok(Self {
            memory: info.totalram.saturating_mul(info.mem_unit.into()),
            cpus: u64::try_from(online.count()).unwrap_or(1),
        })
    }
}

impl Size {
    /// The size for a pod: what is configured, or more if the pod's limits are more. Refused is a
    /// memory limit for which this machine has not enough; a limit of CPU time is only the most
    /// that may be used, so it needs no more vCPUs than there are CPUs.
    pub fn of(
        pod: &cri::PodSandboxConfig,
        configured: &config::Vm,
        machine: Machine,
    ) -> Result<Self, SpecError> {
        let linux = pod.linux.clone().unwrap_or_default();
        let limits = linux.resources.unwrap_or_default();
        let overhead = linux.overhead.unwrap_or_default();
        Ok(Self {
            memory_mib: memory_mib(&limits, &overhead, configured, machine.memory)?,
            vcpus: vcpus(&limits, configured, machine.cpus),
        })
    }
}

fn memory_mib(
    limits: &cri::LinuxContainerResources,
    overhead: &cri::LinuxContainerResources,
    configured: &config::Vm,
    machine: u64,
) -> Result<u32, SpecError> {
    let limit = u64::try_from(limits.memory_limit_in_bytes).unwrap_or(0);
    if limit == 0 {
        return Ok(configured.memory_mib);
    }
    let own = u64::try_from(overhead.memory_limit_in_bytes).unwrap_or(0);
    let own = own.max(OWN).saturating_add(limit / ACCOUNTED);
    let mib = limit.saturating_add(own).div_ceil(STEP_MIB << 20) * STEP_MIB;
    if mib <= u64::from(configured.memory_mib) {
        return Ok(configured.memory_mib);
    }
    let most = (machine >> 20).min(MOST_MIB);
    match u32::try_from(mib) {
        Ok(fits) if mib <= most => Ok(fits),
        _ => Err(SpecError::Unsupported {
            field: "linux.resources.memory_limit_in_bytes",
            reason: format!(
                "for {limit} bytes the pod's VM needs {mib} MiB, and on this machine it can have \
                 {most}; lower the limits of the pod's containers"
            ),
        }),
    }
}

fn vcpus(limits: &cri::LinuxContainerResources, configured: &config::Vm, cpus: u64) -> u8 {
    let quota = u64::try_from(limits.cpu_quota).unwrap_or(0);
    let period = u64::try_from(limits.cpu_period).unwrap_or(0);
    let period = if period == 0 { CPU_PERIOD } else { period };
    let wanted = quota.div_ceil(period).min(cpus).min(MOST_VCPUS);
    u8::try_from(wanted)
        .unwrap_or(u8::MAX)
        .max(configured.vcpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    type Limits = cri::LinuxContainerResources;

    const MACHINE: Machine = Machine {
        memory: 8 << 30,
        cpus: 4,
    };
    const MIB: i64 = 1 << 20;

    fn size(limits: Limits, overhead: Limits) -> Result<Size, SpecError> {
        let pod = cri::PodSandboxConfig {
            linux: Some(cri::LinuxPodSandboxConfig {
                resources: Some(limits),
                overhead: Some(overhead),
                ..Default::default()
            }),
            ..Default::default()
        };
        Size::of(&pod, &config::Vm::default(), MACHINE)
    }

    fn memory(memory_limit_in_bytes: i64) -> Limits {
        Limits {
            memory_limit_in_bytes,
            ..Limits::default()
        }
    }

    #[test]
    fn memory_follows_the_pods_limit_upwards() {
        let table = [
            ("none", 0, 0, 256),
            ("lifted", -1, 0, 256),
            ("small", 64 * MIB, 0, 256),
            ("of the configured size", 256 * MIB, 0, 328),
            ("uneven", 300 * MIB + 1, 0, 374),
            ("overhead", 320 * MIB, 160 * MIB, 490),
            ("small overhead", 320 * MIB, 10 * MIB, 394),
            ("overhead alone", 0, 512 * MIB, 256),
            ("gibibytes", 4096 * MIB, 0, 4288),
        ];
        for (name, limit, overhead, mib) in table {
            let size = size(memory(limit), memory(overhead)).unwrap();
            assert_eq!((size.memory_mib, size.vcpus), (mib, 1), "{name}");
        }
    }

    #[test]
    fn memory_the_machine_has_not_is_refused_by_name() {
        for limit in [8192 * MIB, i64::MAX] {
            let refusal = size(memory(limit), Limits::default()).unwrap_err();
            let refusal = refusal.to_string();
            assert!(refusal.contains("memory_limit_in_bytes"), "{refusal}");
            assert!(refusal.contains(&limit.to_string()), "{refusal}");
            assert!(refusal.contains("8192"), "{refusal}");
        }
    }

    #[test]
    fn vcpus_are_the_cpu_time_rounded_up_as_far_as_there_are_cpus() {
        let table = [
            (0, 0, 1),
            (-1, 100_000, 1),
            (10_000, 100_000, 1),
            (100_000, 0, 1),
            (100_001, 100_000, 2),
            (150_000, 50_000, 3),
            (6_400_000, 100_000, 4),
            (i64::MAX, 1, 4),
        ];
        for (cpu_quota, cpu_period, vcpus) in table {
            let limits = Limits {
                cpu_quota,
                cpu_period,
                ..Limits::default()
            };
            let size = size(limits, Limits::default()).unwrap();
            assert_eq!(size.vcpus, vcpus, "{cpu_quota} in {cpu_period}");
        }
    }
}

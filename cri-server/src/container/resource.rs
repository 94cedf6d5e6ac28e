//! Limits: from the CRI's form to that of the OCI runtime specification. Pure.

use bulkhead_cri_api::v1 as cri;
use oci_spec::runtime::{
    LinuxCpu, LinuxHugepageLimit, LinuxHugepageLimitBuilder, LinuxMemory, LinuxResources,
};

use super::spec::SpecError;
use crate::numbers::Numbers;

/// What the kernel takes as a period, in microseconds (sched/core.c, `tg_set_cfs_bandwidth`).
const PERIODS: std::ops::RangeInclusive<i64> = 1_000..=1_000_000;
/// The shortest quota the kernel takes, in microseconds.
const SHORTEST_QUOTA: i64 = 1_000;

/// The limits of CRI `LinuxContainerResources`. A zero or absent field is absent from the result:
/// no limit when a container is made, the old one in an update; a negative one lifts the limit.
/// Weights stay in the OCI form (`cpu.shares`, 2 to 262144); the guest turns them into those of
/// cgroup v2. `oom_score_adj` is the process's in the OCI form, and only checked here.
pub fn limits(asked: &cri::LinuxContainerResources) -> Result<LinuxResources, SpecError> {
    check(asked)?;
    translate(asked)
}

/// What an update asks for: the limits in effect afterwards, and those to be changed.
pub fn change(
    present: &cri::LinuxContainerResources,
    asked: &cri::LinuxContainerResources,
) -> Result<(cri::LinuxContainerResources, LinuxResources), SpecError> {
    let whole = merge(present, asked);
    check(&whole)?;
    Ok((whole, translate(asked)?))
}

/// Refuses by name what only a container can be limited by.
pub fn check_pod(limits: &cri::LinuxContainerResources) -> Result<(), SpecError> {
    for (field, numbers) in [
        ("linux.resources.cpuset_cpus", &limits.cpuset_cpus),
        ("linux.resources.cpuset_mems", &limits.cpuset_mems),
    ] {
        if !numbers.is_empty() {
            let reason = format!("a pod's containers say where it runs, not the pod ({numbers})");
            return Err(SpecError::Unsupported { field, reason });
        }
    }
    if limits.oom_score_adj != 0 {
        return Err(SpecError::Unsupported {
            field: "linux.resources.oom_score_adj",
            reason: format!("a pod has no process of its own ({})", limits.oom_score_adj),
        });
    }
    Ok(())
}

/// Those of a pod's limits that its guest keeps; its CPU time is the host's to limit.
pub fn of_pod(mut limits: LinuxResources) -> LinuxResources {
    limits.set_cpu(None);
    limits
}

fn translate(asked: &cri::LinuxContainerResources) -> Result<LinuxResources, SpecError> {
    let mut cpu = LinuxCpu::default();
    if asked.cpu_shares > 0 {
        cpu.set_shares(Some(asked.cpu_shares.clamp(2, 262_144).unsigned_abs()));
    }
    if asked.cpu_quota != 0 {
        cpu.set_quota(Some(asked.cpu_quota.max(-1)));
    }
    if asked.cpu_period > 0 {
        cpu.set_period(Some(asked.cpu_period.unsigned_abs()));
    }
    // cpuset_cpus and cpuset_mems are numbers of the host and mean nothing in the guest: they
    // apply to its VM.
    let mut memory = LinuxMemory::default();
    if asked.memory_limit_in_bytes != 0 {
        memory.set_limit(Some(asked.memory_limit_in_bytes.max(-1)));
    }
    if asked.memory_swap_limit_in_bytes != 0 {
        memory.set_swap(Some(asked.memory_swap_limit_in_bytes.max(-1)));
    }
    let pages = asked.hugepage_limits.iter().map(huge_pages);
    let pages = pages.collect::<Result<Vec<_>, _>>()?;
    let mut limits = LinuxResources::default();
    limits.set_cpu(Some(cpu)).set_memory(Some(memory));
    if !pages.is_empty() {
        limits.set_hugepage_limits(Some(pages));
    }
    if !asked.unified.is_empty() {
        limits.set_unified(Some(asked.unified.clone().into_iter().collect()));
    }
    Ok(limits)
}

/// The kubelet limits every size it knows to 0 for containers that ask for none.
fn huge_pages(limit: &cri::HugepageLimit) -> Result<LinuxHugepageLimit, SpecError> {
    let (size, bytes) = (&limit.page_size, limit.limit);
    if bytes > 0 {
        let reason = format!("the guest has no huge pages of {size} reserved ({bytes} bytes)");
        return Err(SpecError::Unsupported {
            field: "hugepage_limits",
            reason,
        });
    }
    LinuxHugepageLimitBuilder::default()
        .page_size(size.clone())
        .limit(0)
        .build()
        .map_err(|error| invalid("hugepage_limits", error.to_string()))
}

fn check(whole: &cri::LinuxContainerResources) -> Result<(), SpecError> {
    if whole.cpu_shares < 0 {
        let reason = format!("{} is negative", whole.cpu_shares);
        return Err(invalid("cpu_shares", reason));
    }
    if whole.cpu_period != 0 && !PERIODS.contains(&whole.cpu_period) {
        let (least, most) = (PERIODS.start(), PERIODS.end());
        let reason = format!("{} is not within {least} and {most} µs", whole.cpu_period);
        return Err(invalid("cpu_period", reason));
    }
    if (1..SHORTEST_QUOTA).contains(&whole.cpu_quota) {
        let reason = format!("{} is less than {SHORTEST_QUOTA} µs", whole.cpu_quota);
        return Err(invalid("cpu_quota", reason));
    }
    let (memory, both) = (
        whole.memory_limit_in_bytes,
        whole.memory_swap_limit_in_bytes,
    );
    if both > 0 && (memory <= 0 || both < memory) {
        let reason = format!("{both} counts memory too, whose limit is {memory}");
        return Err(invalid("memory_swap_limit_in_bytes", reason));
    }
    for (field, list) in [
        ("cpuset_cpus", &whole.cpuset_cpus),
        ("cpuset_mems", &whole.cpuset_mems),
    ] {
        Numbers::parse(list).map_err(|reason| invalid(field, reason))?;
    }
    let files = &mut whole.unified.iter();
    if let Some((file, value)) = files.find(|(file, value)| needs_huge_pages(file, value)) {
        return Err(SpecError::Unsupported {
            field: "unified",
            reason: format!("{file} is {value}, and the guest has no huge pages reserved"),
        });
    }
    if !(-1000..=1000).contains(&whole.oom_score_adj) {
        let reason = format!("{} is not within -1000 and 1000", whole.oom_score_adj);
        return Err(invalid("oom_score_adj", reason));
    }
    Ok(())
}

/// Whether a file of the guest's cgroup grants huge pages, other than by not limiting them.
fn needs_huge_pages(file: &str, value: &str) -> bool {
    file.starts_with("hugetlb.") && !matches!(value.trim(), "0" | "max")
}

/// `asked` over `present`; what is zero, empty or absent leaves the old value.
pub fn merge(
    present: &cri::LinuxContainerResources,
    asked: &cri::LinuxContainerResources,
) -> cri::LinuxContainerResources {
    let number = |new: i64, old: i64| if new == 0 { old } else { new };
    let text = |new: &String, old: &String| if new.is_empty() { old } else { new }.clone();
    let mut unified = present.unified.clone();
    unified.extend(asked.unified.clone());
    let sizes = |limit: &&cri::HugepageLimit| {
        let mut new = asked.hugepage_limits.iter();
        new.all(|new| new.page_size != limit.page_size)
    };
    let pages = present.hugepage_limits.iter().filter(sizes);
    cri::LinuxContainerResources {
        cpu_period: number(asked.cpu_period, present.cpu_period),
        cpu_quota: number(asked.cpu_quota, present.cpu_quota),
        cpu_shares: number(asked.cpu_shares, present.cpu_shares),
        memory_limit_in_bytes: number(asked.memory_limit_in_bytes, present.memory_limit_in_bytes),
        oom_score_adj: number(asked.oom_score_adj, present.oom_score_adj),
        cpuset_cpus: text(&asked.cpuset_cpus, &present.cpuset_cpus),
        cpuset_mems: text(&asked.cpuset_mems, &present.cpuset_mems),
        hugepage_limits: pages.chain(&asked.hugepage_limits).cloned().collect(),
        unified,
        memory_swap_limit_in_bytes: number(
            asked.memory_swap_limit_in_bytes,
            present.memory_swap_limit_in_bytes,
        ),
    }
}

fn invalid(field: &'static str, reason: String) -> SpecError {
    SpecError::Invalid { field, reason }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    type Asked = cri::LinuxContainerResources;

    fn pages(size: &str, limit: u64) -> Vec<cri::HugepageLimit> {
        vec![cri::HugepageLimit {
            page_size: size.into(),
            limit,
        }]
    }

    fn asked(change: impl FnOnce(&mut Asked)) -> Asked {
        let mut asked = Asked::default();
        change(&mut asked);
        asked
    }

    #[test]
    fn each_field_has_its_place_in_the_specification() {
        type Set = fn(&mut Asked);
        let unified = || [("memory.high".to_owned(), "1".to_owned())].into();
        let table: [(&str, Set, &str, Value); 14] = [
            ("shares", |a| a.cpu_shares = 512, "/cpu/shares", json!(512)),
            ("few shares", |a| a.cpu_shares = 1, "/cpu/shares", json!(2)),
            (
                "many shares",
                |a| a.cpu_shares = i64::MAX,
                "/cpu/shares",
                json!(262_144),
            ),
            ("quota", |a| a.cpu_quota = 5000, "/cpu/quota", json!(5000)),
            ("no quota", |a| a.cpu_quota = -7, "/cpu/quota", json!(-1)),
            (
                "period",
                |a| a.cpu_period = 5000,
                "/cpu/period",
                json!(5000),
            ),
            (
                "memory",
                |a| a.memory_limit_in_bytes = 4096,
                "/memory/limit",
                json!(4096),
            ),
            (
                "no memory limit",
                |a| a.memory_limit_in_bytes = -5,
                "/memory/limit",
                json!(-1),
            ),
            (
                "swap",
                |a| (a.memory_limit_in_bytes, a.memory_swap_limit_in_bytes) = (1, 8192),
                "/memory/swap",
                json!(8192),
            ),
            (
                "no swap limit",
                |a| a.memory_swap_limit_in_bytes = -1,
                "/memory/swap",
                json!(-1),
            ),
            (
                "huge pages",
                |a| a.hugepage_limits = pages("2MB", 0),
                "/hugepageLimits",
                json!([{"pageSize": "2MB", "limit": 0}]),
            ),
            (
                "unified",
                |a| a.unified = [("memory.high".to_owned(), "1".to_owned())].into(),
                "/unified",
                json!({"memory.high": "1"}),
            ),
            ("cpus", |a| a.cpuset_cpus = "3".into(), "/cpu", json!({})),
            ("oom score", |a| a.oom_score_adj = 9, "/memory", json!({})),
        ];
        for (name, set, place, expected) in table {
            let spec = serde_json::to_value(limits(&asked(set)).unwrap()).unwrap();
            assert_eq!(spec.pointer(place), Some(&expected), "{name}: {spec}");
        }
        let none = serde_json::to_value(limits(&Asked::default()).unwrap()).unwrap();
        assert_eq!(none, json!({"cpu": {}, "memory": {}}));
        let whole = limits(&asked(|a| (a.cpu_shares, a.unified) = (2, unified()))).unwrap();
        assert_eq!(of_pod(whole).cpu(), &None);
    }

    #[test]
    fn values_without_sense_are_refused_by_the_name_of_their_field() {
        type Set = fn(&mut Asked);
        let table: [(&str, Set); 12] = [
            ("cpu_shares", |a| a.cpu_shares = -1),
            ("cpu_period", |a| a.cpu_period = -1),
            ("cpu_period", |a| a.cpu_period = 999),
            ("cpu_period", |a| a.cpu_period = 1_000_001),
            ("cpu_quota", |a| a.cpu_quota = 999),
            ("memory_swap_limit_in_bytes", |a| {
                a.memory_swap_limit_in_bytes = 1;
            }),
            ("memory_swap_limit_in_bytes", |a| {
                (a.memory_limit_in_bytes, a.memory_swap_limit_in_bytes) = (2, 1);
            }),
            ("oom_score_adj", |a| a.oom_score_adj = 1001),
            ("cpuset_cpus", |a| a.cpuset_cpus = "0-".into()),
            ("cpuset_mems", |a| a.cpuset_mems = "node0".into()),
            ("hugepage_limits", |a| {
                a.hugepage_limits = pages("2MB", 2 << 20);
            }),
            ("unified", |a| {
                a.unified = [("hugetlb.2MB.max".to_owned(), "2097152".to_owned())].into();
            }),
        ];
        for (field, set) in table {
            let refusal = limits(&asked(set)).unwrap_err().to_string();
            assert!(refusal.starts_with(field), "{refusal}");
        }
    }

    #[test]
    fn a_pod_is_not_limited_by_what_is_its_containers() {
        type Set = fn(&mut Asked);
        let table: [(&str, Set); 3] = [
            ("linux.resources.cpuset_cpus", |a| {
                a.cpuset_cpus = "1".into()
            }),
            ("linux.resources.cpuset_mems", |a| {
                a.cpuset_mems = "0".into()
            }),
            ("linux.resources.oom_score_adj", |a| a.oom_score_adj = 1),
        ];
        for (field, set) in table {
            let refusal = check_pod(&asked(set)).unwrap_err().to_string();
            assert!(refusal.starts_with(field), "{refusal}");
        }
        assert_eq!(check_pod(&asked(|a| a.memory_limit_in_bytes = 1)), Ok(()));
    }

    #[test]
    fn an_update_leaves_what_it_does_not_name() {
        let present = Asked {
            cpu_period: 100_000,
            cpu_quota: 50_000,
            cpu_shares: 512,
            memory_limit_in_bytes: 64 << 20,
            oom_score_adj: 900,
            cpuset_cpus: "0-1".into(),
            cpuset_mems: "0".into(),
            hugepage_limits: [pages("2MB", 0), pages("1GB", 0)].concat(),
            unified: [("a.b".to_owned(), "1".to_owned())].into(),
            memory_swap_limit_in_bytes: 64 << 20,
        };
        let (whole, nothing) = change(&present, &Asked::default()).unwrap();
        assert_eq!(whole, present);
        assert_eq!(nothing, limits(&Asked::default()).unwrap());
        let (whole, changed) = change(
            &present,
            &Asked {
                cpu_quota: -1,
                memory_swap_limit_in_bytes: 128 << 20,
                unified: [("c.d".to_owned(), "2".to_owned())].into(),
                hugepage_limits: pages("1GB", 0),
                ..Asked::default()
            },
        )
        .unwrap();
        assert_eq!((whole.cpu_quota, whole.cpu_period), (-1, 100_000));
        assert_eq!(whole.unified.len(), 2);
        assert_eq!(whole.hugepage_limits.len(), 2);
        assert_eq!(whole.memory_limit_in_bytes, 64 << 20);
        // Only what changes is written; the swap limit goes by the memory limit that is there.
        assert_eq!(changed.memory().unwrap().limit(), None);
        assert_eq!(changed.memory().unwrap().swap(), Some(128 << 20));
        let less = asked(|a| a.memory_limit_in_bytes = 65 << 20);
        assert!(change(&present, &less).is_err(), "swap below memory");
    }
}

//! Processor time: cpu.weight, cpu.max.

use super::{Setting, limit};
use crate::container::spec::Cpu;

/// The kernel's default period, microseconds.
const PERIOD: u64 = 100_000;

pub(super) fn settings(cpu: &Cpu) -> Vec<Setting> {
    let mut all = Vec::new();
    if let Some(shares) = cpu.shares.filter(|shares| *shares > 0) {
        all.push(Setting::new("cpu.weight", weight(shares)));
    }
    if cpu.quota.is_some() || cpu.period.is_some() {
        let quota = cpu.quota.and_then(|quota| u64::try_from(quota).ok());
        let quota = limit(quota.filter(|quota| *quota > 0));
        let period = cpu.period.filter(|period| *period > 0).unwrap_or(PERIOD);
        all.push(Setting::new("cpu.max", format!("{quota} {period}")));
    }
    if let Some(burst) = cpu.burst {
        all.push(Setting::new("cpu.max.burst", burst));
    }
    if let Some(idle) = cpu.idle {
        all.push(Setting::new("cpu.idle", idle));
    }
    all
}

/// From the 2 to 262144 of cgroup v1 to the 1 to 10000 of v2, in a straight line, as the
/// Kubernetes proposal for cgroup v2 has it.
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_span_the_range() {
        assert_eq!([weight(1), weight(2), weight(1024)], [1, 1, 39]);
        assert_eq!([weight(262_144), weight(u64::MAX)], [10_000, 10_000]);
    }

    #[test]
    fn no_quota_is_no_limit() {
        let cpu = Cpu {
            quota: Some(-1),
            ..Cpu::default()
        };
        assert_eq!(settings(&cpu), [Setting::new("cpu.max", "max 100000")]);
    }
}

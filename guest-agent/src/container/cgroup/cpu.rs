//! Processor time: cpu.weight, cpu.max.

use super::{Present, Setting, limit};
use crate::container::spec::Cpu;

pub(super) fn settings(cpu: &Cpu, present: &Present) -> Vec<Setting> {
    let mut all = Vec::new();
    if let Some(shares) = cpu.shares.filter(|shares| *shares > 0) {
        all.push(Setting::new("cpu.weight", weight(shares)));
    }
    let quota = cpu.quota.filter(|quota| *quota != 0);
    let quota = quota.map(|quota| limit(u64::try_from(quota).ok()));
    match (quota, cpu.period.filter(|period| *period > 0)) {
        (None, None) => {}
        // A quota alone leaves the period as it is; a period cannot be written alone.
        (Some(quota), None) => all.push(Setting::new("cpu.max", quota)),
        (quota, Some(period)) => {
            let quota = quota.or_else(|| present.quota.clone());
            let quota = quota.unwrap_or_else(|| limit(None));
            all.push(Setting::new("cpu.max", format!("{quota} {period}")));
        }
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
    fn quota_and_period_can_be_given_alone() {
        let of = |quota, period, present: Option<&str>| {
            let cpu = Cpu {
                quota,
                period,
                ..Cpu::default()
            };
            let present = Present {
                quota: present.map(str::to_owned),
                ..Present::default()
            };
            let settings = settings(&cpu, &present);
            settings.first().map(|setting| setting.value.clone())
        };
        let value = |text: &str| Some(text.to_owned());
        assert_eq!(of(Some(500), Some(1000), Some("7")), value("500 1000"));
        assert_eq!(of(Some(-1), None, Some("7")), value("max"));
        assert_eq!(of(None, Some(1000), Some("7")), value("7 1000"));
        assert_eq!(of(None, Some(1000), None), value("max 1000"));
        assert_eq!(of(Some(0), Some(0), Some("7")), None);
    }
}

//! Tasks: pids.max.

use super::{Setting, limit};
use crate::container::spec::Pids;

pub(super) fn settings(pids: &Pids) -> Option<Setting> {
    // 0 is what callers send for "not set".
    let most = pids.limit.filter(|most| *most != 0)?;
    Some(Setting::new("pids.max", limit(u64::try_from(most).ok())))
}

/// Of the tasks the guest can have, (the most of all containers together, the most of one that
/// names no limit): a fork bomb leaves room for the agent, and for its neighbours.
pub(super) fn shares(guest: u64) -> (u64, u64) {
    (guest - guest / 8, guest / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_negative_limit_is_none() {
        let value = |limit| settings(&Pids { limit: Some(limit) }).map(|setting| setting.value);
        assert_eq!(value(-1).as_deref(), Some("max"));
        assert_eq!(value(5).as_deref(), Some("5"));
        assert_eq!(value(0), None);
    }
}

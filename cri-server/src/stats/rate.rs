//! CPU per second, from two looks at what was used.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::sandbox::Sandboxes;

const SECOND: i64 = 1_000_000_000;

/// The last looks at pods and containers, by id.
#[derive(Debug, Default)]
pub struct Rates(Mutex<HashMap<String, Look>>);

#[derive(Debug, Clone, Copy)]
struct Look {
    /// Nanoseconds since 1970.
    at: i64,
    /// Nanoseconds of CPU so far.
    used: u64,
    /// Nanoseconds of CPU per second before it.
    rate: Option<u64>,
}

impl Rates {
    /// Nanoseconds of CPU per second between this look and the last one that was at least a second
    /// ago; nothing at the first look.
    pub fn of(&self, id: &str, at: i64, used: u64) -> Option<u64> {
        let mut looks = self.looks();
        let rate = match looks.get(id) {
            // Over less time it would be noise.
            Some(last) if at.saturating_sub(last.at) < SECOND => return last.rate,
            Some(last) => used.checked_sub(last.used).map(|used| {
                let elapsed = at.saturating_sub(last.at).unsigned_abs();
                let rate = u128::from(used) * u128::from(SECOND.unsigned_abs())
                    / u128::from(elapsed.max(1));
                u64::try_from(rate).unwrap_or(u64::MAX)
            }),
            None => None,
        };
        looks.insert(id.to_owned(), Look { at, used, rate });
        rate
    }

    /// Forgets pods and containers that are no more.
    pub fn keep(&self, sandboxes: &Sandboxes) {
        let mut known = HashSet::new();
        for view in sandboxes.list() {
            known.insert(view.record().id.clone());
            known.extend(view.record().containers.keys().cloned());
        }
        self.looks().retain(|id, _| known.contains(id));
    }

    fn looks(&self) -> MutexGuard<'_, HashMap<String, Look>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_spans_at_least_a_second() {
        let rates = Rates::default();
        assert_eq!(rates.of("a", 0, 100), None);
        assert_eq!(rates.of("a", SECOND / 2, 900), None);
        assert_eq!(rates.of("a", 2 * SECOND, 1100), Some(500));
        assert_eq!(rates.of("a", 2 * SECOND + 1, 9000), Some(500));
        assert_eq!(rates.of("b", 2 * SECOND, 5), None);
    }

    #[test]
    fn a_counter_or_a_clock_that_goes_back_gives_no_rate() {
        let rates = Rates::default();
        rates.of("a", 5 * SECOND, 100);
        assert_eq!(rates.of("a", 7 * SECOND, 50), None);
        assert_eq!(rates.of("a", 0, 60), None);
    }
}

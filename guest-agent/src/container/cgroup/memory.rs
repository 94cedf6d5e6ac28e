//! Memory: memory.max, memory.low, memory.swap.max.

use super::{CgroupError, Present, Setting, limit};
use crate::container::spec::Memory;

/// In the specification 0 and absent are "leave it", -1 is no limit, and swap counts memory too.
pub(super) fn settings(memory: &Memory, present: &Present) -> Result<Vec<Setting>, CgroupError> {
    let mut all = Vec::new();
    let most = memory.limit.filter(|bytes| *bytes != 0);
    if let Some(bytes) = most {
        all.push(Setting::new("memory.max", limit(u64::try_from(bytes).ok())));
    }
    if let Some(bytes) = memory.reservation.filter(|bytes| *bytes != 0) {
        all.push(Setting::new("memory.low", limit(u64::try_from(bytes).ok())));
    }
    if let Some(both) = memory.swap.filter(|bytes| *bytes != 0) {
        let swap = match (both, most.or(present.memory)) {
            (-1, _) => None,
            (both, Some(memory)) if memory > 0 && both >= memory => {
                Some((both - memory).unsigned_abs())
            }
            _ => {
                return Err(CgroupError::Invalid(format!(
                    "memory.swap {both} counts memory too: it needs a memory.limit no larger than it"
                )));
            }
        };
        all.push(Setting {
            // A guest without swap keeps any limit of it.
            optional: true,
            ..Setting::new("memory.swap.max", limit(swap))
        });
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swap_is_what_goes_beyond_memory() {
        let memory = Memory {
            limit: Some(100),
            reservation: None,
            swap: Some(150),
        };
        let values: Vec<String> = settings(&memory, &Present::default())
            .unwrap()
            .into_iter()
            .map(|setting| setting.value)
            .collect();
        assert_eq!(values, ["100", "50"]);
        let less = Memory {
            swap: Some(50),
            ..memory
        };
        assert!(settings(&less, &Present::default()).is_err());
    }

    #[test]
    fn minus_one_lifts_limits() {
        let memory = Memory {
            limit: Some(-1),
            reservation: Some(0),
            swap: Some(-1),
        };
        let values: Vec<String> = settings(&memory, &Present::default())
            .unwrap()
            .into_iter()
            .map(|setting| setting.value)
            .collect();
        assert_eq!(values, ["max", "max"]);
    }

    #[test]
    fn swap_alone_goes_by_the_limit_that_is_there() {
        let memory = Memory {
            swap: Some(150),
            ..Memory::default()
        };
        let present = Present {
            memory: Some(100),
            ..Present::default()
        };
        let settings = settings(&memory, &present).unwrap();
        let file = settings.first().map(|one| (&*one.file, &*one.value));
        assert_eq!(file, Some(("memory.swap.max", "50")));
    }
}

//! Output that the host has not yet acknowledged, addressed by its offset since the start.

use std::collections::VecDeque;

/// A bounded window on an endless run of bytes.
#[derive(Debug)]
pub struct Ring {
    capacity: usize,
    /// Offset of the first byte kept.
    start: u64,
    bytes: VecDeque<u8>,
}

impl Ring {
    /// Keeps at most `capacity` bytes; takes memory only as they come.
    pub fn new(capacity: usize) -> Self {
        Self {
            capacity,
            start: 0,
            bytes: VecDeque::new(),
        }
    }

    /// Offset of the first byte kept: all before is acknowledged.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Offset behind the last byte.
    pub fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// How many bytes fit.
    pub fn room(&self) -> usize {
        self.capacity - self.bytes.len()
    }

    /// Appends as much of `bytes` as fits, and says how much that was.
    pub fn append(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.room());
        self.bytes.extend(bytes.iter().take(taken));
        taken
    }

    /// A run of bytes that begins at `offset`; empty when none is kept there.
    pub fn from(&self, offset: u64) -> &[u8] {
        let Some(skip) = offset
            .checked_sub(self.start)
            .and_then(|skip| usize::try_from(skip).ok())
        else {
            return &[];
        };
        let (front, back) = self.bytes.as_slices();
        match front.get(skip..) {
            Some(rest) if !rest.is_empty() => rest,
            _ => back
                .get(skip.saturating_sub(front.len())..)
                .unwrap_or_default(),
        }
    }

    /// Forgets what lies before `offset`. An offset never reached changes nothing and is `false`.
    pub fn release(&mut self, offset: u64) -> bool {
        if offset > self.end() {
            return false;
        }
        let done = offset.saturating_sub(self.start);
        self.bytes.drain(..done as usize);
        self.start += done;
        if self.bytes.is_empty() {
            // An idle stream costs nothing.
            self.bytes = VecDeque::new();
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Step {
        Append(Vec<u8>),
        Release(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..40).prop_map(Step::Append),
            (0_u64..400).prop_map(Step::Release),
        ]
    }

    proptest! {
        /// The ring shows at each offset the byte that was appended there.
        #[test]
        fn offsets_are_absolute(steps in proptest::collection::vec(step(), 0..60)) {
            let mut ring = Ring::new(64);
            let mut all: Vec<u8> = Vec::new();
            for step in steps {
                match step {
                    Step::Append(bytes) => {
                        let taken = ring.append(&bytes);
                        all.extend(&bytes[..taken]);
                        prop_assert!(taken == bytes.len() || ring.room() == 0);
                    }
                    Step::Release(offset) => {
                        let before = ring.start();
                        let known = offset <= all.len() as u64;
                        prop_assert_eq!(ring.release(offset), known);
                        prop_assert_eq!(ring.start(), if known { before.max(offset) } else { before });
                    }
                }
                prop_assert_eq!(ring.end(), all.len() as u64);
                let mut at = ring.start();
                while at < ring.end() {
                    let run = ring.from(at);
                    prop_assert!(!run.is_empty());
                    prop_assert_eq!(run, &all[at as usize..at as usize + run.len()]);
                    at += run.len() as u64;
                }
            }
        }
    }

    #[test]
    fn nothing_is_kept_outside_the_window() {
        let mut ring = Ring::new(4);
        assert_eq!(ring.append(b"abcdef"), 4);
        assert!(ring.release(2));
        assert!(ring.from(1).is_empty());
        assert!(ring.from(4).is_empty());
        assert!(ring.from(u64::MAX).is_empty());
        assert!(!ring.release(5));
    }
}

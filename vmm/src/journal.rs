//! Messages for the operator: lines on the standard error stream, which whoever started the VMM
//! leads where they are wanted.

use std::fmt::Arguments;
use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The most that is written in the life of a VMM, in bytes: what a guest does wrong is told, as
/// often as it does it, into a file of the host's.
const MOST: usize = 64 << 10;

/// What has been written so far.
static WRITTEN: AtomicUsize = AtomicUsize::new(0);

/// Writes one message. A stream that cannot be written to is no reason to fail.
pub fn write(message: Arguments<'_>) {
    let line = format!("bulkhead-vmm: {message}\n");
    if fits(&WRITTEN, line.len()) {
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
}

/// Takes up `bytes`, if they fit what may still be written.
fn fits(written: &AtomicUsize, bytes: usize) -> bool {
    let more = |written: usize| written.checked_add(bytes).filter(|sum| *sum <= MOST);
    let order = Ordering::Relaxed;
    written.fetch_update(order, order, more).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_bounded() {
        let written = AtomicUsize::new(0);
        assert!(fits(&written, MOST - 10));
        assert!(!fits(&written, 11));
        assert!(fits(&written, 10));
        assert!(!fits(&written, 1));
    }
}

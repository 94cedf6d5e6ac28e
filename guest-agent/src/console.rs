//! Lines for the guest's console, whose tail the host shows when a pod fails to start.

use std::io::Write;

/// Longest line, in bytes: the kernel cuts /dev/kmsg records near 1 KiB.
const MOST: usize = 900;

/// Writes one line to the kernel's log; without one, to standard error.
pub fn say(line: &str) {
    let line: String = line.chars().take(MOST / 4).collect();
    let record = format!("<5>bulkhead-agent: {line}\n");
    let written = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/kmsg")
        .and_then(|mut log| log.write_all(record.as_bytes()));
    if written.is_err() {
        let _ = writeln!(std::io::stderr(), "bulkhead-agent: {line}");
    }
}

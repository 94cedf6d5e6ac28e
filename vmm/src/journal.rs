//! Messages for the operator: lines on the standard error stream, which whoever started the VMM
//! leads where they are wanted.

use std::fmt::Arguments;
use std::io::Write;

/// Writes one message. A stream that cannot be written to is no reason to fail.
pub fn write(message: Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "bulkhead-vmm: {message}");
}

//! What a VMM leaves behind when its VM has ended.

use std::os::fd::AsFd;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// The most of the guest's console that is kept, in bytes.
pub const CONSOLE_TAIL_BYTES: usize = 16 << 10;

/// Written once, as JSON, to the file that [`crate::VmConfig::exit_record`] names: a restarted
/// server cannot wait for a process that is not its child.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// [`crate::VERSION`] of the writer.
    pub version: u32,
    /// Why the VM ended.
    pub reason: ExitReason,
    /// The last [`CONSOLE_TAIL_BYTES`] of the guest's console, with invalid UTF-8 replaced.
    pub console_tail: String,
}

/// The largest record that is read back, in bytes: a tail of control characters takes six bytes for
/// each in JSON.
const MAX_RECORD_BYTES: usize = 8 * CONSOLE_TAIL_BYTES;

impl ExitRecord {
    /// Reads a record back; `None` if the VMM wrote none, because it was killed or still runs.
    /// Fails if the file cannot be read or holds something else.
    pub fn read(file: impl AsFd) -> std::io::Result<Option<Self>> {
        let mut bytes = vec![0; MAX_RECORD_BYTES];
        let mut length = 0;
        while length < bytes.len() {
            match rustix::io::pread(&file, &mut bytes[length..], length as u64) {
                Ok(0) => break,
                Ok(count) => length += count,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if length == 0 {
            return Ok(None);
        }
        Ok(Some(serde_json::from_slice(&bytes[..length])?))
    }
}

/// Why a VM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// The server asked for it.
    Shutdown,
    /// The guest reset or powered off its machine.
    GuestReset,
    /// The guest's kernel panicked, as its console says.
    GuestPanic,
    /// A CPU of the guest could not deliver a double fault, which resets a PC: a fault of the guest's
    /// kernel or of the machine below. Where it stood is not known: KVM on AMD resets it first.
    TripleFault,
    /// The VM could not be built or confined; the guest never ran.
    StartFailed(String),
    /// KVM or a device gave up.
    Failed(String),
}

impl std::fmt::Display for ExitReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Shutdown => write!(f, "the VM was shut down"),
            Self::GuestReset => write!(f, "the guest reset its machine"),
            Self::GuestPanic => write!(f, "the guest's kernel panicked"),
            Self::TripleFault => write!(f, "a CPU of the guest met a triple fault"),
            Self::StartFailed(why) => write!(f, "the VM could not be started: {why}"),
            Self::Failed(why) => write!(f, "the VM failed: {why}"),
        }
    }
}

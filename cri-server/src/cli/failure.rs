//! How a command fails: a sentence for its user, and an exit status.

use std::fmt;

/// Bulkhead's own failures, as the container tools people know have them.
pub const OWN: u8 = 125;
/// The container's command cannot be executed.
pub const NOT_EXECUTABLE: u8 = 126;
/// The container's command is not there.
pub const NOT_FOUND: u8 = 127;

/// Why a command failed.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    /// The process's exit status.
    pub status: u8,
    /// What failed, and what to do.
    pub sentence: String,
}

impl Failure {
    /// One of Bulkhead's own.
    pub fn own(sentence: impl fmt::Display) -> Self {
        Self {
            status: OWN,
            sentence: sentence.to_string(),
        }
    }

    /// A call that the server refused.
    pub fn call(what: impl fmt::Display, status: &tonic::Status) -> Self {
        let reason = match status.message() {
            "" => format!("{:?}", status.code()),
            message => message.to_owned(),
        };
        Self::own(format!("cannot {what}: {reason}"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence)
    }
}

//! The first bytes of every stream between agent and host.
//!
//! AF_VSOCK is not namespaced, so any process of the guest might dial [`crate::PORT`]. The first
//! stream of a boot, opened before any container exists, greets with a secret of zeros and gets
//! the [`Secret`] of this boot back as the host's first 32 bytes; every later stream must show it.
//!
//! What follows the greeting depends on its purpose:
//! - [`Purpose::Control`]: (first stream only: 32 bytes of secret from the host, then) HTTP/2, the
//!   agent being the server.
//! - [`Purpose::Output`]: the agent sends the bytes of the process's output from `offset` on and
//!   shuts its side down at the end; the host answers with acknowledgements, each the absolute
//!   offset up to which it has written, 8 bytes little endian.
//! - [`Purpose::Input`]: the host sends the bytes of stdin and shuts its side down at the end. A host
//!   that closes the stream without that has not ended stdin: another stream may follow.
//! - [`Purpose::Forward`]: the bytes of a connection to a port of the pod, both ways; each side shuts
//!   its own down at its end.

use crate::VERSION;

/// Length of an encoded [`Greeting`].
pub const GREETING_BYTES: usize = 64;

const MAGIC: [u8; 4] = *b"BHGA";

/// Proves that a stream comes from the agent of this boot.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Secret(pub [u8; 32]);

impl Secret {
    /// What the first stream of a boot shows.
    pub const NONE: Self = Self([0; 32]);

    /// Compares in a time that does not depend on where the two differ.
    pub fn matches(&self, other: &Self) -> bool {
        self.0
            .iter()
            .zip(other.0)
            .fold(0, |differs, (a, b)| differs | (a ^ b))
            == 0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// What a stream is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Purpose {
    /// gRPC.
    Control = 1,
    /// Stdout or stderr of a process.
    Output = 2,
    /// Stdin of a process.
    Input = 3,
    /// A connection to a port of the pod.
    Forward = 4,
}

/// The first bytes of a stream, sent by the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// What the stream is for.
    pub purpose: Purpose,
    /// [`Secret::NONE`] on the first stream of a boot.
    pub secret: Secret,
    /// The token of the call that asked for it; 0 for control.
    pub token: u64,
    /// Output: the offset of the first byte that follows. Never below the one asked for.
    pub offset: u64,
}

/// Why bytes are not a greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GreetingError {
    /// Something else dialled.
    #[error("the stream does not begin with the agent's greeting")]
    Magic,
    /// An agent of another age.
    #[error("the agent greets with version {0}; this server speaks version {VERSION}")]
    Version(u8),
    /// A purpose this end does not know.
    #[error("the agent opened a stream for the unknown purpose {0}")]
    Purpose(u8),
}

impl Greeting {
    /// 4 bytes magic, 1 version, 1 purpose, 2 zero, 32 secret, 8 token, 8 offset (both little
    /// endian), 8 zero.
    pub fn encode(&self) -> [u8; GREETING_BYTES] {
        let mut bytes = [0; GREETING_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = VERSION as u8;
        bytes[5] = self.purpose as u8;
        bytes[8..40].copy_from_slice(&self.secret.0);
        bytes[40..48].copy_from_slice(&self.token.to_le_bytes());
        bytes[48..56].copy_from_slice(&self.offset.to_le_bytes());
        bytes
    }

    /// The reverse of [`Greeting::encode`].
    pub fn decode(bytes: &[u8; GREETING_BYTES]) -> Result<Self, GreetingError> {
        if bytes[..4] != MAGIC {
            return Err(GreetingError::Magic);
        }
        if u32::from(bytes[4]) != VERSION {
            return Err(GreetingError::Version(bytes[4]));
        }
        let purpose = match bytes[5] {
            1 => Purpose::Control,
            2 => Purpose::Output,
            3 => Purpose::Input,
            4 => Purpose::Forward,
            other => return Err(GreetingError::Purpose(other)),
        };
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        let mut secret = [0; 32];
        secret.copy_from_slice(&bytes[8..40]);
        Ok(Self {
            purpose,
            secret: Secret(secret),
            token: word(40),
            offset: word(48),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GREETING: Greeting = Greeting {
        purpose: Purpose::Output,
        secret: Secret([7; 32]),
        token: 42,
        offset: 1 << 40,
    };

    #[test]
    fn a_greeting_survives_the_wire() {
        assert_eq!(Greeting::decode(&GREETING.encode()), Ok(GREETING));
    }

    #[test]
    fn strangers_are_told_apart() {
        let mut bytes = GREETING.encode();
        bytes[5] = 9;
        assert_eq!(Greeting::decode(&bytes), Err(GreetingError::Purpose(9)));
        bytes[4] = 2;
        assert_eq!(Greeting::decode(&bytes), Err(GreetingError::Version(2)));
        bytes[0] = 0;
        assert_eq!(Greeting::decode(&bytes), Err(GreetingError::Magic));
    }

    #[test]
    fn a_secret_matches_only_itself() {
        assert!(Secret([7; 32]).matches(&Secret([7; 32])));
        assert!(!Secret([7; 32]).matches(&Secret::NONE));
    }
}

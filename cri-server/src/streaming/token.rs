//! Tokens: what a URL stands for, until it is used or too old.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rustix::rand::GetRandomFlags;

use super::session::Task;

/// The most tokens that wait for their client.
const MOST: usize = 1000;
/// How long a token waits for its client.
const LIFE: Duration = Duration::from_secs(60);
/// How much of chance is in a token: 192 bits.
const BYTES: usize = 24;

/// What a URL is for; the first part of its path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `exec`.
    Exec,
    /// `attach`.
    Attach,
    /// `portforward`.
    PortForward,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Exec => "exec",
            Self::Attach => "attach",
            Self::PortForward => "portforward",
        })
    }
}

/// Why there is no further token.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// Too many wait.
    #[error(
        "{MOST} URLs of the streaming server wait for their clients, which is as many as there \
         may be; one is freed when it is used, and after {} seconds", LIFE.as_secs()
    )]
    Full,
    /// The kernel gives no random bytes.
    #[error("no token can be drawn: {0}")]
    Random(rustix::io::Errno),
}

/// The tokens that wait for their clients.
#[derive(Default)]
pub struct Tokens(Mutex<HashMap<String, Waiting>>);

struct Waiting {
    until: Instant,
    kind: Kind,
    task: Task,
}

impl Tokens {
    /// A token for `task`, drawn at `now`; 32 characters that a URL may have.
    pub fn add(&self, kind: Kind, task: Task, now: Instant) -> Result<String, Full> {
        let mut bytes = [0; BYTES];
        // Requests of up to 256 bytes are answered whole.
        rustix::rand::getrandom(&mut bytes, GetRandomFlags::empty()).map_err(Full::Random)?;
        let token = URL_SAFE_NO_PAD.encode(bytes);
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() >= MOST {
            waiting.retain(|_, one| one.until > now);
        }
        if waiting.len() >= MOST {
            return Err(Full::Full);
        }
        let until = now + LIFE;
        waiting.insert(token.clone(), Waiting { until, kind, task });
        Ok(token)
    }

    /// What `token` stands for, if it is one for `kind`, was not taken before, and is not too old.
    pub fn take(&self, kind: Kind, token: &str, now: Instant) -> Option<Task> {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.get(token)?.kind != kind {
            return None;
        }
        let one = waiting.remove(token)?;
        (one.until > now).then_some(one.task)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task() -> Task {
        Task::Forward(Vec::new(), Box::new(|_| Box::pin(async {})))
    }

    #[test]
    fn a_token_is_taken_once_in_time_and_for_what_it_was_made() {
        let (tokens, now) = (Tokens::default(), Instant::now());
        let token = tokens.add(Kind::Exec, task(), now).unwrap();
        assert!(tokens.take(Kind::Attach, &token, now).is_none());
        assert!(tokens.take(Kind::Exec, "", now).is_none());
        assert!(tokens.take(Kind::Exec, &token, now).is_some());
        assert!(tokens.take(Kind::Exec, &token, now).is_none());
        let late = tokens.add(Kind::Exec, task(), now).unwrap();
        assert_ne!(token, late);
        assert!(tokens.take(Kind::Exec, &late, now + LIFE).is_none());
    }

    #[test]
    fn tokens_are_bounded_and_old_ones_make_room() {
        let (tokens, now) = (Tokens::default(), Instant::now());
        for _ in 0..MOST {
            tokens.add(Kind::PortForward, task(), now).unwrap();
        }
        let refusal = tokens.add(Kind::Exec, task(), now);
        assert_eq!(refusal, Err(Full::Full));
        tokens.add(Kind::Exec, task(), now + LIFE).unwrap();
        assert_eq!(tokens.0.lock().unwrap().len(), 1);
    }
}

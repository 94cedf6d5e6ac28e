//! The one time limit of a request.

use std::future::Future;
use std::time::Duration;

use tokio::time::Instant;

/// The moment by which a request must be answered: made at the RPC's edge and handed down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Instant);

/// The time of a request is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the time limit passed")]
pub struct Passed;

impl Deadline {
    /// The moment `limit` from now.
    pub fn after(limit: Duration) -> Self {
        let now = Instant::now();
        // A limit beyond the clock's range is as good as a year.
        let year = Duration::from_secs(365 * 24 * 3600);
        Self(now.checked_add(limit.min(year)).unwrap_or(now))
    }

    /// The earlier of this deadline and the moment `limit` from now.
    pub fn at_most(self, limit: Duration) -> Self {
        self.min(Self::after(limit))
    }

    /// Awaits `work`, but not longer than until this moment.
    pub async fn bound<T>(self, work: impl Future<Output = T>) -> Result<T, Passed> {
        tokio::time::timeout_at(self.0, work)
            .await
            .map_err(|_| Passed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_that_never_ends_is_given_up() {
        let deadline = Deadline::after(Duration::from_millis(1));
        let endless = std::future::pending::<()>();
        assert_eq!(deadline.bound(endless).await, Err(Passed));
    }

    #[tokio::test]
    async fn a_deadline_can_only_come_nearer() {
        let near = Deadline::after(Duration::from_secs(1));
        assert_eq!(near.at_most(Duration::from_secs(100)), near);
        assert!(near.at_most(Duration::ZERO) < near);
    }
}

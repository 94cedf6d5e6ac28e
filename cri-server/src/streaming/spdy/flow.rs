//! Flow control of what is sent (SPDY/3.1, 2.6.8): a window for each stream and one for all.
//!
//! The clients of Kubernetes neither tell of their windows nor keep to ours: what slows the server
//! down is that they do not read. So windows hold only for a client that has told of them.

use std::collections::HashMap;

use tokio::sync::watch;

use super::frame::Reset;

/// Windows at the start.
const INITIAL: i64 = 64 << 10;
/// The largest window there can be.
const LARGEST: i64 = (1 << 31) - 1;

/// The client's windows, shared by those who send.
pub struct Flow(watch::Sender<Windows>);

struct Windows {
    told: bool,
    initial: i64,
    all: i64,
    streams: HashMap<u32, i64>,
}

impl Flow {
    /// At the start of a connection.
    pub fn new() -> Self {
        Self(watch::Sender::new(Windows {
            told: false,
            initial: INITIAL,
            all: INITIAL,
            streams: HashMap::new(),
        }))
    }

    /// A stream begins.
    pub fn open(&self, id: u32) {
        self.change(|windows| {
            windows.streams.insert(id, windows.initial);
        });
    }

    /// A stream is over: nobody waits for its window for ever.
    pub fn close(&self, id: u32) {
        self.change(|windows| {
            windows.streams.remove(&id);
        });
    }

    /// The client takes `delta` more of a stream, or with 0 of all together. The error is for the
    /// stream, or the connection.
    pub fn update(&self, id: u32, delta: u32) -> Result<(), Reset> {
        let mut result = Ok(());
        self.change(|windows| {
            windows.told = true;
            let window = match id {
                0 => Some(&mut windows.all),
                id => windows.streams.get_mut(&id),
            };
            // A stream may be over when its last update comes.
            let Some(window) = window else { return };
            match window.saturating_add(delta.into()) {
                larger if larger > LARGEST => result = Err(Reset::FlowControl),
                larger => *window = larger,
            }
        });
        result
    }

    /// The client has told what windows are like at the start, of streams that there are too.
    pub fn settings(&self, window: Option<u32>) -> Result<(), Reset> {
        let mut result = Ok(());
        self.change(|windows| {
            windows.told = true;
            let Some(window) = window.map(i64::from) else {
                return;
            };
            let more = window - windows.initial;
            let largest = windows.streams.values().max().copied().unwrap_or(0);
            if window > LARGEST || largest.saturating_add(more) > LARGEST {
                result = Err(Reset::FlowControl);
                return;
            }
            windows.initial = window;
            windows.streams.values_mut().for_each(|one| *one += more);
        });
        result
    }

    /// Waits until something may be sent on a stream, and takes it: 1 to `most` bytes. `None` if
    /// the stream is over.
    pub async fn take(&self, id: u32, most: usize) -> Option<usize> {
        let mut changes = self.0.subscribe();
        loop {
            let mut taken = None;
            self.0.send_if_modified(|windows| {
                taken = windows.take(id, most);
                false
            });
            match taken {
                Some(0) => {}
                taken => return taken,
            }
            // The sender lives as long as `self`.
            changes.changed().await.ok()?;
        }
    }

    fn change(&self, change: impl FnOnce(&mut Windows)) {
        self.0.send_modify(change);
    }
}

impl Windows {
    fn take(&mut self, id: u32, most: usize) -> Option<usize> {
        let window = self.streams.get_mut(&id)?;
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        let taken = match self.told {
            true => most.min(*window).min(self.all).max(0),
            false => most,
        };
        *window = window.saturating_sub(taken);
        self.all = self.all.saturating_sub(taken);
        usize::try_from(taken).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    async fn waits(flow: &Flow, id: u32) -> bool {
        let taken = flow.take(id, 1);
        tokio::time::timeout(Duration::from_millis(20), taken)
            .await
            .is_err()
    }

    #[tokio::test]
    async fn a_client_that_tells_no_window_is_sent_all() {
        let flow = Flow::new();
        flow.open(1);
        for _ in 0..100 {
            assert_eq!(flow.take(1, 10_000).await, Some(10_000));
        }
    }

    #[tokio::test]
    async fn windows_of_a_stream_and_of_all_are_kept_to_from_the_first_byte() {
        let flow = Flow::new();
        flow.open(1);
        flow.open(3);
        assert_eq!(flow.take(1, 40_000).await, Some(40_000));
        flow.settings(None).unwrap();
        assert_eq!(flow.take(1, 40_000).await, Some(25_536));
        assert!(waits(&flow, 1).await && waits(&flow, 3).await);
        flow.update(0, 1000).unwrap();
        assert!(waits(&flow, 1).await);
        assert_eq!(flow.take(3, 600).await, Some(600));
        flow.update(1, 5).unwrap();
        assert_eq!(flow.take(1, 600).await, Some(5));
        flow.update(1, 600).unwrap();
        assert_eq!(flow.take(1, 600).await, Some(395));
    }

    #[tokio::test]
    async fn a_smaller_initial_window_counts_for_streams_that_there_are() {
        let flow = Flow::new();
        flow.open(1);
        assert_eq!(flow.take(1, 100).await, Some(100));
        flow.settings(Some(50)).unwrap();
        assert!(waits(&flow, 1).await);
        flow.update(1, 51).unwrap();
        assert_eq!(flow.take(1, 100).await, Some(1));
        flow.open(3);
        assert_eq!(flow.take(3, 100).await, Some(50));
    }

    #[tokio::test]
    async fn windows_that_cannot_be_are_refused() {
        let flow = Flow::new();
        flow.open(1);
        flow.update(9, 1 << 30).unwrap();
        assert_eq!(flow.update(1, LARGEST as u32), Err(Reset::FlowControl));
        assert_eq!(flow.update(0, LARGEST as u32), Err(Reset::FlowControl));
        assert_eq!(flow.settings(Some(u32::MAX)), Err(Reset::FlowControl));
    }

    #[tokio::test]
    async fn who_waits_for_a_stream_that_is_over_is_told() {
        let flow = Flow::new();
        flow.open(1);
        flow.settings(Some(0)).unwrap();
        let close = async {
            tokio::task::yield_now().await;
            flow.close(1);
        };
        let (taken, ()) = tokio::join!(flow.take(1, 1), close);
        assert_eq!(taken, None);
    }
}

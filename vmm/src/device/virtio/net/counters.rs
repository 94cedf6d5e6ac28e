//! What the device counts. The worker adds what a turn has moved at the turn's end, so that a
//! frame costs nothing here.

use std::sync::atomic::{AtomicU64, Ordering};

use bulkhead_vmm_api::{FlowCounters, InterfaceCounters};

use super::HEADER_BYTES;

/// Both directions, since the device was made. The workers write, others read.
#[derive(Debug, Default)]
pub struct Counters {
    pub(super) received: Flow,
    pub(super) sent: Flow,
}

impl Counters {
    /// As they are, for the interface in `window`.
    pub fn read(&self, window: u8) -> InterfaceCounters {
        InterfaceCounters {
            window,
            received: self.received.read(),
            sent: self.sent.read(),
        }
    }
}

/// One direction.
#[derive(Debug, Default)]
pub(super) struct Flow {
    frames: AtomicU64,
    bytes: AtomicU64,
    lost: AtomicU64,
    notifications: AtomicU64,
    interrupts: AtomicU64,
}

/// What one turn has moved.
#[derive(Debug, Default)]
pub(super) struct Turn {
    frames: u64,
    bytes: u64,
    lost: u64,
}

impl Turn {
    /// A frame of `bytes` with its header.
    pub fn moved(&mut self, bytes: usize) {
        self.frames += 1;
        self.bytes += bytes.saturating_sub(HEADER_BYTES) as u64;
    }

    /// A frame that goes no further.
    pub fn lost(&mut self) {
        self.lost += 1;
    }
}

impl Flow {
    /// Adds a turn, and whether the guest was interrupted after it.
    pub fn add(&self, turn: &Turn, interrupted: bool) {
        for (counter, more) in [
            (&self.frames, turn.frames),
            (&self.bytes, turn.bytes),
            (&self.lost, turn.lost),
            (&self.interrupts, interrupted.into()),
        ] {
            if more > 0 {
                counter.fetch_add(more, Ordering::Relaxed);
            }
        }
    }

    /// Adds notifications by the guest.
    pub fn notified(&self, count: u64) {
        self.notifications.fetch_add(count, Ordering::Relaxed);
    }

    fn read(&self) -> FlowCounters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        FlowCounters {
            frames: read(&self.frames),
            bytes: read(&self.bytes),
            lost: read(&self.lost),
            notifications: read(&self.notifications),
            interrupts: read(&self.interrupts),
        }
    }
}

//! virtio devices, by the transport-independent part of virtio 1.2.
//!
//! A device that is not started holds no guest memory and no queue. Starting *moves* the queues
//! into the device's worker, so that the transport cannot change them afterwards; stopping gives
//! the device back.

pub mod blk;
#[cfg(test)]
mod driver;
pub mod mmio;
pub mod net;
mod ring;
pub mod rng;
mod thread;
pub mod vsock;
mod worker;

use std::sync::Arc;

use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// Guest memory, shared with every worker.
pub type Memory = Arc<GuestMemoryMmap>;

/// A device that is not running.
pub trait Device: Send {
    /// Device ID (virtio 1.2 §5).
    fn kind(&self) -> u32;
    /// Features offered beside `VIRTIO_F_VERSION_1`, which the transport adds.
    fn features(&self) -> u64;
    /// The largest size of each queue.
    fn queue_sizes(&self) -> &[u16];
    /// The configuration space, little endian.
    fn config(&self) -> &[u8];
    /// What it counts, if it is a network interface.
    fn counters(&self) -> Option<Arc<net::Counters>> {
        None
    }
    /// Takes the queues and runs until stopped. A failure leaves the device unusable until the
    /// VM ends (the transport sets DEVICE_NEEDS_RESET).
    fn start(self: Box<Self>, active: Active) -> Result<Box<dyn Running>, StartError>;
}

/// A device that runs in a worker of its own.
pub trait Running: Send {
    /// Ends the worker when its requests in flight are done, and gives the device back.
    fn stop(self: Box<Self>) -> Box<dyn Device>;
}

/// What a device gets when the driver has set DRIVER_OK.
pub struct Active {
    /// Guest memory.
    pub memory: Memory,
    /// The queues in their order, configured and checked, each with the event the guest kicks.
    pub queues: Vec<ActiveQueue>,
    /// Tells the guest.
    pub interrupt: Interrupt,
    /// What was negotiated.
    pub features: u64,
}

/// One queue of a running device.
pub struct ActiveQueue {
    /// The queue. Not ready if the driver left it out.
    pub queue: Queue,
    /// Written by KVM when the guest notifies this queue.
    pub kick: EventFd,
}

/// Bits of the shared status: the two of InterruptStatus (virtio 1.2 §4.2.2), and one that the
/// transport shows in the device status instead.
const USED_BUFFER: u32 = 1;
const CONFIGURATION: u32 = 2;
const NEEDS_RESET: u32 = 1 << 31;

/// The interrupt of a window. Clones share it.
#[derive(Clone)]
pub struct Interrupt {
    status: Arc<std::sync::atomic::AtomicU32>,
    line: Arc<EventFd>,
}

impl Interrupt {
    /// An interrupt whose `line` is an irqfd and whose `status` the transport shows as
    /// InterruptStatus (virtio 1.2 §4.2.2).
    pub fn new(status: Arc<std::sync::atomic::AtomicU32>, line: Arc<EventFd>) -> Self {
        Self { status, line }
    }

    /// Used buffer notification (virtio 1.2 §2.3).
    pub fn queue(&self) {
        self.raise(USED_BUFFER);
    }

    /// The device met something it cannot go on from, such as a malformed ring: the transport
    /// shows DEVICE_NEEDS_RESET and tells the driver (virtio 1.2 §2.1.2). The worker shall leave
    /// its queues alone from then on, and wait to be stopped.
    pub fn needs_reset(&self) {
        self.raise(CONFIGURATION | NEEDS_RESET);
    }

    fn raise(&self, bit: u32) {
        self.status
            .fetch_or(bit, std::sync::atomic::Ordering::SeqCst);
        // An eventfd's counter cannot overflow at one per interrupt: the kernel drains it.
        let _ = self.line.write(1);
    }
}

/// Why a device could not start.
#[derive(Debug, thiserror::Error)]
#[error("The {device} device could not start: {why}.")]
pub struct StartError {
    /// Which device.
    pub device: &'static str,
    /// What failed.
    pub why: String,
}

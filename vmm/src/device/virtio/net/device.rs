//! The device as the transport sees it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::EventFd;

use super::counters::Counters;
use super::sys::{self, Offload};
use super::worker::{Fault, Part, Worker};
use super::{ETHERNET_BYTES, HEADER_BYTES, SEGMENTED_BYTES};
use crate::device::virtio::thread::{Poll, Thread};
use crate::device::virtio::{Active, ActiveQueue, Device, Running, StartError};

/// Entries of a receive or transmit queue, and of the control queue.
const QUEUE_SIZE: u16 = 256;
const CONTROL_SIZE: u16 = 64;
/// Everything that a tap can leave undone.
const FULL: Offload = Offload {
    checksum: true,
    tcp4: true,
    tcp6: true,
    congestion: true,
};

/// A network interface that is not running. Clones share what is open.
#[derive(Clone)]
pub struct Net {
    /// The tap's queues, one for each pair of the guest's.
    taps: Arc<[OwnedFd]>,
    /// How many of them, from the first on, are attached.
    attached: Arc<AtomicUsize>,
    mtu: u16,
    /// Whether the tap can leave checksums and segmentation undone.
    offloads: bool,
    config: [u8; 12],
    queue_sizes: Vec<u16>,
    pub(super) counters: Arc<Counters>,
}

impl Net {
    /// A device on the queues of a tap, all attached; it has to be
    /// `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR` with a header of 12 bytes. The guest gets the hardware
    /// address `mac` and may send payloads of `mtu` bytes.
    /// Fails if there is no queue, or the tap has another header or is not open.
    pub fn new(taps: Vec<OwnedFd>, mac: [u8; 6], mtu: u16) -> io::Result<Self> {
        let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidInput, why);
        let first = taps.first();
        let first = first.ok_or_else(|| invalid("it has no tap".to_owned()))?;
        // A tap without offloads, or anything else that carries frames, does everything itself.
        let offloads = sys::set_offload(first.as_fd(), FULL).is_ok();
        if let Ok(bytes) = sys::header_bytes(first.as_fd())
            && usize::try_from(bytes) != Ok(HEADER_BYTES)
        {
            return Err(invalid(format!(
                "the tap has a header of {bytes} bytes; it has to be {HEADER_BYTES}"
            )));
        }
        for tap in &taps {
            let flags = fcntl_getfl(tap)?;
            fcntl_setfl(tap, flags | OFlags::NONBLOCK)?;
        }
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * taps.len()];
        // A guest that has no choice needs no control queue.
        if taps.len() > 1 {
            queue_sizes.push(CONTROL_SIZE);
        }
        let mut config = [0; 12];
        let pairs = u16::try_from(taps.len()).unwrap_or(u16::MAX);
        // `struct virtio_net_config` (§5.1.4): mac, status, max_virtqueue_pairs, mtu.
        config[0..6].copy_from_slice(&mac);
        config[8..10].copy_from_slice(&pairs.to_le_bytes());
        config[10..12].copy_from_slice(&mtu.to_le_bytes());
        Ok(Self {
            attached: Arc::new(AtomicUsize::new(taps.len())),
            taps: taps.into(),
            mtu,
            offloads,
            config,
            queue_sizes,
            counters: Arc::default(),
        })
    }

    /// The tap's queue of a pair, the first if there is no such pair.
    pub(super) fn tap(&self, pair: usize) -> BorrowedFd<'_> {
        self.taps.get(pair).unwrap_or(&self.taps[0]).as_fd()
    }

    /// Lets the tap use its first `pairs` queues. Only one worker does this, or nobody runs.
    pub(super) fn use_pairs(&self, pairs: usize) -> io::Result<()> {
        let mut attached = self.attached.load(Ordering::Relaxed);
        while attached != pairs {
            let more = attached < pairs;
            attached = if more { attached } else { attached - 1 };
            sys::attach(self.tap(attached), more)?;
            attached += usize::from(more);
            self.attached.store(attached, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The largest frame that the tap may have for a guest that negotiated `features`, with its
    /// header.
    pub(super) fn largest_frame(&self, features: u64) -> usize {
        let offload = offload(features);
        let payload = if offload.tcp4 || offload.tcp6 {
            SEGMENTED_BYTES
        } else {
            usize::from(self.mtu)
        };
        HEADER_BYTES + ETHERNET_BYTES + payload
    }

    /// Takes the queues: a worker for each pair that the driver has set up, the first of them with
    /// the control queue, if there is one (§5.1.2).
    fn workers(&self, active: Active) -> Result<Vec<(Worker, EventFd)>, Fault> {
        let count = active.queues.len();
        let mut queues = active.queues.into_iter();
        let most = match has(active.features, VIRTIO_NET_F_MQ) {
            true => self.taps.len(),
            false => 1,
        };
        let mut pairs = Vec::new();
        for _ in 0..most {
            let (Some(receive), Some(transmit)) = (queues.next(), queues.next()) else {
                return Err(Fault::Queues(count));
            };
            pairs.push((receive, transmit));
        }
        let ready = |(receive, transmit): &(ActiveQueue, ActiveQueue)| {
            receive.queue.ready() && transmit.queue.ready()
        };
        // The first is needed; a worker says what is wrong with it.
        let usable = pairs.iter().take_while(|pair| ready(pair)).count().max(1);
        let mut control = match has(active.features, VIRTIO_NET_F_CTRL_VQ) {
            true => queues.next().filter(|control| control.queue.ready()),
            false => None,
        };
        let mut workers = Vec::new();
        for (pair, (receive, transmit)) in pairs.into_iter().take(usable).enumerate() {
            let poll = Poll::new().map_err(Fault::Poll)?;
            let stop = poll.stopper().map_err(Fault::Poll)?;
            let device = Box::new(self.clone());
            let part = Part {
                pair,
                receive,
                transmit,
                control: control.take().map(|queue| (queue, usable)),
                memory: active.memory.clone(),
                interrupt: active.interrupt.clone(),
                features: active.features,
            };
            workers.push((Worker::new(device, part, poll)?, stop));
        }
        Ok(workers)
    }
}

/// The workers of a device with several pairs of queues.
struct Workers {
    device: Box<Net>,
    threads: Vec<Box<dyn Running>>,
}

impl Running for Workers {
    fn stop(self: Box<Self>) -> Box<dyn Device> {
        for thread in self.threads {
            // Each returns a clone of the device.
            drop(thread.stop());
        }
        self.device
    }
}

/// Whether `features` has the feature bit `bit`.
pub(super) fn has(features: u64, bit: u32) -> bool {
    features >> bit & 1 == 1
}

/// What the guest lets the tap leave undone. A feature without those that it needs (§5.1.3.1) does
/// not count.
fn offload(features: u64) -> Offload {
    let checksum = has(features, VIRTIO_NET_F_GUEST_CSUM);
    let tcp4 = checksum && has(features, VIRTIO_NET_F_GUEST_TSO4);
    let tcp6 = checksum && has(features, VIRTIO_NET_F_GUEST_TSO6);
    Offload {
        checksum,
        tcp4,
        tcp6,
        congestion: (tcp4 || tcp6) && has(features, VIRTIO_NET_F_GUEST_ECN),
    }
}

impl Device for Net {
    fn kind(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        let bits = |bits: &[u32]| bits.iter().fold(0, |sum, bit| sum | 1u64 << bit);
        let plain = bits(&[
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_MTU,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
        ]);
        let offloads = bits(&[
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
        ]);
        let several = match self.taps.len() {
            1 => 0,
            _ => bits(&[VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ]),
        };
        let offloads = if self.offloads { offloads } else { 0 };
        plain | several | offloads
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn counters(&self) -> Option<Arc<Counters>> {
        Some(Arc::clone(&self.counters))
    }

    fn start(self: Box<Self>, active: Active) -> Result<Box<dyn Running>, StartError> {
        let failed = |why: String| StartError { device: "net", why };
        if self.offloads {
            sys::set_offload(self.tap(0), offload(active.features))
                .map_err(|error| failed(format!("its tap refuses the offloads: {error}")))?;
        }
        // "The driver must not use more than one pair before it asks for them" (§5.1.6.5.5).
        self.use_pairs(1)
            .map_err(|error| failed(format!("its tap's queues cannot be detached: {error}")))?;
        let workers = self.workers(active);
        let workers = workers.map_err(|fault| failed(fault.to_string()))?;
        let mut running = Box::new(Workers {
            device: self,
            threads: Vec::with_capacity(workers.len()),
        });
        for (worker, stop) in workers {
            match Thread::start("net", stop, move || worker.run()) {
                Ok(thread) => running.threads.push(thread),
                Err(error) => {
                    running.stop();
                    return Err(error);
                }
            }
        }
        Ok(running)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_feature_without_those_it_needs_does_not_count() {
        let of = |bits: &[u32]| offload(bits.iter().fold(0, |sum, bit| sum | 1u64 << bit));
        let (csum, tso4) = (VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4);
        let (tso6, ecn) = (VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_ECN);
        assert_eq!(of(&[csum, tso4, tso6, ecn]), FULL);
        assert_eq!(of(&[tso4, tso6, ecn]), Offload::default());
        let only = |tcp4, tcp6, congestion| Offload {
            checksum: true,
            tcp4,
            tcp6,
            congestion,
        };
        assert_eq!(of(&[csum, ecn]), only(false, false, false));
        assert_eq!(of(&[csum, tso6]), only(false, true, false));
        assert_eq!(of(&[csum, tso6, ecn]), only(false, true, true));
    }
}

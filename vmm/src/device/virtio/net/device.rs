//! The device as the transport sees it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::counters::Counters;
use super::sys::{self, Offload};
use super::worker::Worker;
use super::{ETHERNET_BYTES, HEADER_BYTES, SEGMENTED_BYTES};
use crate::device::virtio::thread::{Poll, Thread};
use crate::device::virtio::{Active, Device, Running, StartError};

/// Entries of the receive and the transmit queue.
const QUEUE_SIZES: [u16; 2] = [256, 256];
/// Everything that a tap can leave undone.
const FULL: Offload = Offload {
    checksum: true,
    tcp4: true,
    tcp6: true,
    congestion: true,
};

/// A network interface that is not running.
pub struct Net {
    tap: OwnedFd,
    mtu: u16,
    /// Whether the tap can leave checksums and segmentation undone.
    offloads: bool,
    config: [u8; 12],
    pub(super) counters: Arc<Counters>,
}

impl Net {
    /// A device on `tap`, which has to be `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR` with a header of 12
    /// bytes. The guest gets the hardware address `mac` and may send payloads of `mtu` bytes.
    /// Fails if the tap has another header or is not open.
    pub fn new(tap: OwnedFd, mac: [u8; 6], mtu: u16) -> io::Result<Self> {
        // A tap without offloads, or anything else that carries frames, does everything itself.
        let offloads = sys::set_offload(tap.as_fd(), FULL).is_ok();
        if let Ok(bytes) = sys::header_bytes(tap.as_fd())
            && usize::try_from(bytes) != Ok(HEADER_BYTES)
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("the tap has a header of {bytes} bytes; it has to be {HEADER_BYTES}"),
            ));
        }
        let flags = fcntl_getfl(&tap)?;
        fcntl_setfl(&tap, flags | OFlags::NONBLOCK)?;
        let mut config = [0; 12];
        // `struct virtio_net_config` (§5.1.4): mac, status, max_virtqueue_pairs, mtu.
        config[0..6].copy_from_slice(&mac);
        config[8..10].copy_from_slice(&1u16.to_le_bytes());
        config[10..12].copy_from_slice(&mtu.to_le_bytes());
        Ok(Self {
            tap,
            mtu,
            offloads,
            config,
            counters: Arc::default(),
        })
    }

    pub(super) fn tap(&self) -> BorrowedFd<'_> {
        self.tap.as_fd()
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
        if self.offloads {
            plain | offloads
        } else {
            plain
        }
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
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
            sys::set_offload(self.tap(), offload(active.features))
                .map_err(|error| failed(format!("its tap refuses the offloads: {error}")))?;
        }
        let poll = Poll::new().map_err(|error| failed(error.to_string()))?;
        let stop = poll.stopper().map_err(|error| failed(error.to_string()))?;
        let worker = Worker::new(self, active, poll).map_err(|fault| failed(fault.to_string()))?;
        Thread::start("net", stop, move || worker.run())
    }
}

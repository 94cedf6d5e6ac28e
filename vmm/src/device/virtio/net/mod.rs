//! virtio-net (virtio 1.2 §5.1): a tap as the guest's network interface.
//!
//! Frames go straight between the tap and the guest's memory, with the header that both sides
//! share (`struct virtio_net_hdr`), so that checksums and segmentation can be left to whoever does
//! them last. The device opens nothing: the tap arrives as an open descriptor.

mod buffers;
mod control;
mod counters;
mod device;
mod sys;
mod worker;

pub use counters::Counters;
pub use device::Net;

/// Bytes of the header before each frame (virtio 1.2 §5.1.6).
const HEADER_BYTES: usize = 12;
/// Bytes of an Ethernet header with a VLAN tag.
const ETHERNET_BYTES: usize = 18;
/// The largest payload of a frame that is segmented later.
const SEGMENTED_BYTES: usize = 65535;

#[cfg(test)]
mod tests;

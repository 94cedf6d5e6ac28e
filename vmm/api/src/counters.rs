//! What a network interface has moved.

use serde::{Deserialize, Serialize};

/// A network interface since it was attached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InterfaceCounters {
    /// The window that it is in.
    pub window: u8,
    /// From the network to the guest.
    pub received: FlowCounters,
    /// From the guest to the network.
    pub sent: FlowCounters,
}

/// One direction. A frame may be a large one that is segmented later, or was put together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowCounters {
    /// Frames.
    pub frames: u64,
    /// Bytes of these frames, without the header of virtio.
    pub bytes: u64,
    /// Frames that were lost here: too long or too short, or refused by the tap.
    pub lost: u64,
    /// Notifications by the guest: exits of the guest to the hypervisor.
    pub notifications: u64,
    /// Interrupts of the guest.
    pub interrupts: u64,
}

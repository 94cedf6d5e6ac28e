//! The protocol of `control.sock`: one JSON message per `SOCK_SEQPACKET` packet.
//!
//! How packets are sent and received is in [`crate::wire`]. The VMM listens; the newest connection is the server, an older one is closed. The server sends
//! [`ToVmm`], the VMM [`FromVmm`]. Descriptors only travel towards the VMM (`SCM_RIGHTS`).

use serde::{Deserialize, Serialize};

use crate::{Device, InterfaceCounters};

/// The largest packet either end sends or accepts, in bytes.
pub const MAX_PACKET_BYTES: usize = 128 << 10;
/// The most descriptors that come with one packet.
pub const MAX_PACKET_FDS: usize = 64;

/// From the server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToVmm {
    /// Do something and answer with [`FromVmm::Reply`].
    Request {
        /// Names the operation. The same id again gets the same answer and does nothing.
        operation: String,
        /// What to do.
        action: Action,
    },
    /// Answers a [`FromVmm::Dial`]. One connected stream socket comes with the packet, or none to
    /// refuse.
    Stream {
        /// Which dial.
        stream: u64,
    },
}

/// From the VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromVmm {
    /// The answer to a request.
    Reply {
        /// The request's operation.
        operation: String,
        /// What came of it; the error is a sentence for the operator.
        result: Result<Reply, String>,
    },
    /// The guest dials a port of the host over vsock.
    Dial {
        /// A number never used before by this VM.
        stream: u64,
        /// The port dialled.
        port: u32,
    },
}

/// What a running VM can be asked to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Stop the vCPUs.
    Pause,
    /// Let the vCPUs run on.
    Resume,
    /// Put a device into a free window; its descriptors come with the packet.
    Attach {
        /// The device.
        device: Device,
    },
    /// Empty a window. The guest has unbound its driver before.
    Detach {
        /// The window, as [`Reply::Attached`] named it.
        window: u8,
    },
    /// Tell how the VM is.
    Stats,
    /// End the VM at once, flushing its disks.
    Shutdown,
}

/// What came of an [`Action`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Done; nothing to say.
    Done,
    /// The device is in this window: `virtio-mmio.<window>` in the guest's sysfs.
    Attached {
        /// 0 to [`crate::WINDOWS`] - 1.
        window: u8,
    },
    /// How the VM is.
    Stats {
        /// Whether the vCPUs are stopped.
        paused: bool,
        /// The last bytes of the guest's console.
        console_tail: String,
        /// What its network interfaces have moved, in the order of their windows. An older VMM
        /// does not say.
        #[serde(default)]
        interfaces: Vec<InterfaceCounters>,
    },
}

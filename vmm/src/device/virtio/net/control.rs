//! The control queue (virtio 1.2 §5.1.6.5), for how many pairs of queues the guest uses. Nothing
//! else can be commanded here, as no other feature with commands is offered.

use std::os::fd::RawFd;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use vm_memory::{Bytes, GuestMemoryMmap};

use super::buffers::collect;
use super::device::Net;
use crate::device::virtio::ring::{Ring, RingError};
use crate::device::virtio::{ActiveQueue, Interrupt};
use crate::journal;

/// Commands served before others have their turn.
const TURN: usize = 16;
/// Class, command, and a number of 16 bits.
const COMMAND_BYTES: usize = 4;

/// The control queue of a running device.
pub(super) struct Control {
    ring: Ring,
    /// The pairs that the guest may ask for.
    most: usize,
}

impl Control {
    /// Takes over the queue.
    pub fn new(
        queue: ActiveQueue,
        memory: &GuestMemoryMmap,
        features: u64,
        most: usize,
    ) -> Result<Self, RingError> {
        let ring = Ring::new("control", queue, memory, features)?;
        Ok(Self { ring, most })
    }

    /// The event by which the guest kicks; then [`Self::kicked`].
    pub fn kick(&self) -> RawFd {
        self.ring.kick()
    }

    /// The guest has kicked.
    pub fn kicked(&mut self) {
        self.ring.kicked();
    }

    /// Does what the guest commands. Returns whether there may be more.
    pub fn serve(
        &mut self,
        device: &Net,
        memory: &GuestMemoryMmap,
        interrupt: &Interrupt,
    ) -> Result<bool, RingError> {
        for _ in 0..TURN {
            let Some(chain) = self.ring.next(memory)? else {
                break;
            };
            let head = chain.head_index();
            let (mut command, mut answer) = (Vec::new(), Vec::new());
            collect(&self.ring, memory, chain.clone(), false, &mut command)?;
            collect(&self.ring, memory, chain, true, &mut answer)?;
            // The last byte is the answer (struct virtio_net_ctrl).
            let Some((place, last)) = answer
                .last()
                .and_then(|place| Some((place, place.len().checked_sub(1)?)))
            else {
                return Err(self.ring.unusable(0, 0));
            };
            let mut bytes = Vec::with_capacity(COMMAND_BYTES);
            for piece in &command {
                let mut part = vec![0; piece.len().min(COMMAND_BYTES - bytes.len())];
                // As long as the piece, at most.
                let _ = piece.read_slice(&mut part, 0);
                bytes.extend(part);
            }
            let result = match self.obey(device, &bytes) {
                true => VIRTIO_NET_OK,
                false => VIRTIO_NET_ERR,
            };
            // The offset is that of the last byte.
            let _ = place.write_slice(&[result as u8], last);
            self.ring.put(memory, head, 1)?;
        }
        self.ring.notify(memory, interrupt)?;
        Ok(self.ring.filled())
    }

    /// Whether the command is known and was obeyed.
    fn obey(&self, device: &Net, command: &[u8]) -> bool {
        let [class, command, low, high] = *command else {
            return false;
        };
        let known = (
            VIRTIO_NET_CTRL_MQ as u8,
            VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET as u8,
        );
        let pairs = usize::from(u16::from_le_bytes([low, high]));
        if (class, command) != known || !(1..=self.most).contains(&pairs) {
            return false;
        }
        let result = device.use_pairs(pairs);
        if let Err(error) = &result {
            journal::write(format_args!(
                "The guest cannot use {pairs} pairs of queues of its network interface: {error}."
            ));
        }
        result.is_ok()
    }
}

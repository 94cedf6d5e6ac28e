//! A queue in the hands of its worker.

use std::os::fd::{AsRawFd, RawFd};

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{DescriptorChain, Error, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{ActiveQueue, Interrupt};

/// The guest has broken a queue. Its device does nothing until the driver resets it.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The queue is not ready, or a part of it is not in memory.
    #[error("the guest's {0} queue is not ready or does not lie in its memory")]
    Outside(&'static str),
    /// A ring or a chain of the queue makes no sense.
    #[error("the guest's {queue} queue is malformed: {source}")]
    Malformed {
        /// Which queue.
        queue: &'static str,
        /// What is wrong with it.
        source: Error,
    },
    /// A chain has too few bytes, or too many pieces, to be used.
    #[error("a chain in the guest's {queue} queue has {bytes} bytes in {pieces} pieces")]
    Chain {
        /// Which queue.
        queue: &'static str,
        /// Bytes of the chain.
        bytes: usize,
        /// Pieces of the chain.
        pieces: usize,
    },
}

/// A chain of buffers.
pub type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap>;

/// A queue, with what is to be remembered between two looks at it.
pub struct Ring {
    name: &'static str,
    active: ActiveQueue,
    /// There may be chains; if not, the guest kicks when there are.
    filled: bool,
    /// Chains were used since the guest was last told.
    used: bool,
    /// The guest is to be told whether it asks for it or not.
    insist: bool,
}

impl Ring {
    /// Takes over a queue, called `name` in messages; `features` are those negotiated.
    pub fn new(
        name: &'static str,
        mut active: ActiveQueue,
        memory: &GuestMemoryMmap,
        features: u64,
    ) -> Result<Self, RingError> {
        if !active.queue.is_valid(memory) {
            return Err(RingError::Outside(name));
        }
        let event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        active.queue.set_event_idx(event_idx);
        Ok(Self {
            name,
            active,
            filled: true,
            used: false,
            insist: false,
        })
    }

    /// The event by which the guest kicks; then [`Self::kicked`].
    pub fn kick(&self) -> RawFd {
        self.active.kick.as_raw_fd()
    }

    /// How often the guest has kicked since this was asked last.
    pub fn kicks(&self) -> u64 {
        // Nothing to read is an error.
        self.active.kick.read().unwrap_or(0)
    }

    /// The guest has kicked: there may be chains.
    pub fn kicked(&mut self) {
        self.filled = true;
    }

    /// Whether [`Self::next`] may have a chain.
    pub fn filled(&self) -> bool {
        self.filled
    }

    /// The next chain. After `None`, the guest kicks when there is one.
    pub fn next<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
    ) -> Result<Option<Chain<'m>>, RingError> {
        let malformed = self.malformed();
        let queue = &mut self.active.queue;
        while self.filled {
            if let Some(chain) = queue.iter(memory).map_err(&malformed)?.next() {
                return Ok(Some(chain));
            }
            self.filled = queue.enable_notification(memory).map_err(&malformed)?;
        }
        Ok(None)
    }

    /// Gives back the chain taken last, so that [`Self::next`] returns it again.
    pub fn give_back(&mut self) {
        self.active.queue.go_to_previous_position();
    }

    /// Returns a chain to the guest, with `written` bytes in it.
    pub fn put(
        &mut self,
        memory: &GuestMemoryMmap,
        head: u16,
        written: u32,
    ) -> Result<(), RingError> {
        self.used = true;
        let malformed = self.malformed();
        let queue = &mut self.active.queue;
        queue.add_used(memory, head, written).map_err(malformed)
    }

    /// Returns several chains to the guest in such a way that it sees all of them or none, as
    /// virtio 1.2 §5.1.6.4 asks for the buffers of one frame.
    pub fn put_together(
        &mut self,
        memory: &GuestMemoryMmap,
        chains: impl IntoIterator<Item = (u16, u32)>,
    ) -> Result<(), RingError> {
        let malformed = self.malformed();
        let mut chains = chains.into_iter().peekable();
        while let Some((head, written)) = chains.next() {
            if chains.peek().is_none() {
                // Publishes the ones before, too.
                return self.put(memory, head, written);
            }
            let queue = &mut self.active.queue;
            let slot = queue.next_used().checked_rem(queue.size()).unwrap_or(0);
            let address = queue
                .used_ring()
                .checked_add(4 + 8 * u64::from(slot))
                .ok_or_else(|| malformed(Error::AddressOverflow))?;
            // `struct virtq_used_elem` (§2.7.8): the head, then the length.
            let element = u64::to_le(u64::from(written) << 32 | u64::from(head));
            memory
                .write_obj(element, GuestAddress(address))
                .map_err(|error| malformed(Error::GuestMemory(error)))?;
            queue.set_next_used(queue.next_used().wrapping_add(1));
            // The queue has not counted this chain and cannot tell whether the guest waits for it.
            self.insist = true;
        }
        Ok(())
    }

    /// Tells the guest about the chains returned, if it wants to know. Returns whether it was told.
    pub fn notify(
        &mut self,
        memory: &GuestMemoryMmap,
        interrupt: &Interrupt,
    ) -> Result<bool, RingError> {
        if !std::mem::take(&mut self.used) {
            return Ok(false);
        }
        let malformed = self.malformed();
        let queue = &mut self.active.queue;
        let wanted = queue.needs_notification(memory).map_err(malformed)?;
        let told = std::mem::take(&mut self.insist) || wanted;
        if told {
            interrupt.queue();
        }
        Ok(told)
    }

    /// Names this queue in an error of the library.
    pub fn malformed(&self) -> impl Fn(Error) -> RingError + use<> {
        let queue = self.name;
        move |source| RingError::Malformed { queue, source }
    }

    /// The error that a chain is too short or in too many pieces.
    pub fn unusable(&self, bytes: usize, pieces: usize) -> RingError {
        let queue = self.name;
        RingError::Chain {
            queue,
            bytes,
            pieces,
        }
    }
}

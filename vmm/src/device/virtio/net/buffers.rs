//! Guest memory that a frame is read into or written from.

use std::collections::VecDeque;

use virtio_queue::Error;
use vm_memory::{Bytes, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

use super::sys::MAX_PIECES;
use crate::device::virtio::ring::{Chain, Ring, RingError};

/// Where the number of buffers stands in the header (virtio 1.2 §5.1.6).
const NUM_BUFFERS_AT: usize = 10;

/// Adds the pieces of a chain that the device may write, or read, to `pieces`. Returns their
/// bytes.
pub fn collect<'m>(
    ring: &Ring,
    memory: &'m GuestMemoryMmap,
    chain: Chain<'m>,
    writable: bool,
    pieces: &mut Vec<VolatileSlice<'m>>,
) -> Result<usize, RingError> {
    let malformed = |error| ring.malformed()(Error::GuestMemory(error));
    let access = if writable {
        Permissions::Write
    } else {
        Permissions::Read
    };
    let mut bytes = 0usize;
    for descriptor in chain.filter(|descriptor| descriptor.is_write_only() == writable) {
        let length = descriptor.len() as usize;
        if length == 0 {
            continue;
        }
        let slices = memory
            .get_slices(descriptor.addr(), length, access)
            .map_err(malformed)?;
        for slice in slices {
            pieces.push(slice.map_err(malformed)?);
        }
        // A chain has less than 2^32 bytes: its iterator ends there.
        bytes = bytes.saturating_add(length);
        if pieces.len() >= MAX_PIECES {
            return Err(ring.unusable(bytes, pieces.len()));
        }
    }
    Ok(bytes)
}

/// Chains taken from the receive queue that wait for frames.
#[derive(Default)]
pub struct Buffers<'m> {
    chains: VecDeque<Waiting>,
    pieces: Vec<VolatileSlice<'m>>,
    bytes: usize,
}

/// A chain of [`Buffers`], and how much of them it is.
struct Waiting {
    head: u16,
    pieces: usize,
    bytes: usize,
}

impl<'m> Buffers<'m> {
    /// Takes chains until they hold `wanted` bytes, or one chain if frames are not to be spread.
    /// Returns whether they do.
    pub fn fill(
        &mut self,
        ring: &mut Ring,
        memory: &'m GuestMemoryMmap,
        wanted: Option<usize>,
    ) -> Result<bool, RingError> {
        loop {
            let enough = match wanted {
                Some(wanted) => self.bytes >= wanted,
                None => !self.chains.is_empty(),
            };
            if enough {
                return Ok(true);
            }
            let Some(chain) = ring.next(memory)? else {
                return Ok(false);
            };
            let head = chain.head_index();
            let before = self.pieces.len();
            let bytes = collect(ring, memory, chain, true, &mut self.pieces)?;
            let pieces = self.pieces.len().saturating_sub(before);
            if pieces == 0 {
                return Err(ring.unusable(0, 0));
            }
            self.bytes = self.bytes.saturating_add(bytes);
            self.chains.push_back(Waiting {
                head,
                pieces,
                bytes,
            });
        }
    }

    /// Where the next frame is to be read to.
    pub fn pieces(&self) -> &[VolatileSlice<'m>] {
        &self.pieces
    }

    /// The bytes of [`Self::pieces`].
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// A frame of `length` bytes was read, not more than [`Self::bytes`]: returns the chains that
    /// it fills to the guest.
    pub fn put(
        &mut self,
        ring: &mut Ring,
        memory: &GuestMemoryMmap,
        length: usize,
    ) -> Result<(), RingError> {
        let mut rest = length;
        let mut done = Vec::new();
        let mut pieces = 0usize;
        while rest > 0 {
            let Some(chain) = self.chains.pop_front() else {
                break;
            };
            let written = rest.min(chain.bytes);
            rest -= written;
            self.bytes = self.bytes.saturating_sub(chain.bytes);
            pieces = pieces.saturating_add(chain.pieces);
            // Less than 2^32, as the chain has no more.
            done.push((chain.head, written as u32));
        }
        self.number(u16::try_from(done.len()).unwrap_or(u16::MAX));
        self.pieces.drain(..pieces.min(self.pieces.len()));
        ring.put_together(memory, done)
    }

    /// Writes the number of chains into the header of the frame, which the tap leaves out.
    fn number(&self, chains: u16) {
        for (offset, byte) in (NUM_BUFFERS_AT..).zip(chains.to_le_bytes()) {
            let mut offset = offset;
            for piece in &self.pieces {
                if offset < piece.len() {
                    // The offset was just compared with the length.
                    let _ = piece.write_slice(&[byte], offset);
                    break;
                }
                offset -= piece.len();
            }
        }
    }
}

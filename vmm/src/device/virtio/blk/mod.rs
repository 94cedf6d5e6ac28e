//! The block device (virtio 1.2 §5.2): a raw disk out of pieces of files.

mod disk;
mod request;

use vm_memory::GuestMemoryMmap;

pub use disk::{Disk, Piece};
use request::Request;

use super::worker::{Chain, Malformed, Serve, Worker};
use super::{Active, Device, Running, StartError};

/// Device ID (virtio 1.2 §5).
const KIND: u32 = 2;
const QUEUE_SIZE: u16 = 128;
/// Data pieces of one request: the ring's size less header and status, so that a chain without
/// an indirect table fits too.
const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// The most that one request discards or zeroes: 1 GiB, in sectors.
const MAX_DISCARD_SECTORS: u32 = 1 << 21;

// Feature bits (virtio 1.2 §5.2.3, §6).
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;
const F_INDIRECT_DESC: u64 = 1 << 28;
const F_EVENT_IDX: u64 = 1 << 29;

/// A disk that no driver uses.
pub struct Blk {
    disk: Disk,
    config: [u8; 60],
}

impl Blk {
    /// Shows `disk` to a guest.
    pub fn new(disk: Disk) -> Self {
        let config = config(&disk);
        Self { disk, config }
    }
}

impl Device for Blk {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        // The logical block size is not offered: 512 is the default, and a larger one keeps file
        // systems with smaller blocks from mounting.
        let kind = if self.disk.read_only() {
            F_RO
        } else {
            F_DISCARD | F_WRITE_ZEROES
        };
        F_SEG_MAX | F_FLUSH | F_INDIRECT_DESC | F_EVENT_IDX | kind
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn start(self: Box<Self>, active: Active) -> Result<Box<dyn Running>, StartError> {
        let failed = |why: String| StartError {
            device: "block",
            why,
        };
        let queue = active.queues.into_iter().next();
        let queue = queue.ok_or_else(|| failed("its queue is missing".into()))?;
        let config = self.config;
        let worker = Worker::start("blk", active.memory, queue, active.interrupt, self.disk)
            .map_err(|error| failed(error.to_string()))?;
        Ok(Box::new(Serving { worker, config }))
    }
}

/// A disk that a driver uses.
struct Serving {
    worker: Worker<Disk>,
    config: [u8; 60],
}

impl Running for Serving {
    fn stop(self: Box<Self>) -> Box<dyn Device> {
        // A worker that died took its files along; an empty disk fails every request.
        let disk = self.worker.stop().unwrap_or_else(Disk::lost);
        // What the guest flushed is safe already; the rest need not be, but a server that asks for
        // an end expects what was written to be there.
        let _ = disk.flush();
        Box::new(Blk {
            disk,
            config: self.config,
        })
    }
}

impl Serve for Disk {
    fn serve(&mut self, memory: &GuestMemoryMmap, chain: Chain<'_>) -> Result<u32, Malformed> {
        Request::parse(memory, chain)?.serve(self)
    }
}

/// `struct virtio_blk_config` (virtio 1.2 §5.2.4).
fn config(disk: &Disk) -> [u8; 60] {
    let mut bytes = [0; 60];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, &disk.sectors().to_le_bytes());
    put(12, &MAX_SEGMENTS.to_le_bytes());
    put(34, &1u16.to_le_bytes()); // queues
    for at in [36, 48] {
        put(at, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(at + 4, &1u32.to_le_bytes()); // ranges of one request
    }
    put(44, &8u32.to_le_bytes()); // alignment of discards: a page of the file
    put(56, &[1]); // zeroing may free the space
    bytes
}

#[cfg(test)]
mod tests;

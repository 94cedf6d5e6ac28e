//! The entropy device (virtio 1.2 §5.4).

use rustix::rand::GetRandomFlags;
use vm_memory::{Bytes, GuestMemoryMmap};

use super::worker::{Chain, Malformed, Serve, Worker};
use super::{Active, Device, Running, StartError};

/// Device ID (virtio 1.2 §5).
const KIND: u32 = 4;
const QUEUE_SIZES: [u16; 1] = [8];
/// The most that one request gets, in bytes: the guest may ask again, but never for unbounded work
/// at once.
const MAX_REQUEST_BYTES: usize = 4096;

/// The host's random numbers.
pub struct Rng;

impl Device for Rng {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn start(self: Box<Self>, active: Active) -> Result<Box<dyn Running>, StartError> {
        let failed = |why: String| StartError {
            device: "entropy",
            why,
        };
        let queue = active.queues.into_iter().next();
        let queue = queue.ok_or_else(|| failed("its queue is missing".into()))?;
        let worker = Worker::start("rng", active.memory, queue, active.interrupt, Source)
            .map_err(|error| failed(error.to_string()))?;
        Ok(Box::new(Drawing(worker)))
    }
}

struct Drawing(Worker<Source>);

impl Running for Drawing {
    fn stop(self: Box<Self>) -> Box<dyn Device> {
        self.0.stop();
        Box::new(Rng)
    }
}

struct Source;

impl Serve for Source {
    fn serve(&mut self, memory: &GuestMemoryMmap, chain: Chain<'_>) -> Result<u32, Malformed> {
        let mut written = 0;
        for descriptor in chain.writable() {
            let length = (descriptor.len() as usize).min(MAX_REQUEST_BYTES - written);
            let mut bytes = vec![0; length];
            // The kernel gives up to 256 bytes without fail; what it gives is what counts.
            let length = rustix::rand::getrandom(&mut bytes, GetRandomFlags::empty()).unwrap_or(0);
            let bytes = bytes.get(..length).unwrap_or_default();
            memory
                .write_slice(bytes, descriptor.addr())
                .map_err(|_| Malformed("a buffer lies outside the memory"))?;
            written += length;
        }
        Ok(written as u32)
    }
}

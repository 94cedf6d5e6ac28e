//! The guest's side of a split queue (virtio 1.2 §2.7), for tests of the devices.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{ActiveQueue, Interrupt, Memory, NEEDS_RESET};

/// Bytes of guest memory that a queue takes, up to 256 entries.
pub const QUEUE_BYTES: u64 = 0x3000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Guest memory of `bytes` from address 0.
pub fn memory(bytes: usize) -> Memory {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).unwrap())
}

/// The interrupt of a device, and the guest's end of it.
pub fn interrupt() -> (Interrupt, Line) {
    let line = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let status = Arc::new(AtomicU32::new(0));
    let interrupt = Interrupt::new(Arc::clone(&status), Arc::clone(&line));
    (interrupt, Line { line, status })
}

/// An interrupt line.
pub struct Line {
    line: Arc<EventFd>,
    status: Arc<AtomicU32>,
}

impl Line {
    /// Waits for an interrupt. Panics if the device is silent for too long to be at work.
    pub fn wait(&self) {
        assert!(self.raised(20), "the device is silent");
    }

    /// Waits until the device says that it needs a reset.
    pub fn wait_for_needs_reset(&self) {
        while self.status.load(Ordering::SeqCst) & NEEDS_RESET == 0 {
            self.wait();
        }
    }

    /// Whether an interrupt comes within `seconds`.
    pub fn raised(&self, seconds: i64) -> bool {
        let line = crate::sys::descriptor(&self.line);
        let timeout = Timespec {
            tv_sec: seconds,
            tv_nsec: 0,
        };
        let mut fds = [PollFd::from_borrowed_fd(line, PollFlags::IN)];
        let count = poll(&mut fds, Some(&timeout)).unwrap();
        let _ = self.line.read();
        count > 0
    }
}

/// A buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub struct Buffer {
    pub address: u64,
    pub length: u32,
    pub writable: bool,
}

impl Buffer {
    pub fn read(address: u64, length: usize) -> Self {
        let length = length as u32;
        Self {
            address,
            length,
            writable: false,
        }
    }

    pub fn write(address: u64, length: usize) -> Self {
        let writable = true;
        Self {
            writable,
            ..Self::read(address, length)
        }
    }
}

/// A queue as its driver sees it.
pub struct Driver {
    memory: Memory,
    base: u64,
    size: u16,
    event_idx: bool,
    free: Vec<u16>,
    /// By head: the descriptors of the chain and the address of its first buffer.
    chains: HashMap<u16, (Vec<u16>, u64)>,
    available: u16,
    seen: u16,
    kick: EventFd,
}

impl Driver {
    /// A queue at `base`.
    pub fn new(memory: &Memory, base: u64, size: u16, event_idx: bool) -> Self {
        Self {
            memory: Arc::clone(memory),
            base,
            size,
            event_idx,
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
            available: 0,
            seen: 0,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
        }
    }

    /// What the device gets.
    pub fn activate(&self) -> ActiveQueue {
        let mut queue = Queue::new(256).unwrap();
        queue.set_size(self.size);
        queue.set_desc_table_address(Some(self.base as u32), Some(0));
        queue.set_avail_ring_address(Some(self.avail(0) as u32), Some(0));
        queue.set_used_ring_address(Some(self.used_ring(0) as u32), Some(0));
        queue.set_ready(true);
        let kick = self.kick.try_clone().unwrap();
        ActiveQueue { queue, kick }
    }

    fn avail(&self, offset: u64) -> u64 {
        self.base + 0x1000 + offset
    }

    fn used_ring(&self, offset: u64) -> u64 {
        self.base + 0x2000 + offset
    }

    fn get(&self, address: u64) -> u16 {
        self.memory
            .load(GuestAddress(address), Ordering::SeqCst)
            .unwrap()
    }

    fn put(&self, address: u64, value: u16) {
        self.memory
            .store(value, GuestAddress(address), Ordering::SeqCst)
            .unwrap();
    }

    /// Whether a chain of `count` buffers can be offered.
    pub fn has_room(&self, count: usize) -> bool {
        self.free.len() >= count
    }

    /// Writes a descriptor as it is (virtio 1.2 §2.7.5).
    pub fn describe(&self, index: u16, buffer: Buffer, flags: u16, next: u16) {
        let at = self.base + 16 * u64::from(index);
        let write = if buffer.writable { WRITE } else { 0 };
        self.memory
            .write_obj(buffer.address, GuestAddress(at))
            .unwrap();
        self.memory
            .write_obj(buffer.length, GuestAddress(at + 8))
            .unwrap();
        self.put(at + 12, flags | write);
        self.put(at + 14, next);
    }

    /// Makes a chain available and kicks, as far as the device asks for it. Returns its head.
    pub fn offer(&mut self, chain: &[Buffer]) -> u16 {
        let ids: Vec<u16> = self.free.split_off(self.free.len() - chain.len());
        for (position, buffer) in chain.iter().enumerate() {
            match ids.get(position + 1) {
                Some(&next) => self.describe(ids[position], *buffer, NEXT, next),
                None => self.describe(ids[position], *buffer, 0, 0),
            }
        }
        let head = ids[0];
        self.chains.insert(head, (ids, chain[0].address));
        self.publish(head);
        head
    }

    /// Makes the chain at `head` available, whatever it is.
    pub fn publish(&mut self, head: u16) {
        let slot = u64::from(self.available % self.size);
        self.put(self.avail(4 + 2 * slot), head);
        self.available = self.available.wrapping_add(1);
        self.jump(self.available);
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = self.get(self.used_ring(4 + 8 * u64::from(self.size)));
            event == self.available.wrapping_sub(1)
        } else {
            self.get(self.used_ring(0)) == 0
        };
        if wanted {
            self.kick();
        }
    }

    /// Sets the index of the available ring.
    pub fn jump(&self, index: u16) {
        self.put(self.avail(2), index);
    }

    /// Kicks without asking.
    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// The first addresses of the chains that the device has not used yet, as far as seen.
    pub fn offered(&self) -> impl Iterator<Item = u64> + '_ {
        self.chains.values().map(|(_, address)| *address)
    }

    /// The next chain that the device has used: the address of its first buffer and how many
    /// bytes were written.
    pub fn used(&mut self) -> Option<(u64, u32)> {
        if self.get(self.used_ring(2)) == self.seen {
            // An interrupt for the next one.
            self.put(self.avail(4 + 2 * u64::from(self.size)), self.seen);
            fence(Ordering::SeqCst);
            if self.get(self.used_ring(2)) == self.seen {
                return None;
            }
        }
        let at = self.used_ring(4 + 8 * u64::from(self.seen % self.size));
        let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        let length: u32 = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
        self.seen = self.seen.wrapping_add(1);
        let chain = self.chains.remove(&(head as u16));
        let (ids, address) = chain.expect("a chain that was offered");
        self.free.extend(ids);
        Some((address, length))
    }
}

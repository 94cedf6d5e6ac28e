//! A virtio-mmio window (virtio 1.2 §4.2): the registers through which a driver finds and starts
//! the device in it, if there is one.

mod registers;
mod transport;
mod wires;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use transport::Transport;
pub use transport::{AttachError, DetachError};
pub use wires::Wires;

use super::net::Counters;
use super::{Device, Memory, NEEDS_RESET};
use registers::{INTERRUPT_ACK, INTERRUPT_STATUS};

/// One window. The vCPUs and the control loop share it.
pub struct Window {
    /// What the interrupt handler reads; apart from the lock, since it is read for every interrupt
    /// while the device may be stopping.
    status: Arc<AtomicU32>,
    transport: Mutex<Transport>,
}

impl Window {
    /// An empty window at `address` that interrupts through `pin`.
    pub fn new(address: u64, pin: u32, memory: Memory, wires: Arc<dyn Wires>) -> Self {
        let status = Arc::new(AtomicU32::new(0));
        let transport = Transport::new(address, pin, memory, wires, status.clone());
        Self {
            status,
            transport: Mutex::new(transport),
        }
    }

    /// Puts a device here. The guest sees it when it looks next.
    pub fn attach(&self, device: Box<dyn Device>) -> Result<(), AttachError> {
        self.transport().attach(device)
    }

    /// Takes the device away, which the guest's driver must have let go (a reset).
    pub fn detach(&self) -> Result<Box<dyn Device>, DetachError> {
        self.transport().detach()
    }

    /// Stops the device if it runs: when this returns, its requests are done.
    pub fn stop(&self) {
        self.transport().reset();
    }

    /// Whether no device is here.
    pub fn is_empty(&self) -> bool {
        self.transport().is_empty()
    }

    /// What the device here counts, if it is a network interface.
    pub fn counters(&self) -> Option<Arc<Counters>> {
        self.transport().counters()
    }

    /// The guest reads at `offset`; `data` comes filled with zeros.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == INTERRUPT_STATUS {
            let status = self.status.load(Ordering::SeqCst) & !NEEDS_RESET;
            if let Ok(register) = <&mut [u8; 4]>::try_from(data) {
                *register = status.to_le_bytes();
            }
        } else {
            self.transport().read(offset, data);
        }
    }

    /// The guest writes at `offset`.
    pub fn write(&self, offset: u64, data: &[u8]) {
        // Registers are 32 bits wide (virtio 1.2 §4.2.2.2); no device here has a configuration
        // space that can be written.
        let Ok(register) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let value = u32::from_le_bytes(register);
        if offset == INTERRUPT_ACK {
            self.status
                .fetch_and(!(value & !NEEDS_RESET), Ordering::SeqCst);
        } else {
            self.transport().write(offset, value);
        }
    }

    /// The lock is held while a device starts or stops, which may wait for its requests; only
    /// accesses to this very window wait for that.
    fn transport(&self) -> MutexGuard<'_, Transport> {
        self.transport
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

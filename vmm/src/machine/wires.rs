//! KVM's connections between guest and devices.

use std::collections::BTreeMap;
use std::io::{Error, Result};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::device::virtio::mmio::Wires;

/// The VM as the windows see it.
///
/// KVM raises and lowers a pin in two steps, one event after the other but two events at once. Of
/// two events for one pin, an edge could fall between the steps of the other and be lost; so a pin
/// has one.
pub struct KvmWires {
    vm: Arc<VmFd>,
    lines: Mutex<BTreeMap<u32, Arc<EventFd>>>,
}

impl KvmWires {
    /// No pin is connected yet.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self {
            vm,
            lines: Mutex::default(),
        }
    }
}

impl Wires for KvmWires {
    fn connect_kick(&self, address: u64, queue: u32, event: &EventFd) -> Result<()> {
        let address = IoEventAddress::Mmio(address);
        self.vm
            .register_ioevent(event, &address, queue)
            .map_err(system)
    }

    fn disconnect_kick(&self, address: u64, queue: u32, event: &EventFd) {
        // Fails only for what was never connected.
        let _ = self
            .vm
            .unregister_ioevent(event, &IoEventAddress::Mmio(address), queue);
    }

    fn interrupt_line(&self, pin: u32) -> Result<Arc<EventFd>> {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(line) = lines.get(&pin) {
            return Ok(Arc::clone(line));
        }
        let line = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        self.vm.register_irqfd(&line, pin).map_err(system)?;
        lines.insert(pin, Arc::clone(&line));
        Ok(line)
    }
}

fn system(error: kvm_ioctls::Error) -> Error {
    Error::from_raw_os_error(error.errno())
}

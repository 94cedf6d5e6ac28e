//! KVM's connections between guest and devices.

use std::io::{Error, Result};
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::device::virtio::mmio::Wires;

/// The VM as the windows see it.
pub struct KvmWires(pub Arc<VmFd>);

impl Wires for KvmWires {
    fn connect_kick(&self, address: u64, queue: u32, event: &EventFd) -> Result<()> {
        let address = IoEventAddress::Mmio(address);
        self.0
            .register_ioevent(event, &address, queue)
            .map_err(system)
    }

    fn disconnect_kick(&self, address: u64, queue: u32, event: &EventFd) {
        // Fails only for what was never connected.
        let _ = self
            .0
            .unregister_ioevent(event, &IoEventAddress::Mmio(address), queue);
    }

    fn connect_interrupt(&self, pin: u32, event: &EventFd) -> Result<()> {
        self.0.register_irqfd(event, pin).map_err(system)
    }

    fn disconnect_interrupt(&self, pin: u32, event: &EventFd) {
        let _ = self.0.unregister_irqfd(event, pin);
    }
}

fn system(error: kvm_ioctls::Error) -> Error {
    Error::from_raw_os_error(error.errno())
}

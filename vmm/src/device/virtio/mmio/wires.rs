//! What connects a window to the vCPUs.

use std::io::Result;

use vmm_sys_util::eventfd::EventFd;

/// Connections that KVM serves without waking this process's threads by an exit.
pub trait Wires: Send + Sync {
    /// A guest's 32-bit write of `queue` to `address` shall write `event`.
    fn connect_kick(&self, address: u64, queue: u32, event: &EventFd) -> Result<()>;
    /// Undoes [`Wires::connect_kick`].
    fn disconnect_kick(&self, address: u64, queue: u32, event: &EventFd);
    /// Writing `event` shall raise interrupt `pin`, as an edge.
    fn connect_interrupt(&self, pin: u32, event: &EventFd) -> Result<()>;
    /// Undoes [`Wires::connect_interrupt`].
    fn disconnect_interrupt(&self, pin: u32, event: &EventFd);
}

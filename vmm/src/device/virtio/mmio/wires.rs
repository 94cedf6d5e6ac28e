//! What connects a window to the vCPUs.

use std::io::Result;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// Connections that KVM serves without waking this process's threads by an exit.
pub trait Wires: Send + Sync {
    /// A guest's 32-bit write of `queue` to `address` shall write `event`.
    fn connect_kick(&self, address: u64, queue: u32, event: &EventFd) -> Result<()>;
    /// Undoes [`Wires::connect_kick`].
    fn disconnect_kick(&self, address: u64, queue: u32, event: &EventFd);
    /// The event that raises interrupt `pin`, as an edge, when it is written. Windows that share
    /// a pin get the same event.
    fn interrupt_line(&self, pin: u32) -> Result<Arc<EventFd>>;
}

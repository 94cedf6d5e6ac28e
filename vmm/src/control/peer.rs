//! The connected server, as the vsock device sees it.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_vmm_api::control::FromVmm;
use bulkhead_vmm_api::wire;

use crate::device::virtio::vsock::Announce;

/// The connection to the server, if there is one.
#[derive(Default)]
pub struct Peer(Mutex<Option<Arc<OwnedFd>>>);

impl Peer {
    /// The connection.
    pub fn connection(&self) -> Option<Arc<OwnedFd>> {
        self.lock().clone()
    }

    /// Takes another connection, or none; tells whether there was one before, which ends.
    pub fn replace(&self, socket: Option<OwnedFd>) -> bool {
        std::mem::replace(&mut *self.lock(), socket.map(Arc::new)).is_some()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<OwnedFd>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the device holds of it.
pub struct Announcer(pub Arc<Peer>);

impl Announce for Announcer {
    fn dial(&self, stream: u64, port: u32) -> bool {
        // A server that does not read is as good as none.
        let announce = |socket| wire::announce(&socket, &FromVmm::Dial { stream, port }).is_ok();
        self.0.connection().is_some_and(announce)
    }
}

//! virtio-vsock (virtio 1.2 §5.10): streams that the guest opens to the host.
//!
//! The device opens nothing. When the guest dials, the device announces a stream number
//! ([`Announce`]); whoever listens answers with a connected stream socket ([`Answers`]), and from
//! then on bytes move between the guest and that socket. Both directions end on their own (half
//! close), and neither runs ahead of its reader: the guest by credit, the host by what the socket
//! holds.

mod connection;
mod device;
mod packet;
mod stream;
mod streams;
mod worker;

pub use device::{Answers, Vsock};

/// Tells the host that the guest dials.
pub trait Announce: Send {
    /// The guest dials `port`; the answer is expected for `stream`, a number never used before by
    /// this VM. Must not block. `false` says that nobody listens: the guest is refused at once.
    fn dial(&self, stream: u64, port: u32) -> bool;
}

#[cfg(test)]
mod tests;

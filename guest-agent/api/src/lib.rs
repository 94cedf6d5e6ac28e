//! What the CRI server and the guest agent say to each other.
//!
//! The agent dials the host on vsock port [`PORT`] and opens every stream with a [`Greeting`].
//! On the control stream it then serves [`v1::agent_server::Agent`] over HTTP/2.

mod greeting;
mod group;

/// The generated service and its messages.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    tonic::include_proto!("bulkhead.agent.v1");
}

pub use greeting::{GREETING_BYTES, Greeting, GreetingError, Purpose, Secret};
pub use group::read as read_group;

/// The host's vsock port which the agent dials.
pub const PORT: u32 = 1024;
/// Version of the service and of [`Greeting`].
pub const VERSION: u32 = 1;
/// An output stream's ring in the agent, in bytes: the most that is not yet acknowledged.
pub const RING_BYTES: usize = 256 << 10;

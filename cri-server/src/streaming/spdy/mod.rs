//! SPDY/3.1, the server's side, as far as Kubernetes uses it: streams that the client opens.

mod connection;
mod flow;
mod frame;
mod header;

pub use connection::{Opened, serve};

/// For clients in tests.
#[cfg(test)]
pub mod test {
    pub use super::header::{Deflater, Inflater};
}

//! End-to-end tests: a server is started as a user would start it and driven only through its
//! CRI socket and its command line.
//!
//! A suite is one file, or one directory, in `tests/`, a function per behaviour, listed with [`suite!`]. Each case
//! gets the [`Node`] the suite shares: a registry, and a server once a case asks for it. After
//! each case the machine must be as it was before; see [`leak`]. At the end of a suite the host's
//! network must be.
//!
//! The same suites run against Debian's containerd and runc, which finds out wrong tests. Cases
//! about what a reference cannot have are listed in `reference.txt`.

pub mod archive;
pub mod cri;
pub mod fake_registry;
#[cfg(test)]
mod fields;
mod footprint;
pub mod http;
pub mod hypervisor;
pub mod kubectl;
pub mod leak;
pub mod log;
pub mod node;
pub mod registry;
pub mod request;
pub mod server;
mod stall;
pub mod suite;
mod sys;
pub mod usage;

pub use cri::Cri;
pub use node::Node;
pub use server::Server;

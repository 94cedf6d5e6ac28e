//! Devices of the machine.

pub mod bus;
pub mod console;
pub mod serial;
pub mod virtio;

//! The virtual machine, put together from its parts.

mod assemble;
mod boot;
mod ending;
mod memory;
mod run;
mod vcpu;
mod wires;

use std::sync::Arc;

use crate::control::Control;
use crate::device::bus::Bus;
use crate::device::console::Console;
use ending::Ending;
use kvm_ioctls::VmFd;
use vcpu::Vcpus;

pub use assemble::start;

/// A machine whose guest runs.
pub struct Machine {
    vcpus: Vcpus,
    bus: Arc<Bus>,
    console: Console,
    ending: Ending,
    control: Option<Control>,
    /// Kept to the end: its memory regions point into the mapping that the windows share.
    _vm: Arc<VmFd>,
}

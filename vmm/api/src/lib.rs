//! What the CRI server and the VMM say to each other.
//!
//! A VM is described once, by a [`VmConfig`] in a sealed memfd that the VMM inherits as
//! descriptor [`CONFIG_FD`]. Everything the VMM uses arrives as an open descriptor, named in the
//! configuration by its number. Afterwards the two ends speak over `control.sock`
//! ([`control`]), and when the VM ends the VMM leaves an [`ExitRecord`].

//!
//! The server's side of that is here too: [`Launch`] starts a VMM, [`Control`] speaks to it.

mod client;
mod config;
pub mod control;
mod counters;
mod exit;
mod launch;
mod sys;
pub mod wire;

pub use client::Control;
pub use config::{
    Block, CONFIG_FD, ConfigError, Device, Extent, Fd, MAX_QUEUE_PAIRS, MAX_VCPUS, Net, VERSION,
    VmConfig, WINDOWS,
};
pub use counters::{FlowCounters, InterfaceCounters};
pub use exit::{CONSOLE_TAIL_BYTES, ExitReason, ExitRecord};
pub use launch::{Launch, LaunchError, OpenDevice, Vmm};

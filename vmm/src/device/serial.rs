//! The serial port: the guest's console, out only.

use std::sync::{Mutex, PoisonError};

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial as Uart};
use vmm_sys_util::eventfd::EventFd;

use super::console::Console;

/// A 16550A whose output goes to a [`Console`].
pub struct Serial {
    uart: Mutex<Uart<Line, NoEvents, Console>>,
}

/// The port's interrupt: an irqfd.
struct Line(EventFd);

impl Trigger for Line {
    type E = std::io::Error;

    fn trigger(&self) -> std::io::Result<()> {
        self.0.write(1)
    }
}

impl Serial {
    /// A port that raises `line`.
    pub fn new(line: EventFd, console: Console) -> Self {
        Self {
            uart: Mutex::new(Uart::new(Line(line), console)),
        }
    }

    /// The guest reads the register at `offset`, 0 to 7.
    pub fn read(&self, offset: u8) -> u8 {
        self.uart
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .read(offset)
    }

    /// The guest writes the register at `offset`, 0 to 7.
    pub fn write(&self, offset: u8, value: u8) {
        let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
        // The console takes every byte; an interrupt that is pending already need not be raised.
        let _ = uart.write(offset, value);
    }
}

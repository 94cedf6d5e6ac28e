//! Which device answers at an address.

use bulkhead_vmm_api::WINDOWS;

use super::serial::Serial;
use super::virtio::mmio::Window;
use crate::arch::x86_64::layout::{KEYBOARD_PORT, SERIAL_PORT, window_at};

/// The keyboard controller's "pulse the reset line" (kernel: arch/x86/kernel/reboot.c).
const RESET_COMMAND: u8 = 0xfe;

/// What a write means for the whole machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// The guest resets its machine.
    Reset,
}

/// All devices. The vCPUs share it.
pub struct Bus {
    serial: Serial,
    windows: Vec<Window>,
}

impl Bus {
    /// Takes the windows in their order.
    pub fn new(serial: Serial, windows: Vec<Window>) -> Self {
        Self { serial, windows }
    }

    /// All windows in their order.
    pub fn windows(&self) -> &[Window] {
        &self.windows
    }

    /// A read of memory that is none. Nobody answers: zeros.
    pub fn memory_read(&self, address: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some((window, offset)) = self.window(address) {
            window.read(offset, data);
        }
    }

    /// A write to memory that is none.
    pub fn memory_write(&self, address: u64, data: &[u8]) {
        if let Some((window, offset)) = self.window(address) {
            window.write(offset, data);
        }
    }

    /// A read of an I/O port. Nobody answers: all bits set, as on a bus that nobody drives.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        // A string instruction reads the same port again and again.
        for byte in data {
            match port {
                KEYBOARD_PORT => *byte = 0, // ready for a command
                _ => {
                    if let Some(offset) = serial_offset(port) {
                        *byte = self.serial.read(offset);
                    }
                }
            }
        }
    }

    /// A write to an I/O port.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Effect {
        if let Some(offset) = serial_offset(port) {
            data.iter()
                .for_each(|byte| self.serial.write(offset, *byte));
        }
        if port == KEYBOARD_PORT && data.contains(&RESET_COMMAND) {
            return Effect::Reset;
        }
        Effect::None
    }

    fn window(&self, address: u64) -> Option<(&Window, u64)> {
        let (window, offset) = window_at(address)?;
        debug_assert!(window < WINDOWS);
        Some((self.windows.get(usize::from(window))?, offset))
    }
}

fn serial_offset(port: u16) -> Option<u8> {
    port.checked_sub(SERIAL_PORT)
        .filter(|offset| *offset < 8)
        .map(|offset| offset as u8)
}

//! Where things are in the guest's physical address space.
//!
//! Low memory follows what Linux expects of a PC; the rest is ours. All numbers are bytes.

use bulkhead_vmm_api::WINDOWS;

/// Global descriptor table.
pub const GDT: u64 = 0x500;
/// `struct boot_params` (kernel: Documentation/arch/x86/zero-page.rst).
pub const BOOT_PARAMS: u64 = 0x7000;
/// Page tables that map the first GiB to itself: top level, second and third.
pub const PAGE_TABLES: [u64; 3] = [0x9000, 0xa000, 0xb000];
/// The kernel's command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Its room with the closing zero: `COMMAND_LINE_SIZE` of x86.
pub const COMMAND_LINE_BYTES: usize = 2048;
/// The MP table, in front of the pointer to it.
pub const MP_TABLE: u64 = 0x9_f000;
/// The MP floating pointer: the last KiB of base memory is where Linux looks
/// (kernel: arch/x86/kernel/mpparse.c).
pub const MP_POINTER: u64 = 0x9_fc00;
/// Where memory goes on after what a PC keeps for its firmware.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// The end of memory below the hole for devices.
pub const LOW_MEMORY_END: u64 = 0xc000_0000;
/// Where memory goes on above the hole.
pub const ABOVE_4_GIB: u64 = 0x1_0000_0000;

/// The first virtio-mmio window; the others follow.
pub const WINDOW_BASE: u64 = 0xd000_0000;
/// Size of a window.
pub const WINDOW_BYTES: u64 = 0x1000;

/// I/O interrupt controller.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Local interrupt controllers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that KVM needs on Intel processors, beside the controllers.
pub const KVM_TSS: usize = 0xfffb_d000;

/// The serial port's first I/O port; it has eight.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Its interrupt pin.
pub const SERIAL_PIN: u32 = 4;
/// The keyboard controller's command port, by which Linux resets a PC (`reboot=k`).
pub const KEYBOARD_PORT: u16 = 0x64;

/// Pins of the I/O interrupt controller.
pub const PINS: u32 = 24;
/// The first pin that windows use: those below belong to a PC's own devices.
const FIRST_WINDOW_PIN: u32 = 5;

/// The address of a window.
pub fn window_address(window: u8) -> u64 {
    WINDOW_BASE + u64::from(window) * WINDOW_BYTES
}

/// The interrupt pin of a window. There are fewer pins than windows, so the last windows share
/// theirs with the first: edges, since every driver reads its own window's status.
pub fn window_pin(window: u8) -> u32 {
    FIRST_WINDOW_PIN + u32::from(window) % (PINS - FIRST_WINDOW_PIN)
}

/// The window and the offset in it at `address`, if there is one.
pub fn window_at(address: u64) -> Option<(u8, u64)> {
    let offset = address.checked_sub(WINDOW_BASE)?;
    let window = u8::try_from(offset / WINDOW_BYTES)
        .ok()
        .filter(|window| *window < WINDOWS)?;
    Some((window, offset % WINDOW_BYTES))
}

/// Memory as ranges of address and length, for `bytes` of it.
pub fn memory_ranges(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(LOW_MEMORY_END);
    let mut ranges = vec![(0, low)];
    if bytes > low {
        ranges.push((ABOVE_4_GIB, bytes - low));
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_address_of_a_window_leads_back_to_it() {
        for window in 0..WINDOWS {
            let base = window_address(window);
            assert_eq!(window_at(base), Some((window, 0)));
            assert_eq!(
                window_at(base + WINDOW_BYTES - 1),
                Some((window, WINDOW_BYTES - 1))
            );
        }
        assert_eq!(window_at(WINDOW_BASE - 1), None);
        assert_eq!(window_at(window_address(WINDOWS)), None);
        assert_eq!(window_at(u64::MAX), None);
    }

    #[test]
    fn windows_share_the_pins_from_5_to_23_evenly() {
        let mut uses = [0; PINS as usize];
        (0..WINDOWS).for_each(|window| uses[window_pin(window) as usize] += 1);
        assert_eq!(uses[..5], [0; 5]);
        assert!(uses[5..].iter().all(|count| (1..=2).contains(count)));
    }

    #[test]
    fn memory_leaves_the_hole_for_devices_free() {
        assert_eq!(memory_ranges(64 << 20), [(0, 64 << 20)]);
        let large = memory_ranges(5 << 30);
        assert_eq!(large, [(0, 3 << 30), (4 << 30, 2 << 30)]);
    }

    #[test]
    fn windows_stand_in_the_hole() {
        const { assert!(WINDOW_BASE >= LOW_MEMORY_END) };
        assert!(window_address(WINDOWS) < u64::from(IO_APIC));
    }
}

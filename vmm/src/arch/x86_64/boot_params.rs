//! `struct boot_params`, which the kernel is handed at its 64-bit entry
//! (kernel: Documentation/arch/x86/boot.rst, zero-page.rst).

use super::layout::{
    ABOVE_4_GIB, COMMAND_LINE, COMMAND_LINE_BYTES, HIGH_MEMORY, MP_TABLE, memory_ranges,
};

/// Its size.
pub const BYTES: usize = 4096;

/// What differs between boots.
#[derive(Debug, Clone, Copy)]
pub struct Boot {
    /// Guest memory in bytes.
    pub memory: u64,
    /// Address and length of the initramfs; below 4 GiB.
    pub initramfs: Option<(u32, u32)>,
}

/// The structure's bytes.
pub fn bytes(boot: &Boot) -> [u8; BYTES] {
    let mut page = [0; BYTES];
    let mut put = |at: usize, field: &[u8]| page[at..at + field.len()].copy_from_slice(field);
    put(0x1fe, &0xaa55u16.to_le_bytes()); // boot_flag
    put(0x202, b"HdrS"); // header
    put(0x206, &0x020fu16.to_le_bytes()); // protocol 2.15
    put(0x210, &[0xff]); // type_of_loader: none of the registered
    if let Some((address, length)) = boot.initramfs {
        put(0x218, &address.to_le_bytes());
        put(0x21c, &length.to_le_bytes());
    }
    put(0x228, &(COMMAND_LINE as u32).to_le_bytes());
    put(0x238, &(COMMAND_LINE_BYTES as u32 - 1).to_le_bytes());
    let map = memory_map(boot.memory);
    put(0x1e8, &[map.len() as u8]);
    for (index, (address, length, kind)) in map.into_iter().enumerate() {
        let at = 0x2d0 + index * 20;
        put(at, &address.to_le_bytes());
        put(at + 8, &length.to_le_bytes());
        put(at + 16, &kind.to_le_bytes());
    }
    page
}

/// The e820 map as address, length and kind.
fn memory_map(memory: u64) -> Vec<(u64, u64, u32)> {
    let (usable, reserved) = (1, 2);
    let mut map = vec![
        (0, MP_TABLE, usable),
        (MP_TABLE, HIGH_MEMORY - MP_TABLE, reserved),
    ];
    for (address, length) in memory_ranges(memory) {
        if address == ABOVE_4_GIB {
            map.push((address, length, usable));
        } else {
            map.push((HIGH_MEMORY, length - HIGH_MEMORY, usable));
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_map_covers_all_memory_once() {
        let bytes_of = |map: &[(u64, u64, u32)]| map.iter().map(|entry| entry.1).sum::<u64>();
        assert_eq!(bytes_of(&memory_map(64 << 20)), 64 << 20);
        let large = memory_map(8 << 30);
        assert_eq!(bytes_of(&large), 8 << 30);
        assert!(
            large
                .windows(2)
                .all(|pair| pair[0].0 + pair[0].1 <= pair[1].0)
        );
    }

    #[test]
    fn the_map_and_the_initramfs_stand_where_the_kernel_reads_them() {
        let page = bytes(&Boot {
            memory: 64 << 20,
            initramfs: Some((0x300_0000, 77)),
        });
        assert_eq!(page[0x1e8], 3);
        assert_eq!(page[0x218..0x220], [0, 0, 0, 3, 77, 0, 0, 0]);
        assert_eq!(page[0x2d0 + 20..][..8], MP_TABLE.to_le_bytes());
    }
}

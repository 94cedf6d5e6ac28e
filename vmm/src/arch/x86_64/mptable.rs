//! The Intel MultiProcessor Specification 1.4 table: it lists the processors, the I/O interrupt
//! controller and what is wired to it.

use super::layout::{IO_APIC, LOCAL_APIC, MP_TABLE, PINS};

/// Version 1.4 of the specification.
const SPECIFICATION: u8 = 4;
/// Version that the local and I/O interrupt controllers report.
const APIC_VERSION: u8 = 0x14;
/// The only bus: ISA, whose interrupts are edges.
const ISA_BUS: u8 = 0;

/// The floating pointer and the table that it points to, for `vcpus` processors, to be written to
/// [`super::layout::MP_POINTER`] and [`MP_TABLE`].
pub fn tables(vcpus: u8) -> ([u8; 16], Vec<u8>) {
    (pointer(), table(vcpus))
}

fn pointer() -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(b"_MP_");
    // The table stands below 4 GiB.
    bytes[4..8].copy_from_slice(&(MP_TABLE as u32).to_le_bytes());
    bytes[8] = 1; // its own length in units of 16 bytes
    bytes[9] = SPECIFICATION;
    bytes[10] = checksum(&bytes);
    bytes
}

fn table(vcpus: u8) -> Vec<u8> {
    // An interrupt controller needs an id that no processor has.
    let io_apic = vcpus;
    let mut entries: Vec<u8> = Vec::new();
    for id in 0..vcpus {
        let enabled = 1;
        let boot = if id == 0 { 2 } else { 0 };
        entries.extend([0, id, APIC_VERSION, enabled | boot]);
        // Signature and features are read from CPUID instead.
        entries.extend([0; 16]);
    }
    entries.extend([1, ISA_BUS]);
    entries.extend(b"ISA   ");
    entries.extend([2, io_apic, APIC_VERSION, 1]);
    entries.extend(IO_APIC.to_le_bytes());
    for pin in 0..PINS as u8 {
        // A plain interrupt, polarity and trigger mode as usual on the bus.
        entries.extend([3, 0, 0, 0, ISA_BUS, pin, io_apic, pin]);
    }
    // The PC's old interrupt controller and the NMI reach all local ones by their two pins.
    let (external, nmi, every) = (3, 1, 0xff);
    entries.extend([4, external, 0, 0, ISA_BUS, 0, every, 0]);
    entries.extend([4, nmi, 0, 0, ISA_BUS, 0, every, 1]);

    let count = u16::from(vcpus) + 2 + PINS as u16 + 2;
    let mut bytes = Vec::with_capacity(44 + entries.len());
    bytes.extend(b"PCMP");
    bytes.extend((44 + entries.len() as u16).to_le_bytes());
    bytes.extend([SPECIFICATION, 0]);
    bytes.extend(b"BULKHEAD");
    bytes.extend(b"POD         ");
    bytes.extend([0; 6]); // no table of the maker's own
    bytes.extend(count.to_le_bytes());
    bytes.extend(LOCAL_APIC.to_le_bytes());
    bytes.extend([0; 4]); // no extension
    bytes.extend(entries);
    bytes[7] = checksum(&bytes);
    bytes
}

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use bulkhead_vmm_api::MAX_VCPUS;

    use super::super::layout::MP_POINTER;
    use super::*;

    #[test]
    fn both_checksums_are_right() {
        for vcpus in [1, 2, MAX_VCPUS] {
            let (pointer, table) = tables(vcpus);
            assert_eq!(checksum(&pointer), 0);
            assert_eq!(checksum(&table), 0);
        }
    }

    #[test]
    fn the_header_tells_the_length_and_the_entries() {
        let (_, table) = tables(3);
        assert_eq!(
            usize::from(u16::from_le_bytes([table[4], table[5]])),
            table.len()
        );
        let mut rest = &table[44..];
        let mut count = 0;
        while let [kind, ..] = rest {
            rest = &rest[if *kind == 0 { 20 } else { 8 }..];
            count += 1;
        }
        assert_eq!(u16::from_le_bytes([table[34], table[35]]), count);
    }

    #[test]
    fn the_largest_table_ends_before_the_pointer() {
        let (_, table) = tables(MAX_VCPUS);
        assert!(MP_TABLE + table.len() as u64 <= MP_POINTER);
    }
}

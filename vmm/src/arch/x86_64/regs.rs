//! The state in which the boot processor enters the kernel: 64-bit mode, paging on, flat segments
//! (kernel: Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::layout::{BOOT_PARAMS, GDT, PAGE_TABLES};

/// Selectors the protocol asks for: `__BOOT_CS` and `__BOOT_DS`.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
/// Descriptors of flat 64-bit code and of flat data.
const CODE_DESCRIPTOR: u64 = 0x00af_9b00_0000_ffff;
const DATA_DESCRIPTOR: u64 = 0x00cf_9300_0000_ffff;

/// The descriptor table: two unused entries, code, data.
pub fn gdt() -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes[16..24].copy_from_slice(&CODE_DESCRIPTOR.to_le_bytes());
    bytes[24..].copy_from_slice(&DATA_DESCRIPTOR.to_le_bytes());
    bytes
}

/// The three page tables of [`PAGE_TABLES`], in their order: one entry, one entry, and 512 pages
/// of 2 MiB.
pub fn page_tables() -> (u64, u64, Vec<u8>) {
    let (present_writable, large) = (3, 1 << 7);
    let pages = (0..512u64).flat_map(|page| (page << 21 | present_writable | large).to_le_bytes());
    (
        PAGE_TABLES[1] | present_writable,
        PAGE_TABLES[2] | present_writable,
        pages.collect(),
    )
}

/// Registers at the kernel's `entry`.
pub fn general(entry: u64) -> kvm_regs {
    kvm_regs {
        rip: entry,
        rsi: BOOT_PARAMS,
        rflags: 2,
        ..Default::default()
    }
}

/// Turns the state after a reset into 64-bit mode.
pub fn special(sregs: &mut kvm_sregs) {
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 31;
    sregs.cs = segment(CODE, 0xb, true);
    let data = segment(DATA, 3, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    let (protection, extension_type, paging) = (1, 1 << 4, 1 << 31);
    sregs.cr0 = protection | extension_type | paging;
    sregs.cr3 = PAGE_TABLES[0];
    sregs.cr4 = 1 << 5; // physical address extension
    sregs.efer = 1 << 8 | 1 << 10; // long mode enabled and active
}

fn segment(selector: u16, type_: u8, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        s: 1,
        l: code.into(),
        db: (!code).into(),
        g: 1,
        ..Default::default()
    }
}

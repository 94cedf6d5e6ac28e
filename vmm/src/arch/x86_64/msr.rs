//! Model-specific registers that a processor does not have right after its reset.

use kvm_bindings::{Msrs, kvm_msr_entry};
use vmm_sys_util::fam::Error;

/// Default memory type: its register, and write-back memory with ranges off, as firmware leaves it.
const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const WRITE_BACK: u64 = 1 << 11 | 6;

/// What to set on every vCPU.
pub fn boot() -> Result<Msrs, Error> {
    let memory_type = kvm_msr_entry {
        index: MTRR_DEFAULT_TYPE,
        data: WRITE_BACK,
        ..Default::default()
    };
    Msrs::from_entries(&[memory_type])
}

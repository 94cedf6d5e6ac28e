//! A PC without firmware, PCI and ACPI: processors and interrupts are listed in an MP table.

pub mod boot_params;
pub mod cpuid;
pub mod elf;
pub mod layout;
pub mod mptable;
pub mod msr;
pub mod regs;

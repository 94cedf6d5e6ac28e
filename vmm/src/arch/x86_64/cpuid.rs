//! What CPUID tells the guest: what KVM supports, with a topology of our own. One package, one
//! thread per core, so that Linux brings every processor online whatever its SMT policy is.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Feature bits of leaf 1.
const TSC_DEADLINE: u32 = 1 << 24; // ecx
const HYPERVISOR: u32 = 1 << 31; // ecx
const MULTI_THREADED: u32 = 1 << 28; // edx: the package holds more than one logical processor

/// Changes the leaves of `supported` that depend on the machine for the vCPU with interrupt
/// controller id `id` of `vcpus`.
pub fn adapt(supported: &mut CpuId, id: u8, vcpus: u8) {
    for entry in supported.as_mut_slice() {
        adapt_entry(entry, id, vcpus);
    }
}

fn adapt_entry(entry: &mut kvm_cpuid_entry2, id: u8, vcpus: u8) {
    let (apic, count) = (u32::from(id), u32::from(vcpus));
    let bits = id_bits(vcpus);
    match entry.function {
        0x1 => {
            entry.ebx = entry.ebx & 0xffff | count << 16 | apic << 24;
            entry.ecx |= TSC_DEADLINE | HYPERVISOR;
            entry.edx &= !MULTI_THREADED;
            if vcpus > 1 {
                entry.edx |= MULTI_THREADED;
            }
        }
        // Intel's caches: the first two levels belong to one core, the third to all.
        0x4 if entry.eax & 0x1f != 0 => {
            let sharers = if entry.eax >> 5 & 7 < 3 {
                0
            } else {
                (1 << bits) - 1
            };
            entry.eax = entry.eax & 0x3fff | sharers << 14 | ((1 << bits) - 1).min(63) << 26;
        }
        // Topology by levels: a core has one thread, the package all cores.
        0xb | 0x1f => {
            let (shift, processors, level) = match entry.index {
                0 => (0, 1, 1),
                1 => (bits, count, 2),
                _ => (0, 0, 0),
            };
            entry.eax = shift;
            entry.ebx = processors;
            entry.ecx = entry.index & 0xff | level << 8;
            entry.edx = apic;
        }
        // AMD's number of cores and the width of the ids.
        0x8000_0008 => entry.ecx = bits << 12 | (count - 1),
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let sharers = if entry.eax >> 5 & 7 < 3 { 0 } else { count - 1 };
            entry.eax = entry.eax & 0x3fff | sharers << 14;
        }
        // AMD's extended ids: the core's number, one thread per core; one node.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (apic, apic, 0),
        // AMD's extended topology would contradict what stands above.
        0x8000_0026 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        _ => {}
    }
}

/// How many bits number `vcpus` processors.
fn id_bits(vcpus: u8) -> u32 {
    u8::BITS - vcpus.saturating_sub(1).leading_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapted(function: u32, index: u32, eax: u32, id: u8, vcpus: u8) -> kvm_cpuid_entry2 {
        let mut entry = kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ..Default::default()
        };
        adapt_entry(&mut entry, id, vcpus);
        entry
    }

    #[test]
    fn ids_have_as_many_bits_as_they_need() {
        assert_eq!([1, 2, 3, 4, 5, 64].map(id_bits), [0, 1, 2, 2, 3, 6]);
    }

    #[test]
    fn leaf_1_names_the_processor() {
        let one = adapted(1, 0, 0, 0, 1);
        assert_eq!(one.edx & MULTI_THREADED, 0);
        assert_eq!(one.ecx, TSC_DEADLINE | HYPERVISOR);
        let third = adapted(1, 0, 0, 2, 4);
        assert_eq!((third.ebx >> 24, third.ebx >> 16 & 0xff), (2, 4));
        assert_ne!(third.edx & MULTI_THREADED, 0);
    }

    #[test]
    fn no_processor_is_another_ones_thread() {
        let threads = adapted(0xb, 0, 7, 2, 4);
        assert_eq!(
            (threads.eax, threads.ebx, threads.ecx, threads.edx),
            (0, 1, 0x100, 2)
        );
        let cores = adapted(0xb, 1, 7, 2, 4);
        assert_eq!(
            (cores.eax, cores.ebx, cores.ecx, cores.edx),
            (2, 4, 0x201, 2)
        );
        let amd = adapted(0x8000_001e, 0, 7, 2, 4);
        assert_eq!((amd.eax, amd.ebx), (2, 2));
    }
}

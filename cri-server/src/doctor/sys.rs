//! The micro guest's program and memory: what Rust cannot check.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::ptr::NonNull;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::mm::{MapFlags, ProtFlags};

// The program, for ring 0 in 64-bit mode, wherever it is put. Before each step it tells the step
// on port 0x80; see `microguest::Step` for the numbers. r15 is set by the breakpoint's handler.
std::arch::global_asm!(
    ".pushsection .rodata.bulkhead_microguest, \"a\"",
    "bulkhead_microguest_start:",
    // A loop whose iterations the host times.
    "    mov al, 1",
    "    out 0x80, al",
    "    mov ecx, 100000",
    "2:  dec ecx",
    "    jnz 2b",
    // A breakpoint through the IDT.
    "    mov al, 2",
    "    out 0x80, al",
    "    xor r15d, r15d",
    "    int3",
    "    cmp r15d, 0x1234",
    "    jne 3f",
    // The state of the x87 unit saved, spoilt and restored.
    "    mov al, 3",
    "    out 0x80, al",
    "    mov edi, 0x10000",
    "    mov esi, 0x12010",
    "    fninit",
    "    mov eax, 1",
    "    xor edx, edx",
    "    xsave [rdi]",
    "    mov word ptr [rsi], 0x027f",
    "    fldcw word ptr [rsi]",
    "    mov eax, 1",
    "    xor edx, edx",
    "    xrstor [rdi]",
    "    fnstcw word ptr [rsi]",
    "    cmp word ptr [rsi], 0x037f",
    "    jne 3f",
    // Sixteen bytes exchanged.
    "    mov al, 4",
    "    out 0x80, al",
    "    mov edi, 0x12000",
    "    xor eax, eax",
    "    xor edx, edx",
    "    mov ebx, 5",
    "    mov ecx, 6",
    "    lock cmpxchg16b [rdi]",
    "    jnz 3f",
    "    cmp qword ptr [rdi], 5",
    "    jne 3f",
    "    cmp qword ptr [rdi + 8], 6",
    "    jne 3f",
    "    mov al, 0x7f",
    "    out 0x80, al",
    "    hlt",
    // A wrong result.
    "3:  mov al, 0x7e",
    "    out 0x80, al",
    "    hlt",
    "bulkhead_microguest_breakpoint:",
    "    mov r15d, 0x1234",
    "    iretq",
    "bulkhead_microguest_exception:",
    "    mov al, 0x7d",
    "    out 0x80, al",
    "    hlt",
    "bulkhead_microguest_end:",
    ".popsection",
);

unsafe extern "C" {
    static bulkhead_microguest_start: u8;
    static bulkhead_microguest_breakpoint: u8;
    static bulkhead_microguest_exception: u8;
    static bulkhead_microguest_end: u8;
}

/// The micro guest's program with the places of its handlers, in bytes from its start.
pub struct Program {
    pub code: &'static [u8],
    pub breakpoint: u64,
    pub exception: u64,
}

/// The program.
pub fn program() -> Program {
    let start = &raw const bulkhead_microguest_start;
    let distance = |end: *const u8| end.addr() - start.addr();
    // SAFETY: both symbols lie in one read-only section that never changes, start before end.
    let code =
        unsafe { std::slice::from_raw_parts(start, distance(&raw const bulkhead_microguest_end)) };
    Program {
        code,
        breakpoint: distance(&raw const bulkhead_microguest_breakpoint) as u64,
        exception: distance(&raw const bulkhead_microguest_exception) as u64,
    }
}

/// Zeroed memory shared with a guest.
pub struct Memory {
    start: NonNull<u8>,
    bytes: usize,
}

impl Memory {
    /// Maps `bytes`, a multiple of the page size.
    pub fn new(bytes: usize) -> io::Result<Self> {
        // SAFETY: a new private mapping at an address of the kernel's choice touches no other.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, bytes })
    }

    /// Copies `data` to `offset`; data that does not fit is refused.
    pub fn write(&mut self, offset: usize, data: &[u8]) -> io::Result<()> {
        let fits = offset
            .checked_add(data.len())
            .is_some_and(|end| end <= self.bytes);
        if !fits {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the range was checked to lie in the mapping, which no guest uses yet or a
        // stopped one; `data` is other memory, since the mapping is never lent as a slice.
        unsafe {
            std::ptr::copy_nonoverlapping(
                data.as_ptr(),
                self.start.as_ptr().add(offset),
                data.len(),
            );
        }
        Ok(())
    }

    /// Makes it the memory of `vm` from guest address 0 on.
    pub fn give(&self, vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: self.bytes as u64,
            userspace_addr: self.start.as_ptr().expose_provenance() as u64,
        };
        // SAFETY: the range is mapped, and its owner outlives the VM: the caller keeps `Memory`
        // declared before the VM's descriptors, which are dropped first.
        unsafe { vm.set_user_memory_region(region) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, whole, and nothing refers to it any more. A failure
        // would leave it mapped, which harms nobody.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast::<c_void>(), self.bytes) };
    }
}

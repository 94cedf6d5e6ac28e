//! Everything that needs `unsafe`: system calls whose safety depends on the caller's memory,
//! descriptors named by number, and signals.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::thread::JoinHandleExt;
use std::ptr::null_mut;
use std::thread::JoinHandle;

use kvm_bindings::{kvm_run, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use rustix::thread::UnshareFlags;
use vm_memory::{GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

/// The most pieces that one transfer may have: the kernel's `UIO_MAXIOV`.
pub const MAX_PIECES: usize = 1024;

/// Reads from `offset` of the file into guest memory, as far as one `preadv` goes.
pub fn read_at(file: &File, into: &[VolatileSlice<'_>], offset: u64) -> Result<usize> {
    transfer(file, into, offset, libc::preadv)
}

/// Writes guest memory to `offset` of the file, as far as one `pwritev` goes.
pub fn write_at(file: &File, from: &[VolatileSlice<'_>], offset: u64) -> Result<usize> {
    transfer(file, from, offset, libc::pwritev)
}

type Transfer = unsafe extern "C" fn(i32, *const libc::iovec, i32, i64) -> isize;

fn transfer(
    file: &File,
    slices: &[VolatileSlice<'_>],
    offset: u64,
    call: Transfer,
) -> Result<usize> {
    let slices = slices.get(..MAX_PIECES).unwrap_or(slices);
    let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let pieces: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast(),
            iov_len: guard.len(),
        })
        .collect();
    let offset = i64::try_from(offset).map_err(|_| Error::from_raw_os_error(libc::EINVAL))?;
    loop {
        // SAFETY: every piece is guest memory that its guard keeps mapped; that the guest changes
        // it meanwhile is what volatile memory means, and the kernel copies it byte by byte. Their
        // number is at most MAX_PIECES.
        let count = unsafe {
            call(
                file.as_raw_fd(),
                pieces.as_ptr(),
                pieces.len() as i32,
                offset,
            )
        };
        if let Ok(count) = usize::try_from(count) {
            return Ok(count);
        }
        let error = Error::last_os_error();
        if error.kind() != std::io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Takes ownership of an inherited descriptor, if the number names one.
///
/// The caller takes every number at most once, and before anything else in the process opens
/// descriptors: then nobody else owns it.
pub fn inherited(number: i32) -> Option<OwnedFd> {
    // SAFETY: asking for the flags of a number has no effect.
    if number <= 2 || unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return None;
    }
    // SAFETY: the descriptor is open, and by the rule above nobody else's.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

/// The descriptor of an event, to wait for it.
pub fn descriptor(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the event owns the descriptor and outlives the borrow.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Closes all descriptors from `first` to `last`, which nobody may own.
pub fn close_range(first: u32, last: u32) {
    // SAFETY: by the rule above no value of this program stands for one of them. The call only
    // fails for an empty range, where there is nothing to close.
    unsafe {
        libc::close_range(first, last, 0);
    }
}

/// Leaves the namespaces that `flags` name, which do not include the descriptor table.
pub fn unshare(flags: UnshareFlags) -> Result<()> {
    debug_assert!(!flags.contains(UnshareFlags::FILES));
    // SAFETY: the descriptor table stays shared.
    Ok(unsafe { rustix::thread::unshare_unsafe(flags) }?)
}

/// Makes a `Kvm` of an open `/dev/kvm`.
pub fn kvm(file: OwnedFd) -> Kvm {
    // SAFETY: the descriptor is open and given away. What it is, the first ioctl finds out.
    unsafe { Kvm::from_raw_fd(file.into_raw_fd()) }
}

/// Gives a region of memory to the VM.
pub fn add_memory(
    vm: &VmFd,
    slot: u32,
    region: &GuestRegionMmap,
) -> std::result::Result<(), String> {
    let address = region
        .get_host_address(MemoryRegionAddress(0))
        .map_err(|e| e.to_string())?;
    let description = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: region.start_addr().0,
        memory_size: region.len(),
        userspace_addr: address as u64,
    };
    // SAFETY: the range is the region's mapping, which the machine keeps for as long as the VM.
    unsafe { vm.set_user_memory_region(description) }.map_err(|e| e.to_string())
}

/// Asks for huge pages behind a region. A host that does not give them costs time, nothing else.
pub fn prefer_huge_pages(region: &GuestRegionMmap) {
    if let Ok(address) = region.get_host_address(MemoryRegionAddress(0)) {
        // SAFETY: the range is the region's mapping, and advice does not change what is in it.
        unsafe {
            libc::madvise(address.cast(), region.len() as usize, libc::MADV_HUGEPAGE);
        }
    }
}

thread_local! {
    /// The run structure of this thread's vCPU, for the signal's sake.
    static RUN: Cell<*mut kvm_run> = const { Cell::new(null_mut()) };
}

/// The signal that takes a vCPU out of the guest.
fn kick_signal() -> i32 {
    libc::SIGRTMIN()
}

/// Prepares the process for [`kick`].
pub fn install_kick() -> Result<()> {
    extern "C" fn leave_guest(_: i32) {
        let run = RUN.get();
        if !run.is_null() {
            // SAFETY: the pointer is set while this thread's vCPU exists, and a byte that only
            // this thread writes is written. Without it a signal that comes just before KVM_RUN
            // would be lost.
            unsafe { (&raw mut (*run).immediate_exit).write_volatile(1) };
        }
    }
    // SAFETY: a zeroed sigaction is valid: no flags, so that KVM_RUN is interrupted, and an empty
    // mask. The function does only what signal-safety(7) allows.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = leave_guest as extern "C" fn(i32) as usize;
        if libc::sigaction(kick_signal(), &action, null_mut()) < 0 {
            return Err(Error::last_os_error());
        }
    }
    Ok(())
}

/// Lets [`kick`] reach `vcpu` on this thread until the value is dropped.
pub struct Kickable;

impl Kickable {
    /// For the vCPU that this thread will run.
    pub fn new(vcpu: &mut VcpuFd) -> Self {
        RUN.set(std::ptr::from_mut(vcpu.get_kvm_run()));
        Self
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        RUN.set(null_mut());
    }
}

/// Takes the vCPU that runs on `thread` out of the guest, or keeps it from entering.
pub fn kick<T>(thread: &JoinHandle<T>) {
    // SAFETY: a thread that was not joined yet can be signalled, even after its end; the handler
    // was installed before the thread was made.
    unsafe {
        libc::pthread_kill(thread.as_pthread_t(), kick_signal());
    }
}

//! What Rust cannot check of the command line's system calls.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Has large pieces of memory given back as soon as they are free. Left alone, the allocator takes
/// the first of them that is freed as a reason to have the next ones of that size on its heaps, which
/// then keep twice as much for good (mallopt(3), `M_MMAP_THRESHOLD`): outputs of an ExecSync.
pub fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a number of the allocator's, before there is a second thread to use it.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10);
    }
}

/// Lets `descriptor` be awaited until it is readable. Needs a runtime.
pub fn readable(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` owns its descriptor, answers with the same number always, and is kept
    // open by the `AsyncFd` for as long as that lives; nobody else closes or replaces it.
    let registered = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) };
    registered.map_err(io::Error::from)
}

//! Guest memory: anonymous and private.
//!
//! No other process needs to map it, and the host gives huge pages to such memory only: a guest
//! that starts on those takes a third less work than on a memfd's small ones.

use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::arch::x86_64::layout::memory_ranges;
use crate::device::virtio::Memory;
use crate::sys;

/// Why there is no memory.
#[derive(Debug, thiserror::Error)]
#[error("{mib} MiB of guest memory could not be made: {why}")]
pub struct MemoryError {
    mib: u32,
    why: String,
}

/// Makes `mib` MiB of guest memory. Pages are taken from the host when they are touched.
pub fn create(mib: u32) -> Result<Memory, MemoryError> {
    let failed = |why: String| MemoryError { mib, why };
    let mut ranges = Vec::new();
    for (address, length) in memory_ranges(u64::from(mib) << 20) {
        let size = usize::try_from(length).map_err(|error| failed(error.to_string()))?;
        ranges.push((GuestAddress(address), size));
    }
    let memory = GuestMemoryMmap::from_ranges(&ranges).map_err(|e| failed(e.to_string()))?;
    for region in memory.iter() {
        sys::prefer_huge_pages(region);
    }
    Ok(Arc::new(memory))
}

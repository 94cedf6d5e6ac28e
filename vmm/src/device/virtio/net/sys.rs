//! Calls of the kernel that take guest memory or a tap.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;

/// The most pieces that one call takes (`UIO_MAXIOV`).
pub const MAX_PIECES: usize = 1024;

/// What a tap may leave undone in frames for the guest (`TUNSETOFFLOAD`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offload {
    /// Checksums.
    pub checksum: bool,
    /// Segmentation of TCP over IPv4; needs `checksum`.
    pub tcp4: bool,
    /// Segmentation of TCP over IPv6; needs `checksum`.
    pub tcp6: bool,
    /// Segmentation of TCP with explicit congestion notification; needs one of the above.
    pub congestion: bool,
}

/// Reads one frame into `pieces`, and what does not fit into `rest`. Returns the bytes read. At
/// most [`MAX_PIECES`] - 1 pieces.
pub fn read(
    tap: BorrowedFd<'_>,
    pieces: &[VolatileSlice<'_>],
    rest: &mut [u8],
) -> io::Result<usize> {
    let mut vectors: Vec<libc::iovec> = pieces
        .iter()
        .map(|piece| libc::iovec {
            iov_base: piece.ptr_guard_mut().as_ptr().cast(),
            iov_len: piece.len(),
        })
        .collect();
    vectors.push(libc::iovec {
        iov_base: rest.as_mut_ptr().cast(),
        iov_len: rest.len(),
    });
    // SAFETY: each vector is memory that stays mapped and writable for its length while `pieces`
    // and `rest` are borrowed. What the kernel puts into guest memory races only with the guest,
    // which no Rust reference to that memory forbids: a `VolatileSlice` is not one.
    let count = unsafe { libc::readv(tap.as_raw_fd(), vectors.as_ptr(), length(&vectors)) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Writes one frame. At most [`MAX_PIECES`] pieces.
pub fn write(tap: BorrowedFd<'_>, pieces: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let vectors: Vec<libc::iovec> = pieces
        .iter()
        .map(|piece| libc::iovec {
            iov_base: piece.ptr_guard().as_ptr().cast_mut().cast(),
            iov_len: piece.len(),
        })
        .collect();
    // SAFETY: each vector is memory that stays mapped and readable for its length while `pieces`
    // is borrowed; the kernel copies from it, whatever the guest writes there meanwhile.
    let count = unsafe { libc::writev(tap.as_raw_fd(), vectors.as_ptr(), length(&vectors)) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

fn length(vectors: &[libc::iovec]) -> libc::c_int {
    // Callers keep to `MAX_PIECES`; the kernel refuses more than that anyway.
    libc::c_int::try_from(vectors.len()).unwrap_or(libc::c_int::MAX)
}

/// Tells a tap what it may leave undone.
pub fn set_offload(tap: BorrowedFd<'_>, offload: Offload) -> io::Result<()> {
    let flags = [
        (offload.checksum, libc::TUN_F_CSUM),
        (offload.tcp4, libc::TUN_F_TSO4),
        (offload.tcp6, libc::TUN_F_TSO6),
        (offload.congestion, libc::TUN_F_TSO_ECN),
    ];
    let flags = flags.iter().filter(|(on, _)| *on);
    let flags = flags.fold(0, |sum, (_, flag)| sum | flag);
    // SAFETY: TUNSETOFFLOAD takes its argument by value and touches no memory of ours.
    let result = unsafe {
        libc::ioctl(
            tap.as_raw_fd(),
            libc::TUNSETOFFLOAD,
            libc::c_ulong::from(flags),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Attaches a queue of a tap with several, so that frames come and go there, or detaches it.
pub fn attach(tap: BorrowedFd<'_>, attached: bool) -> io::Result<()> {
    // SAFETY: `struct ifreq` is plain data, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let flag = match attached {
        true => libc::IFF_ATTACH_QUEUE,
        false => libc::IFF_DETACH_QUEUE,
    };
    request.ifr_ifru.ifru_flags = flag as libc::c_short;
    // SAFETY: TUNSETQUEUE reads a `struct ifreq` at the address, which is that of one.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Bytes of the header before each frame of a tap.
pub fn header_bytes(tap: BorrowedFd<'_>) -> io::Result<libc::c_int> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: TUNGETVNETHDRSZ writes one int to the address, which is that of one.
    let result = unsafe {
        libc::ioctl(
            tap.as_raw_fd(),
            libc::TUNGETVNETHDRSZ,
            std::ptr::from_mut(&mut bytes),
        )
    };
    match result {
        0 => Ok(bytes),
        _ => Err(io::Error::last_os_error()),
    }
}

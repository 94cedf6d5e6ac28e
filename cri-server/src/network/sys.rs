//! The system calls of this module that Rust cannot check.
#![allow(unsafe_code)]

use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::ioctl::{self, Setter};
#[cfg(test)]
use rustix::mount::MountPropagationFlags;
use rustix::thread::UnshareFlags;

/// `TUNSETIFF` of include/uapi/linux/if_tun.h: `_IOW('T', 202, int)`.
const TUNSETIFF: ioctl::Opcode = ioctl::opcode::write::<i32>(b'T', 202);
/// `TUNSETVNETHDRSZ`: `_IOW('T', 216, int)`.
const TUNSETVNETHDRSZ: ioctl::Opcode = ioctl::opcode::write::<i32>(b'T', 216);

const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const IFF_MULTI_QUEUE: u16 = 0x0100;

/// `struct ifreq` as `TUNSETIFF` reads and writes it: name, flags, and the rest of the union.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// Makes the open /dev/net/tun `file` the tap `name` (at most 15 bytes; the rest is cut) of the
/// namespace it was opened in, with frames as virtio 1.2 §5.1.6 has them: no packet information,
/// a virtio header before each. With `several` the tap may have several queues, and if it is there
/// already, `file` becomes one more of them.
pub fn make_tap(file: impl AsFd, name: &str, several: bool) -> Result<(), Errno> {
    let several = if several { IFF_MULTI_QUEUE } else { 0 };
    let mut request = InterfaceRequest {
        name: [0; 16],
        flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | several,
        rest: [0; 22],
    };
    for (place, byte) in request.name.iter_mut().take(15).zip(name.bytes()) {
        *place = byte;
    }
    // SAFETY: TUNSETIFF copies a `struct ifreq`, 40 bytes on 64-bit Linux, from the pointer and
    // back to it; `InterfaceRequest` is 40 bytes of plain integers in that layout and lives in
    // the `Updater`'s borrow during the call.
    unsafe { ioctl::ioctl(file, ioctl::Updater::<TUNSETIFF, _>::new(&mut request)) }
}

/// Sets the length of the virtio header before each frame, in bytes.
pub fn set_header_length(tap: impl AsFd, bytes: i32) -> Result<(), Errno> {
    // SAFETY: TUNSETVNETHDRSZ reads one `int` from the pointer.
    unsafe { ioctl::ioctl(tap, Setter::<TUNSETVNETHDRSZ, i32>::new(bytes)) }
}

/// Moves the calling thread into a new network namespace.
pub fn unshare_network() -> Result<(), Errno> {
    // SAFETY: CLONE_NEWNET alone changes no memory and no descriptor table; only the calling
    // thread's view of the network changes.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
}

/// Moves the calling thread into a new mount namespace, whose mounts end with it.
#[cfg(test)]
pub fn unshare_mounts() -> Result<(), Errno> {
    // SAFETY: CLONE_NEWNS gives the thread a root and working directory of its own, and changes
    // no memory and no descriptor table.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS)? };
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private)
}

const _: () = assert!(size_of::<InterfaceRequest>() == 40);

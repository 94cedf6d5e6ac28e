//! The system calls of the tests that Rust cannot check.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result};
use rustix::ioctl::{self, Setter, Updater, opcode};

/// `TUNSETIFF` and `TUNSETVNETHDRSZ` of include/uapi/linux/if_tun.h.
const TUNSETIFF: ioctl::Opcode = opcode::write::<i32>(b'T', 202);
const TUNSETVNETHDRSZ: ioctl::Opcode = opcode::write::<i32>(b'T', 216);

/// `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
const FLAGS: u16 = 0x0002 | 0x1000 | 0x4000;

/// `struct ifreq` as `TUNSETIFF` reads it: name, flags, and the rest of the union.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// Opens the tap `name` (at most 15 bytes) with a virtio header of 12 bytes before each frame.
pub fn open_tap(name: &str) -> Result<OwnedFd> {
    let path = "/dev/net/tun";
    let file = File::options().read(true).write(true).open(path);
    let file = file.context(path)?;
    let mut request = InterfaceRequest {
        name: [0; 16],
        flags: FLAGS,
        rest: [0; 22],
    };
    for (place, byte) in request.name.iter_mut().take(15).zip(name.bytes()) {
        *place = byte;
    }
    // SAFETY: TUNSETIFF copies a `struct ifreq`, 40 bytes on 64-bit Linux, from the pointer and
    // back to it; `InterfaceRequest` has 40 bytes of plain integers in that layout. TUNSETVNETHDRSZ
    // reads one `int` from its pointer.
    unsafe {
        ioctl::ioctl(&file, Updater::<TUNSETIFF, _>::new(&mut request)).context("TUNSETIFF")?;
        ioctl::ioctl(&file, Setter::<TUNSETVNETHDRSZ, i32>::new(12)).context("TUNSETVNETHDRSZ")?;
    }
    Ok(file.into())
}

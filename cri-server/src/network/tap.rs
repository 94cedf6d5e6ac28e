//! The tap through which a guest's network card speaks.

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;

use super::error::NetworkError;
use super::sys;

/// `struct virtio_net_hdr_v1` with `num_buffers`, virtio 1.2 §5.1.6.
const HEADER_BYTES: i32 = 12;

/// Makes the tap `name` in the calling thread's network namespace. The tap lives as long as the
/// descriptor or a copy of it.
pub fn open(name: &str) -> Result<OwnedFd, NetworkError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
        .open("/dev/net/tun")
        .map_err(|source| NetworkError::Tap {
            step: "open /dev/net/tun for",
            source,
        })?;
    sys::make_tap(&file, name).map_err(|errno| NetworkError::Tap {
        step: "make",
        source: errno.into(),
    })?;
    sys::set_header_length(&file, HEADER_BYTES).map_err(|errno| NetworkError::Tap {
        step: "set the header length of",
        source: errno.into(),
    })?;
    Ok(file.into())
}

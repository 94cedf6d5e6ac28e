//! The tap through which a guest's network card speaks.

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;

use super::error::NetworkError;
use super::sys;

/// `struct virtio_net_hdr_v1` with `num_buffers`, virtio 1.2 §5.1.6.
const HEADER_BYTES: i32 = 12;

/// The queues of a tap. The tap lives as long as one of them or a copy.
pub type Tap = Vec<OwnedFd>;

/// Makes the tap `name` in the calling thread's network namespace, with so many queues, of which
/// there is one at least.
pub fn open(name: &str, queues: usize) -> Result<Tap, NetworkError> {
    // The kernel makes a tap for several queues ready for 256 of them, which is not for nothing.
    let several = queues > 1;
    (0..queues.max(1)).map(|_| queue(name, several)).collect()
}

fn queue(name: &str, several: bool) -> Result<OwnedFd, NetworkError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
        .open("/dev/net/tun")
        .map_err(|source| NetworkError::Tap {
            step: "open /dev/net/tun for",
            source,
        })?;
    sys::make_tap(&file, name, several).map_err(|errno| NetworkError::Tap {
        step: "make",
        source: errno.into(),
    })?;
    sys::set_header_length(&file, HEADER_BYTES).map_err(|errno| NetworkError::Tap {
        step: "set the header length of",
        source: errno.into(),
    })?;
    Ok(file.into())
}

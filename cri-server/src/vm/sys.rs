//! Descriptors that the async runtime watches.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, RawFd};

use tokio::io::unix::AsyncFd;

/// A value that is one descriptor.
#[derive(Debug)]
pub struct Watched<T>(pub T);

impl<T: AsFd> AsRawFd for Watched<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// Watches a value that owns its descriptor, has always the same one, and keeps it open until it
/// is dropped: an `OwnedFd`, or a control socket.
pub fn watch<T: AsFd>(owner: T) -> std::io::Result<AsyncFd<Watched<T>>> {
    // SAFETY: the descriptor is valid, stays the same and stays open as long as `owner` lives,
    // which is as long as the registration, since that owns it.
    let registered = unsafe { AsyncFd::register(Watched(owner)) };
    Ok(registered?)
}

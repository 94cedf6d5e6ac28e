//! The agent's end of a pipe or terminal.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// An end, read and written without blocking. All copies are one; a terminal's serves both
/// directions.
#[derive(Debug, Clone)]
pub struct End(Arc<AsyncFd<OwnedFd>>);

impl End {
    /// Has the event loop watch it.
    pub fn new(descriptor: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&descriptor, true)?;
        Ok(Self(Arc::new(crate::sys::watch(descriptor)?)))
    }

    /// Waits until [`End::try_read`] may have something to say.
    pub async fn readable(&self) {
        if let Ok(mut ready) = self.0.readable().await {
            ready.retain_ready();
        }
    }

    /// Reads what is there; 0 is the end, `WouldBlock` that there may be more later.
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.try_io(Interest::READABLE, |end| read(end, buffer))
    }

    /// As [`End::try_read`], of what the event loop may not have heard of yet.
    pub fn read_now(&self, buffer: &mut [u8]) -> io::Result<usize> {
        read(self.0.get_ref(), buffer)
    }

    /// Bytes written that are not read yet.
    pub fn waiting(&self) -> io::Result<u64> {
        Ok(rustix::io::ioctl_fionread(self)?)
    }

    /// Writes all, waiting while the process does not read.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let write = |end: &OwnedFd| Ok(rustix::io::write(end, bytes)?);
            let written = self.0.async_io(Interest::WRITABLE, write).await?;
            bytes = bytes.get(written..).unwrap_or_default();
        }
        Ok(())
    }
}

fn read(end: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    match rustix::io::read(end, buffer) {
        // The last process has closed its end of the terminal (pty(7)), all it wrote is read.
        Err(rustix::io::Errno::IO) => Ok(0),
        done => Ok(done?),
    }
}

impl AsFd for End {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

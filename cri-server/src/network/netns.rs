//! A pod's network namespace, pinned by a bind mount so that it outlives the server.

use std::fs::{self, File, OpenOptions};
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::mount::UnmountFlags;
use rustix::thread::LinkNameSpaceType;
use tokio::sync::oneshot;

use super::error::NetworkError;

/// An open, pinned network namespace.
#[derive(Debug)]
pub struct Namespace {
    path: PathBuf,
    descriptor: OwnedFd,
}

impl Namespace {
    /// Makes a namespace and mounts it on `path`, replacing what an interrupted attempt left.
    pub async fn create(path: PathBuf) -> Result<Self, NetworkError> {
        let place = path.clone();
        // A thread of its own: it never comes back from the new namespace.
        let descriptor = on_thread(&path, move || {
            remove(&place)?;
            let fail = |step, source: io::Error| failure(&place, step, source);
            if let Some(directory) = place.parent() {
                fs::DirBuilder::new()
                    .recursive(true)
                    .mode(0o700)
                    .create(directory)
                    .map_err(|source| fail("make its directory", source))?;
            }
            OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&place)
                .map_err(|source| fail("make its mount point", source))?;
            super::sys::unshare_network().map_err(|errno| fail("be made", errno.into()))?;
            // The stack of this namespace only passes frames between the pod's link and its
            // tap; it must not speak by itself. Absent where the kernel has no IPv6.
            match fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1") {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(fail("switch off IPv6", error));
                }
                _ => {}
            }
            rustix::mount::mount_bind("/proc/thread-self/ns/net", &place)
                .map_err(|errno| fail("be mounted", errno.into()))?;
            File::open(&place).map_err(|source| fail("be opened", source))
        })
        .await?;
        Ok(Self {
            path,
            descriptor: descriptor.into(),
        })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `work` to its end on a thread inside the namespace, with a runtime of its own.
    pub async fn run<T, F, W>(&self, work: W) -> Result<T, NetworkError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, NetworkError>>,
        W: FnOnce() -> F + Send + 'static,
    {
        let path = self.path.clone();
        let descriptor = self
            .descriptor
            .try_clone()
            .map_err(|source| failure(&path, "be entered", source))?;
        on_thread(&self.path, move || {
            let network = Some(LinkNameSpaceType::Network);
            rustix::thread::move_into_link_name_space(descriptor.as_fd(), network)
                .map_err(|errno| failure(&path, "be entered", errno.into()))?;
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|source| failure(&path, "start a runtime in it", source))?
                .block_on(work())
        })
        .await
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// Unpins the namespace on `path`; nothing when there is none. The kernel ends the namespace
/// once no process and no socket is in it. Blocks.
pub fn remove(path: &Path) -> Result<(), NetworkError> {
    use rustix::io::Errno;
    // One mount at most is ours, but an interrupted start may have stacked another.
    for _ in 0..8 {
        match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // INVAL: there, but not a mount.
            Err(Errno::NOENT | Errno::INVAL | Errno::NOTDIR) => break,
            Err(errno) => return Err(failure(path, "be unmounted", errno.into())),
        }
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(failure(path, "be removed", error))
        }
        _ => Ok(()),
    }
}

async fn on_thread<T, W>(path: &Path, work: W) -> Result<T, NetworkError>
where
    T: Send + 'static,
    W: FnOnce() -> Result<T, NetworkError> + Send + 'static,
{
    let (sender, receiver) = oneshot::channel();
    std::thread::Builder::new()
        .name("netns".to_owned())
        .spawn(move || {
            // Nobody listens when the caller gave up; what was made is found by its path.
            let _ = sender.send(work());
        })
        .map_err(|source| failure(path, "get a thread", source))?;
    receiver.await.map_err(|_| NetworkError::Ended)?
}

fn failure(path: &Path, step: &'static str, source: io::Error) -> NetworkError {
    NetworkError::Namespace {
        path: path.to_owned(),
        step,
        source,
    }
}

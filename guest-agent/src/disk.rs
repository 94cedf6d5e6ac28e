//! Disks in the VMM's windows: the driver bound and unbound, image and scratch mounted.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use tokio::sync::{mpsc, oneshot};

use crate::mount::{self, NO_DEV, READ_ONLY};
use crate::sys;

/// Where images are mounted, each in a directory named by its disk's serial.
const IMAGES: &str = "/run/bulkhead/images";
/// Where the pod's scratch disk is mounted.
pub const SCRATCH: &str = "/run/bulkhead/scratch";
/// Windows a VMM can have at most: two digits.
const WINDOWS: u32 = 100;
/// Longest serial of virtio-blk, virtio 1.2 §5.2.6.1.
const LONGEST_SERIAL: usize = 20;
/// How long the block layer may take to show a bound disk.
const PATIENCE: Duration = Duration::from_secs(2);

/// Why a disk is not as the host wants it.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The driver refused the device.
    #[error("cannot bind virtio-mmio.{window}: {source}; is a disk in that window?")]
    Bind {
        /// The window.
        window: u32,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Another disk, or no disk at all.
    #[error("window {window} holds {found}, not the disk {wanted:?}")]
    Other {
        /// The window.
        window: u32,
        /// What is there.
        found: String,
        /// The serial asked for.
        wanted: String,
    },
    /// No such disk.
    #[error("no disk of the guest has the serial {0:?}; attach it first")]
    Missing(String),
    /// Containers still use it.
    #[error("disk {serial} is in use by {users}")]
    InUse {
        /// Its serial.
        serial: String,
        /// The containers.
        users: String,
    },
    /// The kernel refused.
    #[error("disk {serial}: cannot {what}: {source}")]
    Step {
        /// Its serial.
        serial: String,
        /// The step, as the rest of a sentence.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The agent's own task is gone.
    #[error("the agent's disk task ended")]
    Gone,
}

type Work = Box<dyn FnOnce(&mut Shelf) + Send>;

/// Asks the one task that owns the disks.
#[derive(Debug, Clone)]
pub struct Disks {
    work: mpsc::Sender<Work>,
}

impl std::fmt::Debug for Shelf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map().entries(&self.images).finish()
    }
}

impl Disks {
    /// Starts the task.
    pub fn start() -> Self {
        let (work, mut incoming) = mpsc::channel::<Work>(16);
        tokio::spawn(async move {
            let mut shelf = Shelf::default();
            while let Some(work) = incoming.recv().await {
                let done = tokio::task::spawn_blocking(move || {
                    work(&mut shelf);
                    shelf
                });
                match done.await {
                    Ok(back) => shelf = back,
                    Err(_) => return,
                }
            }
        });
        Self { work }
    }

    async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut Shelf) -> Result<T, DiskError> + Send + 'static,
    ) -> Result<T, DiskError> {
        let (reply, answer) = oneshot::channel();
        let work: Work = Box::new(move |shelf| drop(reply.send(question(shelf))));
        self.work.send(work).await.map_err(|_| DiskError::Gone)?;
        answer.await.map_err(|_| DiskError::Gone)?
    }

    /// Binds the driver to a window's device and checks that it is the disk `serial`.
    pub async fn attach(&self, window: u32, serial: String) -> Result<(), DiskError> {
        check(window, &serial)?;
        self.ask(move |_| attach(window, &serial)).await
    }

    /// Unmounts a disk nobody uses and unbinds it.
    pub async fn detach(&self, window: u32, serial: String) -> Result<(), DiskError> {
        check(window, &serial)?;
        self.ask(move |shelf| shelf.detach(window, &serial)).await
    }

    /// The directory of an image, mounted now if it is not, used by `user` until released.
    pub async fn image(&self, serial: String, user: String) -> Result<String, DiskError> {
        check(0, &serial)?;
        self.ask(move |shelf| shelf.image(&serial, user)).await
    }

    /// Ends `user`'s use of every image.
    pub async fn release(&self, user: String) -> Result<(), DiskError> {
        self.ask(move |shelf| {
            for users in shelf.images.values_mut() {
                users.remove(&user);
            }
            Ok(())
        })
        .await
    }

    /// Mounts the scratch disk, grown to fill its device. An empty serial: memory instead.
    pub async fn scratch(&self, serial: String) -> Result<(), DiskError> {
        self.ask(move |_| scratch(&serial)).await
    }

    /// Unmounts everything, writing back what is not yet on the disks.
    pub async fn finish(&self) -> Result<(), DiskError> {
        self.ask(|shelf| {
            rustix::fs::sync();
            for serial in shelf.images.keys() {
                let _ = mount::detach(&format!("{IMAGES}/{serial}"));
            }
            shelf.images.clear();
            if mount::unmount(SCRATCH).is_err() {
                let _ = mount::detach(SCRATCH);
            }
            rustix::fs::sync();
            Ok(())
        })
        .await
    }
}

/// What is mounted: images by serial, with the containers that use them.
#[derive(Default)]
struct Shelf {
    images: BTreeMap<String, BTreeSet<String>>,
}

impl Shelf {
    fn image(&mut self, serial: &str, user: String) -> Result<String, DiskError> {
        let place = format!("{IMAGES}/{serial}");
        if !self.images.contains_key(serial) {
            let device = find(serial).ok_or_else(|| DiskError::Missing(serial.to_owned()))?;
            let device = format!("/dev/{device}");
            let done = fs::create_dir_all(&place).and_then(|()| {
                // The file system itself has to be read-only, not just its mount: the device is.
                mount::file_system_at(
                    &place,
                    "erofs",
                    Some(&device),
                    &["ro".into()],
                    READ_ONLY | NO_DEV,
                )
            });
            step(serial, "mount its image", done)?;
            self.images.insert(serial.to_owned(), BTreeSet::new());
        }
        if let Some(users) = self.images.get_mut(serial) {
            users.insert(user);
        }
        Ok(place)
    }

    fn detach(&mut self, window: u32, serial: &str) -> Result<(), DiskError> {
        if let Some(users) = self.images.get(serial) {
            if !users.is_empty() {
                return Err(DiskError::InUse {
                    serial: serial.to_owned(),
                    users: users.iter().cloned().collect::<Vec<_>>().join(", "),
                });
            }
            let place = format!("{IMAGES}/{serial}");
            step(serial, "unmount it", mount::unmount(&place))?;
            let _ = fs::remove_dir(&place);
            self.images.remove(serial);
        }
        match block_device(window) {
            // Unbound already.
            None => return Ok(()),
            Some(device) => expect(window, &device, serial)?,
        }
        let unbound = fs::write(format!("{DRIVER}/unbind"), format!("virtio-mmio.{window}"));
        step(serial, "unbind its driver", unbound)
    }
}

const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";

fn step<T>(serial: &str, what: &'static str, done: io::Result<T>) -> Result<T, DiskError> {
    done.map_err(|source| DiskError::Step {
        serial: serial.to_owned(),
        what,
        source,
    })
}

fn check(window: u32, serial: &str) -> Result<(), DiskError> {
    if window >= WINDOWS {
        return Err(DiskError::Invalid(format!(
            "window {window} does not exist"
        )));
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let named = (1..=LONGEST_SERIAL).contains(&serial.len()) && !serial.starts_with('.');
    if !named || !serial.chars().all(plain) {
        return Err(DiskError::Invalid(format!(
            "serial {serial:?} must be 1 to {LONGEST_SERIAL} letters, digits, dots, dashes or \
             underscores"
        )));
    }
    Ok(())
}

fn attach(window: u32, serial: &str) -> Result<(), DiskError> {
    let device = PathBuf::from(format!("/sys/bus/platform/devices/virtio-mmio.{window}"));
    // What was in a window at boot is bound already.
    if !device.join("driver").exists() {
        fs::write(format!("{DRIVER}/bind"), format!("virtio-mmio.{window}"))
            .map_err(|source| DiskError::Bind { window, source })?;
    }
    // Nothing waits on the bind of the block driver itself, which mostly is done by now.
    let deadline = Instant::now() + PATIENCE;
    loop {
        match block_device(window) {
            Some(name) if Path::new(&format!("/dev/{name}")).exists() => {
                return expect(window, &name, serial);
            }
            _ if Instant::now() > deadline => {
                return Err(DiskError::Other {
                    window,
                    found: "no disk".into(),
                    wanted: serial.to_owned(),
                });
            }
            _ => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

fn expect(window: u32, device: &str, serial: &str) -> Result<(), DiskError> {
    let found = serial_of(device);
    if found.as_deref() == Some(serial) {
        return Ok(());
    }
    Err(DiskError::Other {
        window,
        found: match found {
            Some(found) => format!("the disk {found:?}"),
            None => "a disk without serial".into(),
        },
        wanted: serial.to_owned(),
    })
}

/// The name of the disk in a window: /sys/bus/platform/devices/virtio-mmio.N/virtioM/block/vdX.
fn block_device(window: u32) -> Option<String> {
    let window = format!("/sys/bus/platform/devices/virtio-mmio.{window}");
    let device = entries(window).find(|path| name(path).starts_with("virtio"))?;
    let disk = entries(device.join("block")).next()?;
    Some(name(&disk))
}

fn find(serial: &str) -> Option<String> {
    entries("/sys/block")
        .map(|path| name(&path))
        .find(|device| serial_of(device).as_deref() == Some(serial))
}

fn serial_of(device: &str) -> Option<String> {
    let serial = fs::read_to_string(format!("/sys/block/{device}/serial")).ok()?;
    Some(serial.trim_end_matches(['\n', '\0']).to_owned())
}

fn entries(directory: impl AsRef<Path>) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.path())
}

fn name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn scratch(serial: &str) -> Result<(), DiskError> {
    step(serial, "make its mount point", fs::create_dir_all(SCRATCH))?;
    if serial.is_empty() {
        let mounted = mount::file_system_at(SCRATCH, "tmpfs", None, &["mode=0700".into()], NO_DEV);
        return step("(memory)", "mount it", mounted);
    }
    check(0, serial)?;
    let device = find(serial).ok_or_else(|| DiskError::Missing(serial.to_owned()))?;
    let path = format!("/dev/{device}");
    // Quotas need both the file system made for them and a kernel that keeps them.
    let quota = ["prjquota".to_owned()];
    let mounted = mount::file_system_at(SCRATCH, "ext4", Some(&path), &quota, NO_DEV)
        .or_else(|_| mount::file_system_at(SCRATCH, "ext4", Some(&path), &[], NO_DEV));
    step(serial, "mount it as ext4", mounted)?;
    step(serial, "grow its file system", grow(&device))
}

/// The disk comes with a small file system, whatever its size.
fn grow(device: &str) -> io::Result<()> {
    let size = fs::read_to_string(format!("/sys/block/{device}/size"))?;
    let sectors: u64 = size.trim().parse().map_err(io::Error::other)?;
    let root = rustix::fs::open(SCRATCH, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let now = rustix::fs::fstatvfs(&root)?;
    let blocks = sectors.saturating_mul(512) / now.f_frsize.max(512);
    // What ext4 itself takes is not in f_blocks: a file system near its device's size is done.
    if blocks.saturating_sub(now.f_blocks) <= blocks / 16 {
        return Ok(());
    }
    sys::grow_ext4(root.as_fd(), blocks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_serial_cannot_leave_its_directory_or_add_an_option() {
        assert!(check(3, "img-0123456789abcdef").is_ok());
        for serial in [
            "",
            "..",
            "../x",
            "a/b",
            "a:b",
            "a,b",
            "123456789012345678901",
        ] {
            assert!(check(0, serial).is_err(), "{serial}");
        }
        assert!(check(WINDOWS, "x").is_err());
    }

    #[tokio::test]
    async fn a_disk_that_is_not_there_is_named() {
        let disks = Disks::start();
        let error = disks
            .image("no-such-disk".into(), "c".into())
            .await
            .unwrap_err();
        assert!(error.to_string().contains("no-such-disk"), "{error}");
    }
}

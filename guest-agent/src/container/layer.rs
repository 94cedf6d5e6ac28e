//! Where what a container writes goes: its changes to the image onto the scratch disk, which counts
//! them as a quota project, and those to the files it was given into memory.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::container::tree;
use crate::disk::SCRATCH;
use crate::{mount, sys};

/// Bytes that the files given to a container may grow to: what is given (at most a request of
/// 16 MiB), and some. They count as the memory of whoever writes them.
const FILES_BYTES: usize = 20 << 20;

/// The directory that holds the changes of container `id`.
pub fn place(id: &str) -> PathBuf {
    Path::new(SCRATCH).join("containers").join(id)
}

/// The directory that holds the files given to container `id`: a file system of its own. A container
/// has them as mounts, and by these may be able to fill, freeze or close the file system they are of.
pub fn files(id: &str) -> PathBuf {
    Path::new("/run/bulkhead/files").join(id)
}

/// Makes both directories of container `id`, empty, the first as a project of its own. A pod without
/// a scratch disk counts nothing.
pub fn make(id: &str) -> io::Result<()> {
    let files = files(id);
    fs::create_dir_all(&files)?;
    let options = [format!("size={FILES_BYTES}"), "mode=0700".to_owned()];
    let attributes = mount::NO_SUID | mount::NO_DEV;
    mount::file_system_at(
        &files.to_string_lossy(),
        "tmpfs",
        None,
        &options,
        attributes,
    )?;
    let place = place(id);
    fs::create_dir_all(&place)?;
    let directory = File::open(&place)?;
    match sys::set_project(directory.as_fd(), project(&directory)?) {
        Err(error) if Errno::from_io_error(&error) == Some(Errno::NOTTY) => Ok(()),
        Err(error) if Errno::from_io_error(&error) == Some(Errno::OPNOTSUPP) => Ok(()),
        made => made,
    }
}

/// Removes both directories of container `id`. What is not there is no error; it can be repeated.
pub fn remove(id: &str) -> io::Result<()> {
    let files = files(id);
    // Not one, where the making failed before or a removal later.
    let _ = mount::detach(&files.to_string_lossy());
    match fs::remove_dir(&files) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    tree::remove(&place(id))
}

/// The bytes and inodes below it, where they are counted.
pub fn usage(place: &Path) -> Option<(u64, u64)> {
    let directory = File::open(place).ok()?;
    sys::project_usage(directory.as_fd(), project(&directory).ok()?).ok()
}

/// No two directories have the same one: their inode's number, which ext4 keeps in 32 bits.
fn project(directory: &File) -> io::Result<u32> {
    let inode = directory.metadata()?.ino();
    u32::try_from(inode).map_err(io::Error::other)
}

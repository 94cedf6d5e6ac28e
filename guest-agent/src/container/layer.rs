//! What a container writes onto its root file system and the files it was given, counted by the
//! scratch disk itself as a quota project.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::container::tree;
use crate::disk::SCRATCH;
use crate::sys;

/// The directory that holds the changes of container `id`.
pub fn place(id: &str) -> PathBuf {
    Path::new(SCRATCH).join("containers").join(id)
}

/// By which the directory of container `id` is removed. It counts for no project: a directory of any
/// can be moved there.
fn bin(id: &str) -> PathBuf {
    Path::new(SCRATCH).join("removed").join(id)
}

/// Makes the directory of container `id`, empty, as a project of its own. A pod without a scratch
/// disk counts nothing.
pub fn make(id: &str) -> io::Result<()> {
    // Made while there is room.
    fs::create_dir_all(bin(id))?;
    let place = place(id);
    fs::create_dir_all(&place)?;
    let directory = File::open(&place)?;
    match sys::set_project(directory.as_fd(), project(&directory)?) {
        Err(error) if Errno::from_io_error(&error) == Some(Errno::NOTTY) => Ok(()),
        Err(error) if Errno::from_io_error(&error) == Some(Errno::OPNOTSUPP) => Ok(()),
        made => made,
    }
}

/// Removes the directory of container `id`. What is not there is no error; it can be repeated.
pub fn remove(id: &str) -> io::Result<()> {
    tree::remove(&place(id), &bin(id))
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

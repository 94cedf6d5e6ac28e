//! What a container writes onto its root file system, counted by the scratch disk itself as a quota
//! project.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::disk::SCRATCH;
use crate::sys;

/// The directory that holds the changes of container `id`.
pub fn place(id: &str) -> PathBuf {
    Path::new(SCRATCH).join("containers").join(id)
}

/// Makes the directory, empty, as a project of its own. A pod without a scratch disk counts
/// nothing.
pub fn make(place: &Path) -> io::Result<()> {
    fs::create_dir_all(place)?;
    let directory = File::open(place)?;
    match sys::set_project(directory.as_fd(), project(&directory)?) {
        Err(error) if Errno::from_io_error(&error) == Some(Errno::NOTTY) => Ok(()),
        Err(error) if Errno::from_io_error(&error) == Some(Errno::OPNOTSUPP) => Ok(()),
        made => made,
    }
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

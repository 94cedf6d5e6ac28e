//! The removal of directories with all that a container has put into them.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, IFlags, Mode, OFlags};
use rustix::io::Errno;

/// Removes a tree, which may be as deep and as wide as its disk has inodes, and the disk full. What
/// is not there is no error; a removal that has failed can be gone on with.
pub fn remove(top: &Path) -> io::Result<()> {
    empty(top, first_full)?;
    match fs::remove_dir(top) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            release(CWD, top);
            fs::remove_dir(top)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Removes the control group at `top` with those below it. Its own files go with a group.
pub fn remove_groups(top: &Path) -> io::Result<()> {
    empty(top, first_full_group)?;
    match fs::remove_dir(top) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Removes what is below `top`. `first` removes what it can in a directory, up to the first one that
/// is not empty. One descriptor walks down to the last directory and up again, so that neither
/// descriptors nor the stack nor the disk's need grows; nobody else moves what is there.
fn empty(top: &Path, first: impl Fn(&OwnedFd) -> io::Result<Option<CString>>) -> io::Result<()> {
    let mut at = match open(CWD, top) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        opened => opened?,
    };
    let mut depth = 0_u64;
    let mut emptied = None;
    loop {
        match first(&at)? {
            Some(child) => {
                let child = open(&at, &*child)?;
                // What keeps it is nothing that could be removed.
                if emptied == Some(rustix::fs::fstat(&child)?.st_ino) {
                    return Err(Errno::BUSY.into());
                }
                (at, depth) = (child, depth + 1);
            }
            None if depth == 0 => return Ok(()),
            None => {
                emptied = Some(rustix::fs::fstat(&at)?.st_ino);
                (at, depth) = (open(&at, "..")?, depth - 1);
            }
        }
    }
}

fn first_full(directory: &OwnedFd) -> io::Result<Option<CString>> {
    for name in names(directory)? {
        let name = name?;
        let removed = match unlink(directory, &name, AtFlags::empty()) {
            Err(Errno::ISDIR) => unlink(directory, &name, AtFlags::REMOVEDIR),
            removed => removed,
        };
        match removed {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::NOTEMPTY) => return Ok(Some(name)),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

fn first_full_group(directory: &OwnedFd) -> io::Result<Option<CString>> {
    for name in names(directory)? {
        let name = name?;
        match rustix::fs::unlinkat(directory, &*name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT | Errno::NOTDIR) => {}
            Err(Errno::BUSY | Errno::NOTEMPTY) => return Ok(Some(name)),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

/// Removes one name, whatever a container has done to keep it.
fn unlink(directory: &OwnedFd, name: &CStr, flags: AtFlags) -> Result<(), Errno> {
    match rustix::fs::unlinkat(directory, name, flags) {
        Err(Errno::PERM) => {
            release(directory, name);
            rustix::fs::unlinkat(directory, name, flags)
        }
        done => done,
    }
}

/// Takes the attributes away by which a container with CAP_LINUX_IMMUTABLE can keep a directory or
/// what is in it as it is (ioctl_iflags(2)). Where that fails the removal says why.
fn release(directory: impl AsFd, name: impl rustix::path::Arg) {
    let clear = |file: BorrowedFd<'_>| {
        if let Ok(flags) = rustix::fs::ioctl_getflags(file) {
            let kept = flags - (IFlags::IMMUTABLE | IFlags::APPEND);
            let _ = rustix::fs::ioctl_setflags(file, kept);
        }
    };
    clear(directory.as_fd());
    // Nothing that is no file can hold the open up, or do anything.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    if let Ok(file) = rustix::fs::openat(directory, name, flags, Mode::empty()) {
        clear(file.as_fd());
    }
}

fn open(parent: impl AsFd, name: impl rustix::path::Arg) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(parent, name, flags, Mode::empty())?)
}

/// The names in a directory, but those of itself and its parent.
fn names(directory: &OwnedFd) -> io::Result<impl Iterator<Item = io::Result<CString>> + use<>> {
    let entries = Dir::read_from(directory)?;
    Ok(entries.filter_map(|entry| match entry {
        Ok(entry) if matches!(entry.file_name().to_bytes(), b"." | b"..") => None,
        Ok(entry) => Some(Ok(entry.file_name().to_owned())),
        Err(error) => Some(Err(error.into())),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// More levels than a process usually has descriptors.
    fn nest(top: &Path) {
        let mut deep = open(CWD, top).unwrap();
        for _ in 0..1100 {
            rustix::fs::mkdirat(&deep, "d", Mode::RWXU).unwrap();
            deep = open(&deep, "d").unwrap();
        }
    }

    #[test]
    fn a_tree_of_any_depth_is_removed_and_nothing_beside_it() {
        let home = tempfile::tempdir().unwrap();
        let top = home.path().join("top");
        fs::write(home.path().join("kept"), "kept").unwrap();
        for name in ["top", "top/a", "top/b", "top/b/empty", "top/b/full"] {
            fs::create_dir(home.path().join(name)).unwrap();
        }
        for name in ["top/plain", "top/b/full/plain"] {
            fs::write(home.path().join(name), "x").unwrap();
        }
        std::os::unix::fs::symlink(home.path(), top.join("link")).unwrap();
        nest(&top.join("a"));
        for _ in 0..2 {
            remove(&top).unwrap();
            let left: Vec<_> = fs::read_dir(home.path()).unwrap().flatten().collect();
            assert_eq!(left.len(), 1, "{left:?}");
            assert_eq!(left[0].file_name(), "kept");
        }
    }

    #[test]
    fn groups_are_removed_at_any_depth_and_what_holds_one_is_told() {
        let home = tempfile::tempdir().unwrap();
        let top = home.path().join("top");
        for name in ["a", "b/c/d", "b/e", "f/g"] {
            fs::create_dir_all(top.join(name)).unwrap();
        }
        nest(&top.join("b/c/d"));
        // A plain file stands for a process: neither goes with its group.
        fs::write(top.join("b/e/process"), "").unwrap();
        let refused = remove_groups(&top).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ResourceBusy);
        fs::remove_file(top.join("b/e/process")).unwrap();
        for _ in 0..2 {
            remove_groups(&top).unwrap();
            assert!(!top.exists());
        }
    }
}

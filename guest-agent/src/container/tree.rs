//! The removal of a directory with all that a container has put into it.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, IFlags, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

/// Removes `top` by way of `bin`, a directory of the same file system that is removed with it. What
/// is not there is no error; a removal that has failed can be gone on with.
///
/// A tree may be as deep as its disk has inodes. Every directory that is not empty is moved into
/// `bin` itself, so that neither descriptors nor the stack grow with the depth.
pub fn remove(top: &Path, bin: &Path) -> io::Result<()> {
    fs::create_dir_all(bin)?;
    let mut place = Bin {
        directory: open(CWD, bin)?,
        next: 0,
    };
    place.take(CWD, top)?;
    while place.empty_once()? {}
    drop(place);
    fs::remove_dir(bin)
}

/// Removes the control group at `top` with those below it, however deep they are. Its own files go
/// with a group, and groups cannot be moved: one descriptor walks down to the last one and up again.
pub fn remove_groups(top: &Path) -> io::Result<()> {
    let mut at = match open(CWD, top) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        opened => opened?,
    };
    let mut depth = 0_u64;
    let mut emptied = None;
    loop {
        match first_full(&at)? {
            Some(child) => {
                let child = open(&at, &*child)?;
                // What keeps it is no group.
                if emptied == Some(rustix::fs::fstat(&child)?.st_ino) {
                    return Err(Errno::BUSY.into());
                }
                (at, depth) = (child, depth + 1);
            }
            None if depth == 0 => break,
            None => {
                emptied = Some(rustix::fs::fstat(&at)?.st_ino);
                (at, depth) = (open(&at, "..")?, depth - 1);
            }
        }
    }
    drop(at);
    fs::remove_dir(top)
}

/// Removes the empty directories in a directory up to the first that is not empty.
fn first_full(directory: &OwnedFd) -> io::Result<Option<CString>> {
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

struct Bin {
    directory: OwnedFd,
    /// The name of the next directory in it, if that is free.
    next: u64,
}

impl Bin {
    fn take(&mut self, parent: impl AsFd, name: impl rustix::path::Arg + Copy) -> io::Result<()> {
        let mut freed = false;
        loop {
            let free = self.next.to_string();
            self.next += 1;
            let only = RenameFlags::NOREPLACE;
            match rustix::fs::renameat_with(&parent, name, &self.directory, free, only) {
                Ok(()) | Err(Errno::NOENT) => return Ok(()),
                // Left by a removal that has failed.
                Err(Errno::EXIST) => {}
                Err(Errno::PERM) if !freed => {
                    freed = true;
                    release(&parent, name);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Removes what is in it, but what is moved into it meanwhile. Whether there was anything.
    fn empty_once(&mut self) -> io::Result<bool> {
        let mut any = false;
        for name in names(&self.directory)? {
            let name = name?;
            any = true;
            self.empty(&name)?;
            unlink(&self.directory, &name, AtFlags::REMOVEDIR)?;
        }
        Ok(any)
    }

    /// Plain files go first: where the disk is full, they make room for moving.
    fn empty(&mut self, name: &CStr) -> io::Result<()> {
        let directory = open(&self.directory, name)?;
        let mut directories = false;
        for name in names(&directory)? {
            match unlink(&directory, &name?, AtFlags::empty()) {
                Err(Errno::ISDIR) => directories = true,
                removed => removed?,
            }
        }
        if !directories {
            return Ok(());
        }
        for name in names(&directory)? {
            let name = name?;
            match unlink(&directory, &name, AtFlags::REMOVEDIR) {
                Err(Errno::NOTEMPTY) => self.take(&directory, &*name)?,
                removed => removed?,
            }
        }
        Ok(())
    }
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
        let (top, bin) = (home.path().join("top"), home.path().join("bin"));
        fs::write(home.path().join("kept"), "kept").unwrap();
        for name in ["top", "top/a", "top/b", "top/b/empty", "top/b/full"] {
            fs::create_dir(home.path().join(name)).unwrap();
        }
        for name in ["top/plain", "top/b/full/plain"] {
            fs::write(home.path().join(name), "x").unwrap();
        }
        std::os::unix::fs::symlink(home.path(), top.join("link")).unwrap();
        nest(&top.join("a"));
        // As an earlier removal leaves it that has failed.
        fs::create_dir_all(bin.join("0/old")).unwrap();
        remove(&top, &bin).unwrap();
        let left: Vec<_> = fs::read_dir(home.path()).unwrap().flatten().collect();
        assert_eq!(left.len(), 1, "{left:?}");
        assert_eq!(left[0].file_name(), "kept");
        remove(&top, &bin).unwrap();
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

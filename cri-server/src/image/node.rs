//! Single files and directories of a tree, by their directory's descriptor.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{self, AtFlags, Dir, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;

use super::archive::Member;

pub(super) fn owner(member: &Member) -> (Option<Uid>, Option<Gid>) {
    (
        Some(Uid::from_raw(member.uid)),
        Some(Gid::from_raw(member.gid)),
    )
}

pub(super) fn timestamps(mtime: i64) -> Timestamps {
    let time = Timespec {
        tv_sec: mtime,
        tv_nsec: 0,
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

/// File capabilities, ACLs and users' own attributes are part of an image. Labels are the
/// host's, and overlay's attributes would steer the overlay the image is put under.
pub(super) fn keeps_xattr(name: &[u8]) -> bool {
    name == b"security.capability"
        || name == b"system.posix_acl_access"
        || name == b"system.posix_acl_default"
        || (name.starts_with(b"user.") && !name.starts_with(b"user.overlay."))
}

pub(super) fn make_node(
    parent: BorrowedFd<'_>,
    name: &CStr,
    kind: FileType,
    major: u32,
    minor: u32,
) -> Result<(), Errno> {
    fs::mknodat(parent, name, kind, Mode::empty(), fs::makedev(major, minor))
}

pub(super) fn open_directory(parent: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    fs::openat(parent, name, flags, Mode::empty())
}

pub(super) fn is_directory(parent: BorrowedFd<'_>, name: &CStr) -> Result<bool, Errno> {
    let stat = fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

pub(super) fn entries(directory: BorrowedFd<'_>) -> Result<Vec<CString>, Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let name = entry?.file_name().to_owned();
        if name.to_bytes() != b"." && name.to_bytes() != b".." {
            names.push(name);
        }
    }
    Ok(names)
}

/// Removes a file or a whole directory. The depth is that of the tree, which is bounded.
pub(super) fn remove_all(parent: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    if !is_directory(parent, name)? {
        return fs::unlinkat(parent, name, AtFlags::empty());
    }
    let directory = open_directory(parent, name)?;
    for entry in entries(directory.as_fd())? {
        remove_all(directory.as_fd(), &entry)?;
    }
    fs::unlinkat(parent, name, AtFlags::REMOVEDIR)
}

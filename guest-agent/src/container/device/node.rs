//! Nodes: made for a container, so that what it does to one is its own business.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid};

use super::filter::disk_majors;
use super::{DEFAULT, Kind, Node};
use crate::container::plan::PlanError;
use crate::mount::{self, NO_EXEC, NO_SUID};

/// Refuses nodes of devices the guest does not have, and of the pod's disks.
pub fn check(nodes: &[Node]) -> Result<(), PlanError> {
    let disks = disk_majors(&fs::read_to_string("/proc/devices").unwrap_or_default());
    nodes.iter().try_for_each(|node| {
        let (folder, letter) = match node.kind {
            Kind::Character => ("char", 'c'),
            Kind::Block => ("block", 'b'),
            Kind::Fifo => return Ok(()),
        };
        let Node { major, minor, .. } = node;
        let what = if node.kind == Kind::Block && disks.contains(major) {
            "is a disk of the pod itself"
        } else if !Path::new(&format!("/sys/dev/{folder}/{major}:{minor}")).exists() {
            "does not exist in the guest"
        } else {
            return Ok(());
        };
        Err(PlanError::Invalid {
            field: "linux.devices".into(),
            what: format!("{}: the device {letter} {major}:{minor} {what}", node.path),
        })
    })
}

/// Makes the default nodes, by their names, and `nodes`, by their positions, in a file system of its
/// own at `place`.
pub fn make_nodes(place: &str, nodes: &[Node]) -> io::Result<()> {
    let options = ["mode=0700".to_owned(), "size=64k".to_owned()];
    fs::create_dir_all(place)?;
    mount::file_system_at(place, "tmpfs", Some("nodes"), &options, NO_EXEC | NO_SUID)?;
    let directory = rustix::fs::open(place, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    for (name, major, minor) in DEFAULT {
        let node = Node {
            path: String::new(),
            kind: Kind::Character,
            major,
            minor,
            mode: 0o666,
            uid: 0,
            // As devtmpfs has it: a terminal is the group's of every distribution.
            gid: if name == "tty" { 5 } else { 0 },
        };
        make(directory.as_fd(), name, &node)?;
    }
    for (at, node) in nodes.iter().enumerate() {
        make(directory.as_fd(), &at.to_string(), node)?;
    }
    Ok(())
}

fn make(directory: BorrowedFd<'_>, name: &str, node: &Node) -> io::Result<()> {
    let kind = match node.kind {
        Kind::Character => FileType::CharacterDevice,
        Kind::Block => FileType::BlockDevice,
        Kind::Fifo => FileType::Fifo,
    };
    let mode = Mode::from_raw_mode(node.mode);
    let device = rustix::fs::makedev(node.major, node.minor);
    rustix::fs::mknodat(directory, name, kind, mode, device)?;
    let (uid, gid) = (Uid::from_raw(node.uid), Gid::from_raw(node.gid));
    rustix::fs::chownat(directory, name, Some(uid), Some(gid), AtFlags::empty())?;
    // Once more: mknod(2) takes the umask off.
    Ok(rustix::fs::chmodat(
        directory,
        name,
        mode,
        AtFlags::empty(),
    )?)
}

/// Copies the nodes of the guest's /dev that `directory` lacks, but for the pod's disks.
pub fn copy_all(directory: BorrowedFd<'_>) -> io::Result<()> {
    let disks = disk_majors(&fs::read_to_string("/proc/devices")?);
    let device = fs::metadata("/dev")?.dev();
    copy(Path::new("/dev"), directory, device, &disks, 0)
}

fn copy(
    from: &Path,
    to: BorrowedFd<'_>,
    device: u64,
    disks: &[u32],
    depth: usize,
) -> io::Result<()> {
    /// Deeper than any driver goes.
    const DEEPEST: usize = 4;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let metadata = entry.path().symlink_metadata()?;
        let name = entry.file_name();
        // What is mounted below /dev is not of it.
        if metadata.dev() != device {
            continue;
        }
        if metadata.is_dir() && depth < DEEPEST {
            match rustix::fs::mkdirat(to, &name, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let inside = rustix::fs::openat(to, &name, flags, Mode::empty())?;
            copy(&entry.path(), inside.as_fd(), device, disks, depth + 1)?;
            continue;
        }
        let kind = metadata.file_type();
        let major = rustix::fs::major(metadata.rdev());
        let kind = match (kind.is_char_device(), kind.is_block_device()) {
            (true, _) => Kind::Character,
            (_, true) if !disks.contains(&major) => Kind::Block,
            _ => continue,
        };
        let node = Node {
            path: String::new(),
            kind,
            major,
            minor: rustix::fs::minor(metadata.rdev()),
            mode: metadata.mode() & 0o777,
            uid: metadata.uid(),
            gid: metadata.gid(),
        };
        match make(to, &name.to_string_lossy(), &node) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_the_guest_has_not_is_refused_by_name() {
        let node = |kind, major, minor| Node {
            path: "/dev/asked".into(),
            kind,
            major,
            minor,
            mode: 0o600,
            uid: 0,
            gid: 0,
        };
        let there = [node(Kind::Character, 1, 3), node(Kind::Fifo, 0, 0)];
        assert_eq!(check(&there), Ok(()));
        let absent = check(&[node(Kind::Character, 4001, 7)]).unwrap_err();
        let absent = absent.to_string();
        assert!(absent.contains("/dev/asked: the device c 4001:7 does not exist"));
    }
}

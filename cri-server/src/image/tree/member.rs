//! What a member of an archive becomes in the tree.

use std::ffi::{CStr, CString};
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, XattrFlags};
use rustix::io::Errno;

use super::path::{c_name, components};
use super::{Directory, Tree, TreeError};
use crate::image::archive::{Archive, Kind, Member};
use crate::image::node::{keeps_xattr, make_node, open_directory, owner, remove_all, timestamps};

impl Tree {
    /// Puts a member into its directory, in place of what is there.
    pub(super) fn create<R: Read>(
        &mut self,
        member: &Member,
        archive: &mut Archive<R>,
        parent: BorrowedFd<'_>,
        parent_inode: u64,
        name: &CStr,
    ) -> Result<(), TreeError> {
        let path = &member.path;
        let target = match &member.kind {
            Kind::HardLink(target) => Some(self.link_target(target, path)?),
            _ => None,
        };
        if member.uid == u32::MAX || member.gid == u32::MAX {
            return Err(TreeError::Refused(format!(
                "`{}` has an owner out of range",
                path.escape_ascii()
            )));
        }
        let existing = match fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Some(stat),
            Err(Errno::NOENT) => None,
            Err(errno) => return Err(self.io("look at", path, errno)),
        };
        if let Some(stat) = &existing {
            let stays = FileType::from_raw_mode(stat.st_mode) == FileType::Directory
                && member.kind == Kind::Directory;
            // A link to itself, under another spelling, must not remove what it is to link to.
            let same = target.as_ref().is_some_and(|(directory, target_name)| {
                fs::statat(directory, target_name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|target| {
                    (target.st_dev, target.st_ino) == (stat.st_dev, stat.st_ino)
                })
            });
            if same {
                return Ok(());
            }
            if !stays {
                remove_all(parent, name).map_err(|errno| self.io("replace", path, errno))?;
            }
        }
        match &member.kind {
            Kind::Directory => return self.create_directory(member, parent, parent_inode, name),
            Kind::File => return self.create_file(member, archive, parent, name),
            Kind::HardLink(_) => {
                let Some((directory, target_name)) = target else {
                    return Ok(());
                };
                return fs::linkat(directory, &target_name, parent, name, AtFlags::empty())
                    .map_err(|errno| match errno {
                        Errno::NOENT | Errno::PERM => TreeError::Refused(format!(
                            "the hard link `{}` does not lead to a file of the image",
                            path.escape_ascii()
                        )),
                        errno => self.io("link", path, errno),
                    });
            }
            Kind::Symlink(target) => {
                if target.is_empty() {
                    return Err(TreeError::Refused(format!(
                        "the symbolic link `{}` is empty",
                        path.escape_ascii()
                    )));
                }
                fs::symlinkat(target.as_slice(), parent, name)
            }
            Kind::CharacterDevice { major, minor } => {
                make_node(parent, name, FileType::CharacterDevice, *major, *minor)
            }
            Kind::BlockDevice { major, minor } => {
                make_node(parent, name, FileType::BlockDevice, *major, *minor)
            }
            Kind::Fifo => make_node(parent, name, FileType::Fifo, 0, 0),
        }
        .map_err(|errno| self.io("create", path, errno))?;
        self.adorn_at(member, parent, name)
    }

    /// The directory and the name a hard link's target has in the tree.
    fn link_target(&self, target: &[u8], path: &[u8]) -> Result<(OwnedFd, CString), TreeError> {
        let nowhere = || {
            TreeError::Refused(format!(
                "the hard link `{}` does not lead to a file of the image",
                path.escape_ascii()
            ))
        };
        let components = components(target)?;
        let (name, parents) = components.split_last().ok_or_else(nowhere)?;
        let directory = self.find(parents, target)?.ok_or_else(nowhere)?;
        let name = c_name(name, target)?;
        match fs::statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::Directory => {
                Ok((directory, name))
            }
            _ => Err(nowhere()),
        }
    }

    fn create_directory(
        &mut self,
        member: &Member,
        parent: BorrowedFd<'_>,
        parent_inode: u64,
        name: &CStr,
    ) -> Result<(), TreeError> {
        let depth = self.depth_below(parent_inode, &member.path)?;
        match fs::mkdirat(parent, name, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(self.io("create", &member.path, errno)),
        }
        let directory =
            open_directory(parent, name).map_err(|errno| self.io("open", &member.path, errno))?;
        self.adorn_directory(directory.as_fd(), member, depth)
    }

    /// Gives a directory what its member says of it, and notes it as `depth` deep.
    pub(super) fn adorn_directory(
        &mut self,
        directory: BorrowedFd<'_>,
        member: &Member,
        depth: u32,
    ) -> Result<(), TreeError> {
        self.adorn(member, directory)?;
        let inode = fs::fstat(directory)
            .map_err(|errno| self.io("look at", &member.path, errno))?
            .st_ino;
        self.directories.insert(
            inode,
            Directory {
                depth,
                mtime: member.mtime,
            },
        );
        Ok(())
    }

    fn create_file<R: Read>(
        &mut self,
        member: &Member,
        archive: &mut Archive<R>,
        parent: BorrowedFd<'_>,
        name: &CStr,
    ) -> Result<(), TreeError> {
        self.bytes = self.bytes.saturating_add(member.size);
        if self.bytes > self.limits.bytes {
            return Err(TreeError::TooLarge(format!(
                "it unpacks to more than {} bytes",
                self.limits.bytes
            )));
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let file = fs::openat(
            parent,
            name,
            flags | OFlags::CLOEXEC,
            Mode::RUSR | Mode::WUSR,
        )
        .map_err(|errno| self.io("create", &member.path, errno))?;
        let mut buffer = vec![0u8; 64 << 10];
        loop {
            let read = archive.read(&mut buffer)?;
            let Some(mut rest) = buffer.get(..read).filter(|part| !part.is_empty()) else {
                break;
            };
            while !rest.is_empty() {
                let written = rustix::io::write(&file, rest)
                    .map_err(|errno| self.io("write", &member.path, errno))?;
                rest = rest.get(written..).unwrap_or_default();
            }
        }
        self.adorn(member, file.as_fd())?;
        fs::futimens(&file, &timestamps(member.mtime))
            .map_err(|errno| self.io("set the times of", &member.path, errno))
    }

    /// Owner, mode and attributes of a file or directory. In this order: a change of owner
    /// clears setuid and capabilities, and an ACL refines the mode.
    fn adorn(&self, member: &Member, node: BorrowedFd<'_>) -> Result<(), TreeError> {
        let failed = |errno| self.io("set the owner and mode of", &member.path, errno);
        let (uid, gid) = owner(member);
        fs::fchown(node, uid, gid).map_err(failed)?;
        fs::fchmod(node, Mode::from_raw_mode(member.mode)).map_err(failed)?;
        for (name, value) in member.xattrs.iter().filter(|(name, _)| keeps_xattr(name)) {
            fs::fsetxattr(node, name.as_slice(), value, XattrFlags::empty())
                .map_err(|errno| self.io("set the attributes of", &member.path, errno))?;
        }
        Ok(())
    }

    /// Owner, mode and time of what cannot be opened: links, devices, pipes.
    fn adorn_at(
        &self,
        member: &Member,
        parent: BorrowedFd<'_>,
        name: &CStr,
    ) -> Result<(), TreeError> {
        let failed = |errno| self.io("set the owner and mode of", &member.path, errno);
        let (uid, gid) = owner(member);
        fs::chownat(parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
        if !matches!(member.kind, Kind::Symlink(_)) {
            // The name was created here a moment ago and nobody else writes to the tree.
            fs::chmodat(
                parent,
                name,
                Mode::from_raw_mode(member.mode),
                AtFlags::empty(),
            )
            .map_err(failed)?;
        }
        fs::utimensat(
            parent,
            name,
            &timestamps(member.mtime),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(failed)
    }
}

//! Lays layers on top of each other in a directory (OCI image-spec `layer.md`, "Applying
//! Changesets").
//!
//! A layer is hostile. Every path of it is resolved by the kernel with the tree as its root
//! (`openat2` with `RESOLVE_IN_ROOT`), so neither `..`, absolute names, symbolic links nor links
//! planted by an earlier layer lead out of the tree; the last component of a path is never
//! followed. Sizes, counts and depths are bounded by [`TreeLimits`].

use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, CString};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, ResolveFlags, XattrFlags};
use rustix::io::Errno;

use super::archive::{Archive, ArchiveError, Kind, Member};
use super::node::{
    entries, is_directory, keeps_xattr, make_node, open_directory, owner, remove_all, timestamps,
};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Names of AUFS's own bookkeeping start so; they are not part of the image.
const AUFS: &[u8] = b".wh..wh.";
const NAME_MAX: usize = 255;
const RESOLVE_ATTEMPTS: u32 = 1000;

/// How much an image may unpack to.
#[derive(Clone, Copy, Debug)]
pub(super) struct TreeLimits {
    /// Bytes of file contents, all layers together.
    pub bytes: u64,
    /// Members of archives, all layers together.
    pub members: u64,
    /// Directories below each other.
    pub depth: u32,
}

/// Why a layer was not applied.
#[derive(Debug, thiserror::Error)]
pub(super) enum TreeError {
    #[error("{0}")]
    Archive(#[from] ArchiveError),
    #[error("{0}")]
    Refused(String),
    #[error("{0}")]
    TooLarge(String),
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

struct Directory {
    depth: u32,
    mtime: i64,
}

/// A directory tree made of layers.
pub(super) struct Tree {
    path: PathBuf,
    root: OwnedFd,
    limits: TreeLimits,
    bytes: u64,
    members: u64,
    /// All directories, by inode.
    directories: HashMap<u64, Directory>,
    /// What the layer being applied has put into place, by directory and name: whiteouts are
    /// about lower layers only, wherever in the archive they stand.
    fresh: HashSet<(u64, Vec<u8>)>,
}

impl Tree {
    /// An empty tree in the empty directory `path`.
    pub fn new(path: &Path, limits: TreeLimits) -> Result<Tree, TreeError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = fs::open(path, flags, Mode::empty()).map_err(|errno| TreeError::Io {
            action: "open",
            path: path.to_path_buf(),
            source: errno.into(),
        })?;
        let mut tree = Tree {
            path: path.to_path_buf(),
            root,
            limits,
            bytes: 0,
            members: 0,
            directories: HashMap::new(),
            fresh: HashSet::new(),
        };
        fs::fchmod(&tree.root, Mode::from_raw_mode(0o755))
            .map_err(|errno| tree.io("set the mode of", b"", errno))?;
        let inode = fs::fstat(&tree.root)
            .map_err(|errno| tree.io("look at", b"", errno))?
            .st_ino;
        tree.directories
            .insert(inode, Directory { depth: 0, mtime: 0 });
        Ok(tree)
    }

    /// Applies one layer, given as a tar stream, and returns the reader at its end. `stop` is
    /// asked before each member.
    pub fn apply<R: Read>(&mut self, layer: R, stop: &dyn Fn() -> bool) -> Result<R, TreeError> {
        self.fresh.clear();
        let mut archive = Archive::new(layer);
        while let Some(member) = archive.next_member()? {
            if stop() {
                return Err(TreeError::Refused("the pull was given up".to_string()));
            }
            self.members += 1;
            if self.members > self.limits.members {
                return Err(TreeError::TooLarge(format!(
                    "it has more than {} files",
                    self.limits.members
                )));
            }
            self.place(&member, &mut archive)?;
        }
        Ok(archive.finish()?)
    }

    /// Ends the tree: directories get the times their layers gave them.
    pub fn finish(self) -> Result<(), TreeError> {
        let root = self.root.try_clone().map_err(|source| TreeError::Io {
            action: "open",
            path: self.path.clone(),
            source,
        })?;
        self.set_times(root)
    }

    fn set_times(&self, directory: OwnedFd) -> Result<(), TreeError> {
        let failed = |errno| self.io("set the times in", b"", errno);
        for name in entries(directory.as_fd()).map_err(failed)? {
            if is_directory(directory.as_fd(), &name).map_err(failed)? {
                self.set_times(open_directory(directory.as_fd(), &name).map_err(failed)?)?;
            }
        }
        let inode = fs::fstat(&directory).map_err(failed)?.st_ino;
        let mtime = self
            .directories
            .get(&inode)
            .map_or(0, |directory| directory.mtime);
        fs::futimens(&directory, &timestamps(mtime)).map_err(failed)
    }

    fn place<R: Read>(
        &mut self,
        member: &Member,
        archive: &mut Archive<R>,
    ) -> Result<(), TreeError> {
        let components = components(&member.path)?;
        let Some((name, parents)) = components.split_last() else {
            return self.place_root(member);
        };
        let name: &[u8] = name;
        if name == OPAQUE {
            return match self.find(parents, &member.path)? {
                Some(directory) => self.clear_lower(directory.as_fd(), &member.path),
                None => Ok(()),
            };
        }
        if name.starts_with(AUFS) {
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            let hidden = c_name(hidden, &member.path)?;
            return match self.find(parents, &member.path)? {
                Some(directory) => self.remove_lower(directory.as_fd(), &hidden, &member.path),
                None => Ok(()),
            };
        }
        let parent = self.parent(parents, &member.path)?;
        let parent_inode = fs::fstat(&parent)
            .map_err(|errno| self.io("look at the directory of", &member.path, errno))?
            .st_ino;
        let c_name = c_name(name, &member.path)?;
        self.create(member, archive, parent.as_fd(), parent_inode, &c_name)?;
        self.fresh.insert((parent_inode, name.to_vec()));
        Ok(())
    }

    /// The archive's entry for `/` itself says how the root directory looks.
    fn place_root(&mut self, member: &Member) -> Result<(), TreeError> {
        if member.kind != Kind::Directory || member.uid == u32::MAX || member.gid == u32::MAX {
            return Err(TreeError::Refused(
                "its root is not a proper directory".to_string(),
            ));
        }
        let root = self.root.try_clone().map_err(|source| TreeError::Io {
            action: "open",
            path: self.path.clone(),
            source,
        })?;
        self.adorn_directory(root.as_fd(), member, 0)
    }

    fn create<R: Read>(
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

    fn adorn_directory(
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

    /// The directory at `components`, or `None` if there is none.
    fn find(&self, components: &[&[u8]], path: &[u8]) -> Result<Option<OwnedFd>, TreeError> {
        match self.resolve(components) {
            Ok(directory) => Ok(Some(directory)),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(Errno::LOOP) => Err(TreeError::Refused(format!(
                "the path `{}` leads through a loop of symbolic links",
                path.escape_ascii()
            ))),
            Err(errno) => Err(self.io("open the directory of", path, errno)),
        }
    }

    /// The directory at `components`; missing ones are made, as archives may leave them away.
    fn parent(&mut self, components: &[&[u8]], path: &[u8]) -> Result<OwnedFd, TreeError> {
        if let Some(directory) = self.find(components, path)? {
            return Ok(directory);
        }
        let blocked = || {
            TreeError::Refused(format!(
                "the path `{}` leads through something that is not a directory",
                path.escape_ascii()
            ))
        };
        let mut parent = self
            .resolve(&[])
            .map_err(|errno| self.io("open", b"", errno))?;
        for length in 1..=components.len() {
            let prefix = components.get(..length).unwrap_or_default();
            let Some(name) = prefix.last() else { break };
            if let Some(directory) = self.find(prefix, path)? {
                parent = directory;
                continue;
            }
            let inode = fs::fstat(&parent)
                .map_err(|errno| self.io("look at", path, errno))?
                .st_ino;
            let depth = self.depth_below(inode, path)?;
            let name = c_name(name, path)?;
            match fs::mkdirat(&parent, &name, Mode::from_raw_mode(0o755)) {
                Ok(()) => {}
                Err(Errno::EXIST) => return Err(blocked()),
                Err(errno) => return Err(self.io("create a directory of", path, errno)),
            }
            parent = open_directory(parent.as_fd(), &name)
                .map_err(|errno| self.io("open", path, errno))?;
            // The process's umask must not shape the image.
            fs::fchmod(&parent, Mode::from_raw_mode(0o755))
                .map_err(|errno| self.io("set the mode of", path, errno))?;
            let made = fs::fstat(&parent)
                .map_err(|errno| self.io("look at", path, errno))?
                .st_ino;
            self.directories.insert(made, Directory { depth, mtime: 0 });
        }
        Ok(parent)
    }

    fn resolve(&self, components: &[&[u8]]) -> Result<OwnedFd, Errno> {
        let path = if components.is_empty() {
            b".".to_vec()
        } else {
            components.join(&b'/')
        };
        let mut attempts = 0;
        loop {
            let opened = fs::openat2(
                &self.root,
                path.as_slice(),
                OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
                ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV,
            );
            attempts += 1;
            match opened {
                // A link with `..` in it was resolved while something, anywhere on the machine,
                // was renamed or mounted: the kernel asks for another try.
                Err(Errno::AGAIN) if attempts < RESOLVE_ATTEMPTS => {}
                result => return result,
            }
        }
    }

    fn depth_below(&self, parent_inode: u64, path: &[u8]) -> Result<u32, TreeError> {
        let depth = self
            .directories
            .get(&parent_inode)
            .map_or(0, |directory| directory.depth)
            + 1;
        if depth > self.limits.depth {
            return Err(TreeError::TooLarge(format!(
                "`{}` is more than {} directories deep",
                path.escape_ascii(),
                self.limits.depth
            )));
        }
        Ok(depth)
    }

    /// Removes `name` as lower layers left it; what this layer put there stays.
    fn remove_lower(
        &self,
        directory: BorrowedFd<'_>,
        name: &CStr,
        path: &[u8],
    ) -> Result<(), TreeError> {
        let failed = |errno| self.io("apply the whiteout", path, errno);
        let inode = fs::fstat(directory).map_err(failed)?.st_ino;
        let fresh = self.fresh.contains(&(inode, name.to_bytes().to_vec()));
        let subtree = match is_directory(directory, name) {
            Ok(subtree) => subtree,
            Err(Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(failed(errno)),
        };
        if subtree {
            self.clear_lower(
                open_directory(directory, name).map_err(failed)?.as_fd(),
                path,
            )?;
        }
        if fresh {
            return Ok(());
        }
        let flags = if subtree {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        match fs::unlinkat(directory, name, flags) {
            Ok(()) | Err(Errno::NOTEMPTY) => Ok(()),
            Err(errno) => Err(failed(errno)),
        }
    }

    fn clear_lower(&self, directory: BorrowedFd<'_>, path: &[u8]) -> Result<(), TreeError> {
        let names =
            entries(directory).map_err(|errno| self.io("apply the whiteout", path, errno))?;
        names
            .iter()
            .try_for_each(|name| self.remove_lower(directory, name, path))
    }

    fn io(&self, action: &'static str, path: &[u8], errno: Errno) -> TreeError {
        use std::os::unix::ffi::OsStrExt;
        let relative = path.trim_ascii_start();
        let relative = relative.strip_prefix(b"/").unwrap_or(relative);
        TreeError::Io {
            action,
            path: self.path.join(std::ffi::OsStr::from_bytes(relative)),
            source: errno.into(),
        }
    }
}

/// The components of a member's path: `/` in front, `.` and doubled slashes mean nothing.
fn components(path: &[u8]) -> Result<Vec<&[u8]>, TreeError> {
    let components: Vec<&[u8]> = path
        .split(|byte| *byte == b'/')
        .filter(|component| !component.is_empty() && *component != b".")
        .collect();
    if components.iter().any(|component| *component == b"..") {
        return Err(TreeError::Refused(format!(
            "the path `{}` leads upwards",
            path.escape_ascii()
        )));
    }
    Ok(components)
}

fn c_name(name: &[u8], path: &[u8]) -> Result<CString, TreeError> {
    if name.is_empty() || name == b"." || name == b".." || name.len() > NAME_MAX {
        return Err(TreeError::Refused(format!(
            "`{}` ends in a name no file can have",
            path.escape_ascii()
        )));
    }
    CString::new(name).map_err(|_| TreeError::Refused("a name contains a NUL byte".to_string()))
}

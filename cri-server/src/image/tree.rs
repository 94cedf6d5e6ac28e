//! Lays layers on top of each other in a directory (OCI image-spec `layer.md`, "Applying
//! Changesets").
//!
//! A layer is hostile. Every path of it is resolved by the kernel with the tree as its root
//! (`openat2` with `RESOLVE_IN_ROOT`), so neither `..`, absolute names, symbolic links nor links
//! planted by an earlier layer lead out of the tree; the last component of a path is never
//! followed. Sizes, counts and depths are bounded by [`TreeLimits`].

mod member;
mod path;

use std::collections::{HashMap, HashSet};
use std::ffi::CStr;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{self, AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::archive::{Archive, ArchiveError, Kind, Member};
use super::node::{entries, is_directory, open_directory, timestamps};
use path::{c_name, components};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Names of AUFS's own bookkeeping start so; they are not part of the image.
const AUFS: &[u8] = b".wh..wh.";

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

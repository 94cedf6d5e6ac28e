//! Paths of members, resolved inside the tree.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{self, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::{Directory, Tree, TreeError};
use crate::image::node::open_directory;

/// The longest name of a file in Linux, in bytes.
const NAME_MAX: usize = 255;
/// How often the kernel may ask for another try.
const RESOLVE_ATTEMPTS: u32 = 1000;

impl Tree {
    /// The directory at `components`, or `None` if there is none.
    pub(super) fn find(
        &self,
        components: &[&[u8]],
        path: &[u8],
    ) -> Result<Option<OwnedFd>, TreeError> {
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
    pub(super) fn parent(
        &mut self,
        components: &[&[u8]],
        path: &[u8],
    ) -> Result<OwnedFd, TreeError> {
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

    /// How deep a directory in that of the inode is; refused beyond the limit.
    pub(super) fn depth_below(&self, parent_inode: u64, path: &[u8]) -> Result<u32, TreeError> {
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
}

/// The components of a member's path: `/` in front, `.` and doubled slashes mean nothing.
pub(super) fn components(path: &[u8]) -> Result<Vec<&[u8]>, TreeError> {
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

/// A name as the kernel takes it.
pub(super) fn c_name(name: &[u8], path: &[u8]) -> Result<CString, TreeError> {
    if name.is_empty() || name == b"." || name == b".." || name.len() > NAME_MAX {
        return Err(TreeError::Refused(format!(
            "`{}` ends in a name no file can have",
            path.escape_ascii()
        )));
    }
    CString::new(name).map_err(|_| TreeError::Refused("a name contains a NUL byte".to_string()))
}

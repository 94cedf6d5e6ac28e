//! Paths of members, resolved inside the tree.

use bulkhead_erofs::{Content, NodeId};

use super::{Home, ROOT, Tree, TreeError, directory};

/// The longest name of a file in Linux, in bytes.
const NAME_MAX: usize = 255;
/// How many links Linux follows in one path (kernel: include/linux/namei.h, `MAXSYMLINKS`).
const LINKS_MAX: u32 = 40;

/// Why a path leads nowhere.
enum Lost {
    Missing,
    Loop,
}

impl Tree {
    /// The directory at `components`, or `None` if there is none.
    pub(super) fn find(
        &self,
        components: &[&[u8]],
        path: &[u8],
    ) -> Result<Option<NodeId>, TreeError> {
        match self.resolve(components) {
            Ok(directory) => Ok(Some(directory)),
            Err(Lost::Missing) => Ok(None),
            Err(Lost::Loop) => Err(TreeError::Refused(format!(
                "the path `{}` leads through a loop of symbolic links",
                path.escape_ascii()
            ))),
        }
    }

    /// The directory at `components`; missing ones are made, as archives may leave them away.
    pub(super) fn parent(
        &mut self,
        components: &[&[u8]],
        path: &[u8],
    ) -> Result<NodeId, TreeError> {
        let mut parent = ROOT;
        if let Some(directory) = self.find(components, path)? {
            return Ok(directory);
        }
        for length in 1..=components.len() {
            let prefix = components.get(..length).unwrap_or_default();
            let Some(name) = prefix.last() else { break };
            if let Some(directory) = self.find(prefix, path)? {
                parent = directory;
                continue;
            }
            check_name(name, path)?;
            if self.child(parent, name).is_some() {
                return Err(TreeError::Refused(format!(
                    "the path `{}` leads through something that is not a directory",
                    path.escape_ascii()
                )));
            }
            parent = self.make_directory(parent, name, path)?;
        }
        Ok(parent)
    }

    /// Makes an empty directory, in place of what has the name in `parent`.
    pub(super) fn make_directory(
        &mut self,
        parent: NodeId,
        name: &[u8],
        path: &[u8],
    ) -> Result<NodeId, TreeError> {
        let depth = self.homes.get(&parent).map_or(0, |home| home.depth) + 1;
        if depth > self.limits.depth {
            return Err(TreeError::TooLarge(format!(
                "`{}` is more than {} directories deep",
                path.escape_ascii(),
                self.limits.depth
            )));
        }
        let made = self.add(parent, name, directory());
        self.homes.insert(made, Home { parent, depth });
        Ok(made)
    }

    /// Walks as the kernel would for a process whose root is the tree's.
    fn resolve(&self, components: &[&[u8]]) -> Result<NodeId, Lost> {
        let mut at = ROOT;
        let mut left: Vec<&[u8]> = components.iter().rev().copied().collect();
        let mut links = 0;
        while let Some(name) = left.pop() {
            match name {
                b"" | b"." => continue,
                b".." => {
                    at = self.homes.get(&at).map_or(ROOT, |home| home.parent);
                    continue;
                }
                _ => {}
            }
            let child = self.child(at, name).ok_or(Lost::Missing)?;
            match self.content(child) {
                Some(Content::Directory(_)) => at = child,
                Some(Content::Symlink(target)) => {
                    links += 1;
                    if links > LINKS_MAX {
                        return Err(Lost::Loop);
                    }
                    if target.starts_with(b"/") {
                        at = ROOT;
                    }
                    left.extend(target.split(|byte| *byte == b'/').rev());
                }
                _ => return Err(Lost::Missing),
            }
        }
        Ok(at)
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

/// Refuses a name that no file can have.
pub(super) fn check_name(name: &[u8], path: &[u8]) -> Result<(), TreeError> {
    if name.is_empty() || name == b"." || name == b".." || name.len() > NAME_MAX {
        return Err(TreeError::Refused(format!(
            "`{}` ends in a name no file can have",
            path.escape_ascii()
        )));
    }
    if name.contains(&0) {
        return Err(TreeError::Refused("a name contains a NUL byte".to_string()));
    }
    Ok(())
}

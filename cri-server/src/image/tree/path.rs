//! Paths of members, resolved inside the tree.

use bulkhead_erofs::{Content, NodeId};

use super::{Home, ROOT, Tree, TreeError, directory};

/// The longest name of a file in Linux, in bytes.
const NAME_MAX: usize = 255;
/// How many links Linux follows in one path (kernel: include/linux/namei.h, `MAXSYMLINKS`).
const LINKS_MAX: u32 = 40;

/// The most steps of one path, with those of the links in it.
const STEPS_MAX: u32 = 8192;

impl Tree {
    /// The directory at `components`, or `None` if there is none.
    pub(super) fn find(
        &mut self,
        components: &[&[u8]],
        path: &[u8],
    ) -> Result<Option<NodeId>, TreeError> {
        self.walk(components, path, false)
    }

    /// The directory at `components`; missing ones are made, as archives may leave them away, also
    /// where a link leads to.
    pub(super) fn parent(
        &mut self,
        components: &[&[u8]],
        path: &[u8],
    ) -> Result<NodeId, TreeError> {
        self.walk(components, path, true)?.ok_or_else(|| {
            TreeError::Refused(format!(
                "the path `{}` leads through something that is not a directory",
                path.escape_ascii()
            ))
        })
    }

    /// Walks as the kernel would for a process whose root is the tree's. `None` where there is no
    /// directory, or with `make` something else.
    fn walk(
        &mut self,
        components: &[&[u8]],
        path: &[u8],
        make: bool,
    ) -> Result<Option<NodeId>, TreeError> {
        let mut at = ROOT;
        let mut left: Vec<Vec<u8>> = components.iter().rev().map(|name| name.to_vec()).collect();
        let (mut links, mut steps) = (0, 0);
        while let Some(name) = left.pop() {
            steps += 1;
            match name.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    at = self.homes.get(&at).map_or(ROOT, |home| home.parent);
                    continue;
                }
                _ => {}
            }
            let Some(child) = self.child(at, &name) else {
                if !make {
                    return Ok(None);
                }
                check_name(&name, path)?;
                self.count()?;
                at = self.make_directory(at, &name, path)?;
                continue;
            };
            match self.content(child) {
                Some(Content::Directory(_)) => at = child,
                Some(Content::Symlink(target)) => {
                    links += 1;
                    if links > LINKS_MAX || steps > STEPS_MAX {
                        return Err(TreeError::Refused(format!(
                            "the path `{}` leads through a loop of symbolic links",
                            path.escape_ascii()
                        )));
                    }
                    if target.starts_with(b"/") {
                        at = ROOT;
                    }
                    let parts = target.split(|byte| *byte == b'/').rev();
                    left.extend(parts.map(<[u8]>::to_vec));
                }
                _ => return Ok(None),
            }
        }
        Ok(Some(at))
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
        let made = self.add(parent, name, directory())?;
        self.homes.insert(made, Home { parent, depth });
        Ok(made)
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

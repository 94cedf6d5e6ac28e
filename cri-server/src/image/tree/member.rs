//! What a member of an archive becomes in the tree.

use std::collections::BTreeMap;
use std::io::Read;

use bulkhead_erofs::{Content, Device, Node, NodeId, check_xattrs};

use super::path::{check_name, components};
use super::{NAME_BYTES, Tree, TreeError, acl};
use crate::image::archive::{Archive, Kind, Member};
use crate::image::bodies::Bodies;

const CAPABILITY: &[u8] = b"security.capability";
const ACCESS: &[u8] = b"system.posix_acl_access";
const DEFAULT: &[u8] = b"system.posix_acl_default";
/// The longest target of a symbolic link in Linux, in bytes.
const TARGET_MAX: usize = 4095;
impl Tree {
    /// Puts a member into its directory, in place of what is there.
    pub(super) fn create<R: Read>(
        &mut self,
        member: &Member,
        archive: &mut Archive<R>,
        bodies: &mut Bodies,
        parent: NodeId,
        name: &[u8],
    ) -> Result<(), TreeError> {
        let path = &member.path;
        let refused = |why: &str| TreeError::Refused(format!("`{}` {why}", path.escape_ascii()));
        if member.uid == u32::MAX || member.gid == u32::MAX {
            return Err(refused("has an owner out of range"));
        }
        let device = |major: u32, minor: u32| {
            let fits = major < 1 << 12 && minor < 1 << 20;
            fits.then_some(Device { major, minor })
                .ok_or_else(|| refused("is a device whose number is out of range"))
        };
        let content = match &member.kind {
            Kind::Directory => {
                let node = match self.child(parent, name) {
                    Some(there) if self.entries(there).is_some() => there,
                    _ => self.make_directory(parent, name, path)?,
                };
                return self.adorn(node, member);
            }
            Kind::HardLink(target) => {
                let target = self.link_target(target, path)?;
                return self.link(parent, name, target);
            }
            Kind::File => self.body(member, archive, bodies)?,
            Kind::Symlink(target) if target.is_empty() || target.len() > TARGET_MAX => {
                return Err(refused(
                    "is a symbolic link whose target is empty or too long",
                ));
            }
            Kind::Symlink(target) => Content::Symlink(target.clone()),
            Kind::CharacterDevice { major, minor } => {
                Content::CharacterDevice(device(*major, *minor)?)
            }
            Kind::BlockDevice { major, minor } => Content::BlockDevice(device(*major, *minor)?),
            Kind::Fifo => Content::Fifo,
        };
        let node = Node {
            content,
            ..super::directory()
        };
        let node = self.add(parent, name, node)?;
        self.adorn(node, member)
    }

    /// What a hard link leads to.
    fn link_target(&mut self, target: &[u8], path: &[u8]) -> Result<NodeId, TreeError> {
        let nowhere = || {
            TreeError::Refused(format!(
                "the hard link `{}` does not lead to a file of the image",
                path.escape_ascii()
            ))
        };
        let components = components(target)?;
        let (name, parents) = components.split_last().ok_or_else(nowhere)?;
        check_name(name, target)?;
        let directory = self.find(parents, target)?.ok_or_else(nowhere)?;
        self.child(directory, name)
            .filter(|found| self.entries(*found).is_none())
            .ok_or_else(nowhere)
    }

    fn body<R: Read>(
        &mut self,
        member: &Member,
        archive: &mut Archive<R>,
        bodies: &mut Bodies,
    ) -> Result<Content, TreeError> {
        self.bytes = self.bytes.saturating_add(member.size);
        if self.bytes > self.limits.bytes {
            return Err(TreeError::TooLarge(format!(
                "it unpacks to more than {} bytes",
                self.limits.bytes
            )));
        }
        bodies.take(member.size, archive)
    }

    /// Gives a node what its member says of it.
    pub(super) fn adorn(&mut self, id: NodeId, member: &Member) -> Result<(), TreeError> {
        let refused =
            |why: String| TreeError::Refused(format!("`{}` {why}", member.path.escape_ascii()));
        let Some(content) = self.content(id) else {
            return Ok(());
        };
        let is_directory = matches!(content, Content::Directory(_));
        let is_link = matches!(content, Content::Symlink(_));
        let is_file = matches!(content, Content::Small { .. } | Content::Large { .. });
        // Links have no mode of their own.
        let mut mode = if is_link {
            0o777
        } else {
            (member.mode & 0o7777) as u16
        };
        let mut xattrs = BTreeMap::new();
        for (name, value) in &member.xattrs {
            if !(is_directory || is_file) || !keeps_xattr(name) {
                continue;
            }
            if name == CAPABILITY && !is_capability(value) {
                return Err(refused("has file capabilities that are none".to_string()));
            }
            if name == ACCESS || name == DEFAULT {
                let acl = acl::read(value)
                    .filter(|_| name == ACCESS || is_directory)
                    .ok_or_else(|| refused("has an ACL that is none".to_string()))?;
                let Some(acl) = acl else { continue };
                // As setting it on a file system would.
                if name == ACCESS {
                    mode = mode & !0o777 | acl.mode;
                    if acl.is_mode {
                        continue;
                    }
                }
            }
            xattrs.insert(name.clone(), value.clone());
        }
        check_xattrs(&xattrs).map_err(|error| refused(format!("cannot be stored: {error}")))?;
        // Once here, and once in the writer's tables.
        let bytes =
            |(name, value): (&Vec<u8>, &Vec<u8>)| 2 * (name.len() + value.len() + NAME_BYTES);
        self.charge(xattrs.iter().map(bytes).sum())?;
        if let Some(node) = self.files.nodes.get_mut(id) {
            (node.mode, node.xattrs) = (mode, xattrs);
            (node.uid, node.gid) = (member.uid, member.gid);
            (node.mtime, node.mtime_nanoseconds) = member.mtime;
        }
        Ok(())
    }
}

/// Whether these are capabilities of a file (kernel: include/uapi/linux/capability.h,
/// `vfs_cap_data`): the revision, which has its length.
fn is_capability(value: &[u8]) -> bool {
    let revision = value.get(3).copied();
    matches!(
        (revision, value.len()),
        (Some(1), 12) | (Some(2), 20) | (Some(3), 24)
    )
}

/// File capabilities, ACLs and users' own attributes are part of an image. Labels are the
/// host's, and overlay's attributes would steer the overlay the image is put under.
fn keeps_xattr(name: &[u8]) -> bool {
    name == CAPABILITY
        || name == ACCESS
        || name == DEFAULT
        || (name.starts_with(b"user.") && !name.starts_with(b"user.overlay."))
}

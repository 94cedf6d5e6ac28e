//! What a member of an archive becomes in the tree.

use std::collections::BTreeMap;
use std::io::Read;

use bulkhead_erofs::{Content, Device, Node, NodeId};

use super::path::{check_name, components};
use super::{Tree, TreeError};
use crate::image::archive::{Archive, Kind, Member};
use crate::image::bodies::Bodies;

const ACCESS: &[u8] = b"system.posix_acl_access";
const DEFAULT: &[u8] = b"system.posix_acl_default";
/// The longest target of a symbolic link in Linux, in bytes.
const TARGET_MAX: usize = 4095;
/// The version of ACLs, which stands in front of entries of 8 bytes (kernel:
/// include/uapi/linux/posix_acl_xattr.h).
const ACL_VERSION: [u8; 4] = 2_u32.to_le_bytes();

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
                self.link(parent, name, target);
                return Ok(());
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
        let node = self.add(
            parent,
            name,
            Node {
                content,
                ..super::directory()
            },
        );
        self.adorn(node, member)
    }

    /// What a hard link leads to.
    fn link_target(&self, target: &[u8], path: &[u8]) -> Result<NodeId, TreeError> {
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
    pub(super) fn adorn(&mut self, node: NodeId, member: &Member) -> Result<(), TreeError> {
        let Some(node) = self.files.nodes.get_mut(node) else {
            return Ok(());
        };
        let is_directory = matches!(node.content, Content::Directory(_));
        let has_xattrs =
            is_directory || matches!(node.content, Content::Small { .. } | Content::Large { .. });
        node.xattrs = BTreeMap::new();
        for (name, value) in member.xattrs.iter().filter(|_| has_xattrs) {
            if !keeps_xattr(name) {
                continue;
            }
            let is_acl = name == ACCESS || name == DEFAULT;
            let entries = value.strip_prefix(&ACL_VERSION);
            let whole = entries.is_some_and(|entries| entries.len() % 8 == 0);
            if is_acl && !whole || name == DEFAULT && !is_directory {
                return Err(TreeError::Refused(format!(
                    "`{}` has an ACL that is none",
                    member.path.escape_ascii()
                )));
            }
            node.xattrs.insert(name.clone(), value.clone());
        }
        // Links have no mode of their own.
        node.mode = match node.content {
            Content::Symlink(_) => 0o777,
            _ => (member.mode & 0o7777) as u16,
        };
        (node.uid, node.gid) = (member.uid, member.gid);
        node.mtime = member.mtime;
        Ok(())
    }
}

/// File capabilities, ACLs and users' own attributes are part of an image. Labels are the
/// host's, and overlay's attributes would steer the overlay the image is put under.
fn keeps_xattr(name: &[u8]) -> bool {
    name == b"security.capability"
        || name == ACCESS
        || name == DEFAULT
        || (name.starts_with(b"user.") && !name.starts_with(b"user.overlay."))
}

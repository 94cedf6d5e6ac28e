//! Where everything lies.

use std::collections::VecDeque;

use crate::node::{Content, Node, NodeId, Tree};
use crate::write::Image;
use crate::{BLOCK, INODE, LayoutError, SMALL, directory, xattr};

/// Inodes lie at multiples of this, by which they are numbered.
pub(crate) const SLOT: usize = 32;
/// The longest target of a symbolic link in Linux, in bytes.
const TARGET_MAX: usize = 4095;

/// The metadata of a tree, laid out.
pub struct Layout<'a> {
    pub(crate) tree: &'a Tree,
    /// In the order of their places; the root first, since its number must be small.
    pub(crate) inodes: Vec<Inode>,
    /// Where each node's inode is in that order.
    pub(crate) index: Vec<Option<usize>>,
    /// Blocks of inodes, which come first.
    pub(crate) inode_blocks: u32,
    /// Blocks of what did not find room behind its inode, which come after.
    pub(crate) body_blocks: u32,
    /// Blocks that large files need outside.
    pub(crate) outside: u64,
}

/// An inode and what lies behind it.
pub(crate) struct Inode {
    pub node: NodeId,
    pub parent: NodeId,
    /// Bytes from where the metadata begin.
    pub at: u64,
    pub links: u32,
    /// Bytes of the node's body, wherever they are.
    pub size: u64,
    pub xattrs: Vec<u8>,
    /// The body's blocks among [`Layout::body_blocks`]: the first, and how many.
    pub blocks: (u32, u32),
    /// Bytes of the body behind the inode.
    pub tail: usize,
}

impl<'a> Layout<'a> {
    /// Lays out the metadata of what the root leads to.
    pub fn new(tree: &'a Tree) -> Result<Self, LayoutError> {
        let mut layout = Self {
            tree,
            inodes: Vec::new(),
            index: vec![None; tree.nodes.len()],
            inode_blocks: 0,
            body_blocks: 0,
            outside: 0,
        };
        let mut directories = VecDeque::new();
        // No inode has number 0, which is what a place that nobody has filled would lead to.
        let mut end = SLOT as u64;
        layout.add(0, 0, &mut end)?;
        match tree.nodes.first().map(|root| &root.content) {
            Some(Content::Directory(_)) => directories.push_back(0),
            _ => return Err(LayoutError::Root),
        }
        while let Some(parent) = directories.pop_front() {
            let Some(Content::Directory(entries)) = tree.nodes.get(parent).map(|n| &n.content)
            else {
                continue;
            };
            for (name, &child) in entries {
                directory::check_name(name)?;
                let is_directory = matches!(layout.node(child)?.content, Content::Directory(_));
                match layout.index.get(child).copied().flatten() {
                    Some(_) if is_directory => return Err(LayoutError::Linked(child)),
                    Some(place) => layout.inodes.get_mut(place).into_iter().for_each(|inode| {
                        inode.links = inode.links.saturating_add(1);
                    }),
                    None => layout.add(child, parent, &mut end)?,
                }
                if is_directory {
                    directories.push_back(child);
                    let place = layout.index.get(parent).copied().flatten();
                    let parent = place.and_then(|place| layout.inodes.get_mut(place));
                    parent.into_iter().for_each(|inode| inode.links += 1);
                }
            }
        }
        layout.inode_blocks = blocks(end)?;
        Ok(layout)
    }

    /// How many blocks the metadata take, the superblock aside.
    pub fn blocks(&self) -> u64 {
        u64::from(self.inode_blocks) + u64::from(self.body_blocks)
    }

    /// Puts the metadata at block `metadata`, after the superblock, and the bodies of large files
    /// from block `bodies` on. `uuid` has to differ between file systems that are used together.
    pub fn place(
        self,
        metadata: u32,
        bodies: u32,
        uuid: [u8; 16],
    ) -> Result<Image<'a>, LayoutError> {
        let end = u64::from(metadata) + self.blocks();
        let end = end.max(u64::from(bodies) + self.outside);
        // The last number stands for no block.
        let blocks = u32::try_from(end).ok().filter(|&end| end < u32::MAX);
        Ok(Image {
            layout: self,
            metadata,
            bodies,
            blocks: blocks.ok_or(LayoutError::TooLarge)?,
            uuid,
        })
    }

    pub(crate) fn node(&self, id: NodeId) -> Result<&'a Node, LayoutError> {
        self.tree.nodes.get(id).ok_or(LayoutError::Missing(id))
    }

    /// Gives a node the next place that suits it from `end` on.
    fn add(&mut self, id: NodeId, parent: NodeId, end: &mut u64) -> Result<(), LayoutError> {
        let node = self.tree.nodes.get(id).ok_or(match id {
            0 => LayoutError::Root,
            id => LayoutError::Missing(id),
        })?;
        let xattrs = xattr::encoded(&node.xattrs)?;
        let room = BLOCK.saturating_sub(INODE + xattrs.len());
        let mut links = 1;
        let (size, inside) = match &node.content {
            Content::Directory(entries) => {
                links = 2;
                (directory::size(names(entries.keys()).into_iter()), true)
            }
            Content::Small { size, .. } if *size as usize > SMALL => {
                return Err(LayoutError::Small(*size));
            }
            Content::Small { size, .. } => (u64::from(*size), true),
            Content::Symlink(target) if !(1..=TARGET_MAX).contains(&target.len()) => {
                return Err(LayoutError::Target(target.len()));
            }
            Content::Symlink(target) => (target.len() as u64, true),
            Content::Large { block, size } => {
                let end = u64::from(*block) + u64::from(blocks(*size)?);
                self.outside = self.outside.max(end);
                (*size, false)
            }
            Content::CharacterDevice(_)
            | Content::BlockDevice(_)
            | Content::Fifo
            | Content::Socket => (0, false),
        };
        // What does not fill a block lies behind the inode, all of it in the inode's block.
        let rest = (size % BLOCK as u64) as usize;
        let tail = if inside && rest <= room { rest } else { 0 };
        let count = if inside {
            blocks(size - tail as u64)?
        } else {
            0
        };
        let first = self.body_blocks;
        self.body_blocks = first.checked_add(count).ok_or(LayoutError::TooLarge)?;

        let whole = INODE + xattrs.len() + tail;
        let together = if whole <= BLOCK { whole } else { INODE };
        let used = (*end % BLOCK as u64) as usize;
        if used + together > BLOCK {
            *end = end.next_multiple_of(BLOCK as u64);
        }
        let place = self.index.get_mut(id).ok_or(LayoutError::Missing(id))?;
        *place = Some(self.inodes.len());
        self.inodes.push(Inode {
            node: id,
            parent,
            at: *end,
            links,
            size,
            xattrs,
            blocks: (first, count),
            tail,
        });
        *end = (*end + whole as u64).next_multiple_of(SLOT as u64);
        Ok(())
    }
}

/// The names of a directory with its own and its parent's, in order.
pub(crate) fn names<'a>(others: impl Iterator<Item = &'a Vec<u8>>) -> Vec<&'a [u8]> {
    let mut names: Vec<&[u8]> = others.map(Vec::as_slice).collect();
    names.extend([&b"."[..], b".."]);
    names.sort_unstable();
    names
}

fn blocks(bytes: u64) -> Result<u32, LayoutError> {
    u32::try_from(bytes.div_ceil(BLOCK as u64)).map_err(|_| LayoutError::TooLarge)
}

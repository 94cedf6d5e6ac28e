//! The bytes of the superblock and of the metadata (kernel: fs/erofs/erofs_fs.h).

use std::io::{self, Write};

use crate::directory::{self, Entry};
use crate::layout::{Inode, Layout, SLOT, names};
use crate::node::{Content, NodeId};
use crate::{BLOCK, INODE, xattr};

const MAGIC: u32 = 0xe0f5_e1e2;
/// Where in block 0 the superblock stands.
const SUPERBLOCK: usize = 1024;
/// `EROFS_FEATURE_COMPAT_MTIME`: times are those of the contents.
const MTIME: u32 = 2;
/// The bit of `i_format` that says that the inode has 64 bytes.
const EXTENDED: u16 = 1;
/// `EROFS_INODE_FLAT_PLAIN` and `EROFS_INODE_FLAT_INLINE` in `i_format`.
const PLAIN: u16 = 0 << 1;
const INLINE: u16 = 2 << 1;

/// A file system that has its place on a disk.
pub struct Image<'a> {
    pub(crate) layout: Layout<'a>,
    pub(crate) metadata: u32,
    pub(crate) bodies: u32,
    pub(crate) blocks: u32,
    pub(crate) uuid: [u8; 16],
}

impl Image<'_> {
    /// How many blocks the disk has at least.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// The contents of block 0.
    pub fn superblock(&self) -> Vec<u8> {
        let mut block = vec![0; SUPERBLOCK];
        // The root comes first.
        let root = self.layout.inodes.first().map_or(0, |inode| inode.at) / SLOT as u64;
        block.extend(MAGIC.to_le_bytes());
        block.extend(0_u32.to_le_bytes()); // checksum: none
        block.extend(MTIME.to_le_bytes());
        block.push(BLOCK.trailing_zeros() as u8);
        block.push(0); // no further slots of the superblock
        block.extend((root as u16).to_le_bytes());
        block.extend((self.layout.inodes.len() as u64).to_le_bytes());
        block.extend([0; 8 + 4]); // time of the build
        block.extend(self.blocks.to_le_bytes());
        block.extend(self.metadata.to_le_bytes());
        block.extend(0_u32.to_le_bytes()); // shared attributes: none
        block.extend(self.uuid);
        block.resize(BLOCK, 0);
        block
    }

    /// Writes the metadata. `small` fills its second argument from where [`Content::Small`] says.
    pub fn write(
        &self,
        out: &mut impl Write,
        small: &mut dyn FnMut(u64, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut out = Counted { out, bytes: 0 };
        for inode in &self.layout.inodes {
            out.fill_to(inode.at)?;
            out.write(&self.inode(inode))?;
            out.write(&inode.xattrs)?;
            if inode.tail > 0 {
                let body = self.body(inode, small)?;
                let tail = body.len().saturating_sub(inode.tail);
                out.write(body.get(tail..).unwrap_or_default())?;
            }
        }
        out.fill_to(u64::from(self.layout.inode_blocks) * BLOCK as u64)?;
        for inode in &self.layout.inodes {
            if inode.blocks.1 > 0 {
                let body = self.body(inode, small)?;
                let tail = body.len().saturating_sub(inode.tail);
                out.write(body.get(..tail).unwrap_or_default())?;
                out.fill_to(out.bytes.next_multiple_of(BLOCK as u64))?;
            }
        }
        Ok(())
    }

    fn inode(&self, inode: &Inode) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(INODE);
        let Some(node) = self.layout.tree.nodes.get(inode.node) else {
            return bytes;
        };
        let kind = Kind::of(&node.content);
        let first = match &node.content {
            Content::Large { block, .. } => self.bodies + block,
            Content::CharacterDevice(device) | Content::BlockDevice(device) => device.encoded(),
            _ => self.metadata + self.layout.inode_blocks + inode.blocks.0,
        };
        let layout = if inode.tail > 0 { INLINE } else { PLAIN };
        bytes.extend((EXTENDED | layout).to_le_bytes());
        bytes.extend(xattr::count(inode.xattrs.len()).to_le_bytes());
        bytes.extend((kind.mode | node.mode & 0o7777).to_le_bytes());
        bytes.extend([0; 2]);
        bytes.extend(inode.size.to_le_bytes());
        bytes.extend(first.to_le_bytes());
        // For 32-bit programs only; others get the inode's place.
        bytes.extend((inode.node as u32).wrapping_add(1).to_le_bytes());
        bytes.extend(node.uid.to_le_bytes());
        bytes.extend(node.gid.to_le_bytes());
        bytes.extend(node.mtime.to_le_bytes());
        bytes.extend(node.mtime_nanoseconds.to_le_bytes());
        bytes.extend(inode.links.to_le_bytes());
        bytes.resize(INODE, 0);
        bytes
    }

    /// All bytes of a body that lies among the metadata.
    fn body(
        &self,
        inode: &Inode,
        small: &mut dyn FnMut(u64, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<Vec<u8>> {
        match self
            .layout
            .tree
            .nodes
            .get(inode.node)
            .map(|node| &node.content)
        {
            Some(Content::Directory(entries)) => {
                let entries: Vec<Entry<'_>> = names(entries.keys())
                    .into_iter()
                    .map(|name| {
                        let node = match name {
                            b"." => inode.node,
                            b".." => inode.parent,
                            name => entries.get(name).copied().unwrap_or_default(),
                        };
                        self.entry(name, node)
                    })
                    .collect();
                Ok(directory::encoded(&entries))
            }
            Some(Content::Symlink(target)) => Ok(target.clone()),
            Some(Content::Small { at, size }) => {
                let mut bytes = vec![0; *size as usize];
                small(*at, &mut bytes)?;
                Ok(bytes)
            }
            _ => Ok(Vec::new()),
        }
    }

    fn entry<'n>(&self, name: &'n [u8], node: NodeId) -> Entry<'n> {
        let place = self.layout.index.get(node).copied().flatten();
        let inode = place.and_then(|place| self.layout.inodes.get(place));
        let content = self.layout.tree.nodes.get(node).map(|node| &node.content);
        Entry {
            name,
            inode: inode.map_or(0, |inode| inode.at / SLOT as u64),
            kind: content.map_or(0, |content| Kind::of(content).entry),
        }
    }
}

/// A kind of file, as inodes and as directories have it.
struct Kind {
    /// The bits of `st_mode`.
    mode: u16,
    /// `EROFS_FT_*`, which are those of all of Linux's file systems.
    entry: u8,
}

impl Kind {
    fn of(content: &Content) -> Self {
        let (mode, entry) = match content {
            Content::Small { .. } | Content::Large { .. } => (0o10_0000, 1),
            Content::Directory(_) => (0o04_0000, 2),
            Content::CharacterDevice(_) => (0o02_0000, 3),
            Content::BlockDevice(_) => (0o06_0000, 4),
            Content::Fifo => (0o01_0000, 5),
            Content::Socket => (0o14_0000, 6),
            Content::Symlink(_) => (0o12_0000, 7),
        };
        Self { mode, entry }
    }
}

/// A writer that knows how far it is.
struct Counted<W> {
    out: W,
    bytes: u64,
}

impl<W: Write> Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.bytes += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    fn fill_to(&mut self, end: u64) -> io::Result<()> {
        const ZEROS: [u8; BLOCK] = [0; BLOCK];
        while self.bytes < end {
            let most = (end - self.bytes).min(BLOCK as u64) as usize;
            self.write(ZEROS.get(..most).unwrap_or_default())?;
        }
        Ok(())
    }
}

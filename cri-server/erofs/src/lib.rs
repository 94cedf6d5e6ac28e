//! Writes the metadata of EROFS file systems (kernel: fs/erofs/erofs_fs.h, Linux 6.12).
//!
//! Of what the format offers this uses little: blocks of 4 KiB, extended inodes, and flat bodies,
//! which are one run of blocks each. Bodies of larger files lie outside, in blocks that somebody else
//! has written; small ones, directories and symbolic links lie among the metadata, behind their
//! inodes where there is room. No compression, no chunks, no devices, no checksum.
//!
//! ```text
//! block 0      the superblock
//! elsewhere    metadata: inodes with what is small, then the full blocks of large directories
//! elsewhere    bodies
//! ```

mod directory;
mod layout;
mod node;
mod write;
mod xattr;

pub use layout::Layout;
pub use node::{Content, Device, Node, NodeId, Tree};
pub use write::Image;
pub use xattr::check as check_xattrs;

/// Bytes of a block.
pub const BLOCK: usize = 4096;

/// Bytes of an inode without what follows it.
const INODE: usize = 64;

/// The most bytes of a small file: it shares a block with its inode.
pub const SMALL: usize = BLOCK - INODE;

/// Why a tree cannot be a file system.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// The first node is missing, or no directory.
    #[error("the root is no directory")]
    Root,
    /// An entry names a node that is not there.
    #[error("an entry names node {0}, which is not there")]
    Missing(NodeId),
    /// Several entries name a directory, or an entry names the root.
    #[error("node {0} is a directory with several parents")]
    Linked(NodeId),
    /// A file name that Linux does not have.
    #[error("`{0}` cannot be the name of a file")]
    Name(String),
    /// An attribute whose name has no known prefix, or which is too long, alone or with the others.
    #[error("the extended attribute `{0}` cannot be stored")]
    Xattr(String),
    /// The target of a symbolic link is empty or longer than Linux allows.
    #[error("the target of a symbolic link has {0} bytes")]
    Target(usize),
    /// More bytes than fit behind an inode.
    #[error("a small file has {0} bytes")]
    Small(u32),
    /// More blocks than can be counted.
    #[error("the file system has more than 2^32 - 1 blocks of 4096 bytes")]
    TooLarge,
}

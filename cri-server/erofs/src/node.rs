//! What a file system is made of.

use std::collections::BTreeMap;

/// A node's place in [`Tree::nodes`].
pub type NodeId = usize;

/// A file system: the root is the first node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tree {
    /// All nodes. One that no directory names is not written.
    pub nodes: Vec<Node>,
}

/// A file, of whatever kind. Several directories may name one that is no directory: hard links.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Permission bits with setuid, setgid and sticky; other bits are left out.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since the epoch.
    pub mtime: i64,
    /// Nanoseconds beyond, below 10^9.
    pub mtime_nanoseconds: u32,
    /// Extended attributes by their full names.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// What it is.
    pub content: Content,
}

/// What a node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Names without `.` and `..`.
    Directory(BTreeMap<Vec<u8>, NodeId>),
    /// A file whose bytes lie among the metadata. `at` is the writer's word for where they are now,
    /// see [`crate::Layout::write`].
    Small {
        /// Where its bytes are to be had.
        at: u64,
        /// Bytes; at most [`crate::SMALL`].
        size: u32,
    },
    /// A file whose bytes lie outside.
    Large {
        /// Its first block, counted from where all such bytes begin.
        block: u32,
        /// Bytes.
        size: u64,
    },
    /// The target.
    Symlink(Vec<u8>),
    /// A character device.
    CharacterDevice(Device),
    /// A block device.
    BlockDevice(Device),
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

/// A device's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// Below 2^12.
    pub major: u32,
    /// Below 2^20.
    pub minor: u32,
}

impl Device {
    /// As Linux stores it (kernel: include/linux/kdev_t.h, `new_encode_dev`).
    pub(crate) fn encoded(self) -> u32 {
        (self.minor & 0xff) | ((self.major & 0xfff) << 8) | ((self.minor & 0xf_ff00) << 12)
    }
}

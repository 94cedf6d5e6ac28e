//! What the files of an image contain, on its way to the image's disk.
//!
//! The disk is written from front to back: a block for the superblock, the bodies of larger files as
//! the layers bring them, then the metadata, which know where everything is. Small bodies wait in a
//! file without a name until they find their places among the metadata.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bulkhead_erofs::{BLOCK, Content, Layout, LayoutError, SMALL, Tree};
use rustix::fs::FallocateFlags;

use super::archive::Archive;
use super::tree::TreeError;

/// Where bodies begin: behind the superblock.
const FIRST: u32 = 1;
/// Bytes that are written at once.
const PIECE: usize = 256 << 10;

/// The bodies of one image.
pub(super) struct Bodies {
    path: PathBuf,
    disk: BufWriter<File>,
    /// Written from [`FIRST`] on.
    blocks: u32,
    small: BufWriter<File>,
    small_bytes: u64,
    buffer: Vec<u8>,
}

/// Why a disk was not finished.
#[derive(Debug, thiserror::Error)]
pub(super) enum DiskError {
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    Write(#[from] io::Error),
}

impl Bodies {
    /// Begins the disk at `path`, which must not be there.
    pub fn create(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let small = path.with_extension("small");
        let spool = options.open(&small)?;
        std::fs::remove_file(&small)?;
        let mut disk = options.open(path)?;
        disk.seek(SeekFrom::Start(u64::from(FIRST) * BLOCK as u64))?;
        Ok(Self {
            path: path.to_path_buf(),
            disk: BufWriter::with_capacity(PIECE, disk),
            blocks: 0,
            small: BufWriter::with_capacity(PIECE, spool),
            small_bytes: 0,
            buffer: vec![0; PIECE],
        })
    }

    /// Takes the body of the archive's current member, of `size` bytes.
    pub fn take<R: Read>(
        &mut self,
        size: u64,
        archive: &mut Archive<R>,
    ) -> Result<Content, TreeError> {
        let failed = |path: &Path, source| TreeError::Write {
            path: path.to_path_buf(),
            source,
        };
        let small = u32::try_from(size)
            .ok()
            .filter(|&size| size as usize <= SMALL);
        loop {
            let read = archive.read(&mut self.buffer)?;
            let bytes = self.buffer.get(..read).unwrap_or_default();
            if bytes.is_empty() {
                break;
            }
            match small {
                Some(_) => self.small.write_all(bytes),
                None => self.disk.write_all(bytes),
            }
            .map_err(|source| failed(&self.path, source))?;
        }
        if let Some(size) = small {
            let at = self.small_bytes;
            self.small_bytes += u64::from(size);
            return Ok(Content::Small { at, size });
        }
        let block = self.blocks;
        let blocks = u32::try_from(size.div_ceil(BLOCK as u64)).ok();
        self.blocks = blocks
            .and_then(|blocks| block.checked_add(blocks))
            .ok_or_else(|| TreeError::TooLarge(LayoutError::TooLarge.to_string()))?;
        let rest = (size.next_multiple_of(BLOCK as u64) - size) as usize;
        let zeros = [0; BLOCK];
        self.disk
            .write_all(zeros.get(..rest).unwrap_or_default())
            .map_err(|source| failed(&self.path, source))?;
        Ok(Content::Large { block, size })
    }

    /// Completes the disk, durably, and returns its length in bytes.
    pub fn finish(self, tree: &Tree, uuid: [u8; 16]) -> Result<u64, DiskError> {
        let small = self
            .small
            .into_inner()
            .map_err(io::IntoInnerError::into_error)?;
        let metadata = FIRST
            .checked_add(self.blocks)
            .ok_or(LayoutError::TooLarge)?;
        let image = Layout::new(tree)?.place(metadata, FIRST, uuid)?;
        let mut disk = self.disk;
        image.write(&mut disk, &mut |at, bytes| small.read_exact_at(bytes, at))?;
        let disk = disk.into_inner().map_err(io::IntoInnerError::into_error)?;
        disk.write_all_at(&image.superblock(), 0)?;
        punch(&disk, tree, self.blocks);
        disk.sync_all()?;
        Ok(u64::from(image.blocks()) * BLOCK as u64)
    }
}

/// Gives back the room of bodies that upper layers have hidden.
fn punch(disk: &File, tree: &Tree, blocks: u32) {
    let mut used = Vec::new();
    let mut left = vec![0];
    while let Some(node) = left.pop() {
        match tree.nodes.get(node).map(|node| &node.content) {
            Some(Content::Directory(entries)) => left.extend(entries.values()),
            Some(Content::Large { block, size }) => {
                used.push((u64::from(*block), size.div_ceil(BLOCK as u64)));
            }
            _ => {}
        }
    }
    used.push((u64::from(blocks), 0));
    used.sort_unstable();
    let mut end = 0;
    for (block, count) in used {
        if block > end {
            let at = (u64::from(FIRST) + end) * BLOCK as u64;
            let length = (block - end) * BLOCK as u64;
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            // It only saves room; not every file system can.
            let _ = rustix::fs::fallocate(disk, flags, at, length);
        }
        end = end.max(block + count);
    }
}

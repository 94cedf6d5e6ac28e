//! The files behind a disk.

use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::sync::Arc;

use rustix::fs::FallocateFlags;
use vm_memory::VolatileSlice;

use crate::sys;

/// Bytes of a sector (virtio 1.2 §5.2.4).
pub const SECTOR: u64 = 512;
/// Bytes of the name that the guest reads (virtio 1.2 §5.2.6).
pub const SERIAL_BYTES: usize = 20;

/// A part of a file that makes up the next part of a disk.
#[derive(Debug, Clone)]
pub struct Piece {
    /// The file.
    pub file: Arc<File>,
    /// Where the part starts.
    pub offset: u64,
    /// Its length, a multiple of [`SECTOR`].
    pub length: u64,
}

/// A disk out of pieces. It knows no guest.
#[derive(Debug)]
pub struct Disk {
    /// Each with the place of its start on the disk.
    pieces: Vec<(u64, Piece)>,
    size: u64,
    read_only: bool,
    serial: [u8; SERIAL_BYTES],
}

/// A range of one file, as part of a range of the disk.
struct Stretch<'d> {
    file: &'d File,
    offset: u64,
    length: u64,
}

impl Disk {
    /// Puts the pieces together in their order. `serial` is cut at [`SERIAL_BYTES`].
    pub fn new(serial: &str, read_only: bool, pieces: Vec<Piece>) -> Self {
        let mut name = [0; SERIAL_BYTES];
        name.iter_mut()
            .zip(serial.bytes())
            .for_each(|(to, from)| *to = from);
        let mut size = 0u64;
        let place = |piece: Piece| {
            let start = size;
            size = size.saturating_add(piece.length);
            (start, piece)
        };
        let pieces = pieces.into_iter().map(place).collect();
        Self {
            pieces,
            size,
            read_only,
            serial: name,
        }
    }

    /// What stands in for a disk that was lost: all its requests fail.
    pub fn lost() -> Self {
        Self::new("", true, Vec::new())
    }

    /// Its size.
    pub fn sectors(&self) -> u64 {
        self.size / SECTOR
    }

    /// Whether it may not be written.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Its name, padded with zeros.
    pub fn serial(&self) -> &[u8; SERIAL_BYTES] {
        &self.serial
    }

    /// Fills `into` from `sector` on. Fails if that is not all on the disk, or a file is shorter
    /// than its piece.
    pub fn read(&self, sector: u64, into: &[VolatileSlice<'_>]) -> Result<()> {
        self.transfer(sector, into, sys::read_at)
    }

    /// Writes `from` to `sector` on. Fails like [`Disk::read`], and on a read-only disk.
    pub fn write(&self, sector: u64, from: &[VolatileSlice<'_>]) -> Result<()> {
        self.writable()?;
        self.transfer(sector, from, sys::write_at)
    }

    /// Makes what was written last through a crash of the host.
    pub fn flush(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.pieces
            .iter()
            .try_for_each(|(_, piece)| Ok(rustix::fs::fdatasync(&piece.file)?))
    }

    /// Makes `sectors` from `sector` on read as zeros and frees their space.
    pub fn discard(&self, sector: u64, sectors: u32) -> Result<()> {
        self.writable()?;
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        for stretch in self.stretches(sector, u64::from(sectors) * SECTOR)? {
            rustix::fs::fallocate(stretch.file, mode, stretch.offset, stretch.length)?;
        }
        Ok(())
    }

    fn writable(&self) -> Result<()> {
        if self.read_only {
            Err(ErrorKind::ReadOnlyFilesystem.into())
        } else {
            Ok(())
        }
    }

    fn transfer(
        &self,
        sector: u64,
        memory: &[VolatileSlice<'_>],
        call: fn(&File, &[VolatileSlice<'_>], u64) -> Result<usize>,
    ) -> Result<()> {
        let length = memory.iter().map(|slice| slice.len() as u64).sum();
        let mut rest = memory.to_vec();
        for stretch in self.stretches(sector, length)? {
            let (mut part, after) = split(&rest, stretch.length as usize)?;
            rest = after;
            let mut offset = stretch.offset;
            while !part.is_empty() {
                let done = call(stretch.file, &part, offset)?;
                if done == 0 {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                offset += done as u64;
                part = split(&part, done)?.1;
            }
        }
        Ok(())
    }

    /// The file ranges of `length` bytes from `sector` on, all of them or an error.
    fn stretches(&self, sector: u64, length: u64) -> Result<Vec<Stretch<'_>>> {
        let outside = || Error::from(ErrorKind::InvalidInput);
        let start = sector.checked_mul(SECTOR).ok_or_else(outside)?;
        let end = start
            .checked_add(length)
            .filter(|end| *end <= self.size)
            .ok_or_else(outside)?;
        let first = self
            .pieces
            .partition_point(|(at, piece)| at + piece.length <= start);
        let pieces = self.pieces.get(first..).unwrap_or_default();
        let touched = pieces.iter().take_while(|(at, _)| *at < end);
        let stretch = |(at, piece): &'_ (u64, Piece)| {
            let from = start.max(*at);
            let to = end.min(at + piece.length);
            (from - at, to - from)
        };
        Ok(touched
            .map(|placed| {
                let (skipped, length) = stretch(placed);
                let piece = &placed.1;
                Stretch {
                    file: &piece.file,
                    offset: piece.offset + skipped,
                    length,
                }
            })
            .collect())
    }
}

type Split<'m> = (Vec<VolatileSlice<'m>>, Vec<VolatileSlice<'m>>);

/// The first `at` bytes of `slices`, and the others. Fails if there are fewer.
pub fn split<'m>(slices: &[VolatileSlice<'m>], mut at: usize) -> Result<Split<'m>> {
    let (mut before, mut after) = (Vec::with_capacity(slices.len()), Vec::new());
    for slice in slices {
        let take = at.min(slice.len());
        at -= take;
        let (head, tail) = slice.split_at(take).map_err(Error::other)?;
        if !head.is_empty() {
            before.push(head);
        }
        if !tail.is_empty() {
            after.push(tail);
        }
    }
    if at > 0 {
        Err(ErrorKind::UnexpectedEof.into())
    } else {
        Ok((before, after))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;
    use vm_memory::VolatileMemory;

    use super::*;

    fn file(bytes: &[u8]) -> Arc<File> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        Arc::new(file)
    }

    fn piece(file: &Arc<File>, offset: u64, length: u64) -> Piece {
        Piece {
            file: file.clone(),
            offset,
            length,
        }
    }

    /// Two files and the disk's bytes: a page of the second, all of the first, the rest.
    fn disk(read_only: bool) -> (Disk, Vec<u8>) {
        let (a, b) = ([b'a'; 4096], [[b'b'; 4096], [b'c'; 4096]].concat());
        let bytes = [&b[4096..], &a, &b[..512]].concat();
        let (a, b) = (file(&a), file(&b));
        let pieces = vec![piece(&b, 4096, 4096), piece(&a, 0, 4096), piece(&b, 0, 512)];
        (Disk::new("disk", read_only, pieces), bytes)
    }

    fn read(disk: &Disk, sector: u64, cuts: &[usize]) -> Result<Vec<u8>> {
        let mut memory = vec![0u8; cuts.iter().sum()];
        let whole = VolatileSlice::from(&mut memory[..]);
        let mut at = 0;
        let slices: Vec<_> = cuts
            .iter()
            .map(|cut| {
                at += cut;
                whole.get_slice(at - cut, *cut).unwrap()
            })
            .collect();
        disk.read(sector, &slices)?;
        Ok(memory)
    }

    proptest! {
        #[test]
        fn any_range_reads_as_the_pieces_put_together(
            sector in 0u64..20,
            cuts in proptest::collection::vec(1usize..3000, 1..6),
        ) {
            let (disk, bytes) = disk(true);
            let start = sector as usize * 512;
            let end = start + cuts.iter().sum::<usize>();
            match read(&disk, sector, &cuts) {
                Ok(data) => prop_assert_eq!(&data[..], &bytes[start..end]),
                Err(_) => prop_assert!(end > bytes.len()),
            }
        }
    }

    #[test]
    fn what_is_written_is_read_back_across_pieces() {
        let (disk, _) = disk(false);
        let mut data = vec![b'x'; 4096];
        disk.write(7, &[VolatileSlice::from(&mut data[..])])
            .unwrap();
        assert_eq!(read(&disk, 7, &[4096]).unwrap(), data);
        assert_eq!(read(&disk, 6, &[512]).unwrap(), [b'c'; 512]);
        assert_eq!(read(&disk, 15, &[512]).unwrap(), [b'a'; 512]);
    }

    #[test]
    fn a_discarded_range_reads_as_zeros() {
        let (disk, _) = disk(false);
        disk.discard(0, 16).unwrap();
        assert_eq!(read(&disk, 0, &[8192]).unwrap(), [0; 8192]);
        assert_eq!(read(&disk, 16, &[512]).unwrap(), [b'b'; 512]);
        assert!(disk.discard(10, u32::MAX).is_err());
        assert!(disk.discard(u64::MAX, 1).is_err());
    }

    #[test]
    fn a_read_only_disk_is_never_changed() {
        let (disk, bytes) = disk(true);
        let mut data = vec![b'x'; 512];
        assert!(
            disk.write(0, &[VolatileSlice::from(&mut data[..])])
                .is_err()
        );
        assert!(disk.discard(0, 8).is_err());
        assert_eq!(read(&disk, 0, &[4096]).unwrap(), bytes[..4096]);
    }

    #[test]
    fn a_file_shorter_than_its_piece_is_an_error() {
        let short = file(&[0; 1000]);
        let disk = Disk::new("short", true, vec![piece(&short, 0, 4096)]);
        assert_eq!(
            read(&disk, 0, &[4096]).unwrap_err().kind(),
            ErrorKind::UnexpectedEof
        );
    }
}

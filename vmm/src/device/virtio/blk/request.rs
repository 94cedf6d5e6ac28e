//! One request (virtio 1.2 §5.2.6), however its bytes are spread over descriptors (§2.7.4).

use std::io::{ErrorKind, Result as IoResult};

use vm_memory::{Bytes, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

use super::super::worker::{Chain, Malformed};
use super::disk::{Disk, SECTOR, SERIAL_BYTES, split};

/// Bytes of the header: type, reserved, sector.
const HEADER_BYTES: usize = 16;
/// Bytes of a range to discard or zero: sector, number of sectors, flags.
const RANGE_BYTES: usize = 16;
/// More than a driver that keeps to the number of segments we offer ever sends.
const MAX_DESCRIPTORS: usize = 1024;

// Types.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

// Results.
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// A request whose memory is checked.
pub struct Request<'m> {
    kind: u32,
    sector: u64,
    /// What the driver gives.
    output: Vec<VolatileSlice<'m>>,
    /// What the driver wants filled.
    input: Vec<VolatileSlice<'m>>,
    status: VolatileSlice<'m>,
}

/// Why a request is answered with an error.
enum Refusal {
    Failed,
    Unsupported,
}

impl<'m> Request<'m> {
    /// Takes the request apart. Fails if it has no room for a header and a result.
    pub fn parse(memory: &'m GuestMemoryMmap, chain: Chain<'_>) -> Result<Self, Malformed> {
        let (mut output, mut input) = (Vec::new(), Vec::new());
        for (count, descriptor) in chain.enumerate() {
            if count == MAX_DESCRIPTORS {
                return Err(Malformed("a request has too many descriptors"));
            }
            let outside = Malformed("a buffer lies outside the memory");
            let access = if descriptor.is_write_only() {
                Permissions::Write
            } else {
                Permissions::Read
            };
            let slices = memory
                .get_slices(descriptor.addr(), descriptor.len() as usize, access)
                .map_err(|_| outside)?;
            let list = if descriptor.is_write_only() {
                &mut input
            } else if input.is_empty() {
                &mut output
            } else {
                return Err(Malformed("a readable buffer comes after a writable one"));
            };
            for slice in slices {
                list.push(slice.map_err(|_| outside)?);
            }
        }
        let short = |_| Malformed("a request is too short");
        let (header, output) = split(&output, HEADER_BYTES).map_err(short)?;
        let header: [u8; HEADER_BYTES] = gather(&header);
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let length: usize = input.iter().map(VolatileSlice::len).sum();
        let (input, status) = split(&input, length.saturating_sub(1)).map_err(short)?;
        let [status] = status[..] else {
            return Err(Malformed("a request has no room for its result"));
        };
        let kind = u32::from_le_bytes([k0, k1, k2, k3]);
        Ok(Self {
            kind,
            sector: u64::from_le_bytes(sector),
            output,
            input,
            status,
        })
    }

    /// Does what is asked and tells how many bytes were written to the guest.
    pub fn serve(self, disk: &Disk) -> Result<u32, Malformed> {
        let (written, status) = match self.perform(disk) {
            Ok(written) => (written, OK),
            Err(Refusal::Failed) => (0, IO_ERROR),
            Err(Refusal::Unsupported) => (0, UNSUPPORTED),
        };
        let full = |_| Malformed("a request's result cannot be written");
        self.status.write_slice(&[status], 0).map_err(full)?;
        Ok(u32::try_from(written).unwrap_or(u32::MAX).saturating_add(1))
    }

    fn perform(&self, disk: &Disk) -> Result<usize, Refusal> {
        match self.kind {
            IN => {
                whole_sectors(&self.input)?;
                disk.read(self.sector, &self.input).map_err(refuse)?;
                Ok(length(&self.input))
            }
            OUT => {
                whole_sectors(&self.output)?;
                disk.write(self.sector, &self.output).map_err(refuse)?;
                Ok(0)
            }
            FLUSH => disk.flush().map(|()| 0).map_err(refuse),
            GET_ID => self.identify(disk).map_err(refuse),
            DISCARD | WRITE_ZEROES => {
                let range: [u8; RANGE_BYTES] = gather(&self.output);
                let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, ..] = range;
                // One range is what we offer.
                if length(&self.output) != RANGE_BYTES {
                    return Err(Refusal::Unsupported);
                }
                let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
                let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
                // The hole reads as zeros, which is right for both.
                disk.discard(sector, sectors).map(|()| 0).map_err(refuse)
            }
            _ => Err(Refusal::Unsupported),
        }
    }

    fn identify(&self, disk: &Disk) -> IoResult<usize> {
        let mut rest = &disk.serial()[..];
        for slice in &self.input {
            let count = slice.len().min(rest.len());
            slice.copy_from(&rest[..count]);
            rest = &rest[count..];
        }
        Ok(SERIAL_BYTES - rest.len())
    }
}

fn whole_sectors(slices: &[VolatileSlice<'_>]) -> Result<(), Refusal> {
    if (length(slices) as u64).is_multiple_of(SECTOR) {
        Ok(())
    } else {
        Err(Refusal::Failed)
    }
}

fn refuse(error: std::io::Error) -> Refusal {
    if error.kind() == ErrorKind::Unsupported {
        Refusal::Unsupported
    } else {
        Refusal::Failed
    }
}

fn length(slices: &[VolatileSlice<'_>]) -> usize {
    slices.iter().map(VolatileSlice::len).sum()
}

/// The first bytes of `slices`, zeros where there are none.
fn gather<const N: usize>(slices: &[VolatileSlice<'_>]) -> [u8; N] {
    let mut bytes = [0; N];
    let mut at = 0;
    for slice in slices {
        at += slice.copy_to(&mut bytes[at..]);
    }
    bytes
}

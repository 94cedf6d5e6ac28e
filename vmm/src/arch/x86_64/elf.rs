//! What of an ELF file has to be loaded to boot the kernel in it.

/// How much of the file [`parse`] wants to see, in bytes: the file header and the program headers,
/// which linkers put right behind it.
pub const HEAD_BYTES: usize = 4096;
/// More segments than any kernel has.
const MAX_SEGMENTS: usize = 32;

/// A kernel's load plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The physical address of `startup_64`.
    pub entry: u64,
    /// What to load.
    pub segments: Vec<Segment>,
}

/// A piece of the file with its place in memory. Memory behind it, up to the end of the segment, is
/// zero already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Offset in the file.
    pub offset: u64,
    /// Physical address.
    pub address: u64,
    /// Bytes to read from the file.
    pub length: u64,
    /// Bytes in memory.
    pub memory: u64,
}

/// Why a file is not a kernel we can boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ElfError {
    /// Not the format.
    #[error("it is not an uncompressed x86_64 ELF kernel (vmlinux); a bzImage has to be unpacked")]
    Format,
    /// A number in a header makes no sense.
    #[error("its {0} is out of range")]
    Range(&'static str),
}

/// Reads the headers at the start of the file.
pub fn parse(head: &[u8]) -> Result<Plan, ElfError> {
    let ident: [u8; 7] = bytes(head, 0).ok_or(ElfError::Format)?;
    let machine = u16(head, 18).ok_or(ElfError::Format)?;
    // 64 bits, little endian, version 1; x86_64.
    if ident != *b"\x7fELF\x02\x01\x01" || machine != 62 {
        return Err(ElfError::Format);
    }
    let entry = u64(head, 24).ok_or(ElfError::Format)?;
    let table = u64(head, 32).and_then(|at| usize::try_from(at).ok());
    let table = table.ok_or(ElfError::Range("program header offset"))?;
    let (size, count) = (u16(head, 54), u16(head, 56));
    let count = count
        .map(usize::from)
        .filter(|count| *count <= MAX_SEGMENTS);
    let count = count.ok_or(ElfError::Range("number of program headers"))?;
    if size != Some(56) {
        return Err(ElfError::Range("program header size"));
    }
    let mut segments = Vec::new();
    for index in 0..count {
        let header = table
            .checked_add(index * 56)
            .and_then(|at| head.get(at..)?.get(..56));
        let header = header.ok_or(ElfError::Range("program header offset"))?;
        segments.extend(segment(header)?);
    }
    let inside = |s: &Segment| (s.address..s.address + s.length).contains(&entry);
    if !segments.iter().any(inside) {
        return Err(ElfError::Range("entry point"));
    }
    Ok(Plan { entry, segments })
}

/// The segment of a program header, if it is one to be loaded.
fn segment(header: &[u8]) -> Result<Option<Segment>, ElfError> {
    let loaded = header.get(..4) == Some(&1u32.to_le_bytes());
    let field = |at| u64(header, at).ok_or(ElfError::Range("program header"));
    let segment = Segment {
        offset: field(8)?,
        address: field(24)?,
        length: field(32)?,
        memory: field(40)?,
    };
    if !loaded || segment.memory == 0 {
        return Ok(None);
    }
    let ends = segment.length <= segment.memory
        && segment.offset.checked_add(segment.length).is_some()
        && segment.address.checked_add(segment.memory).is_some();
    if ends {
        Ok(Some(segment))
    } else {
        Err(ElfError::Range("segment size"))
    }
}

impl Plan {
    /// The first physical address that the kernel's image leaves free.
    pub fn end(&self) -> u64 {
        self.segments
            .iter()
            .map(|s| s.address.saturating_add(s.memory))
            .max()
            .unwrap_or(0)
    }
}

fn bytes<const N: usize>(from: &[u8], at: usize) -> Option<[u8; N]> {
    from.get(at..)?.get(..N)?.try_into().ok()
}

fn u16(from: &[u8], at: usize) -> Option<u16> {
    bytes(from, at).map(u16::from_le_bytes)
}

fn u64(from: &[u8], at: usize) -> Option<u64> {
    bytes(from, at).map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kernel() -> Vec<u8> {
        let mut head = vec![0; HEAD_BYTES];
        head[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        head[18] = 62;
        head[24..32].copy_from_slice(&0x100_0010u64.to_le_bytes());
        head[32] = 64;
        head[54] = 56;
        head[56] = 2;
        let load = |head: &mut Vec<u8>, at: usize, kind: u8, fields: [u64; 4]| {
            head[at] = kind;
            for (offset, field) in [8, 24, 32, 40].into_iter().zip(fields) {
                head[at + offset..at + offset + 8].copy_from_slice(&field.to_le_bytes());
            }
        };
        load(&mut head, 64, 1, [0x20_0000, 0x100_0000, 0x1000, 0x3000]);
        load(&mut head, 120, 4, [0x30_0000, 0, 36, 36]);
        head
    }

    #[test]
    fn only_segments_to_be_loaded_are_planned() {
        let plan = parse(&kernel()).unwrap();
        assert_eq!(plan.entry, 0x100_0010);
        assert_eq!(
            plan.segments,
            [Segment {
                offset: 0x20_0000,
                address: 0x100_0000,
                length: 0x1000,
                memory: 0x3000
            }]
        );
        assert_eq!(plan.end(), 0x100_3000);
    }

    #[test]
    fn what_cannot_be_booted_is_refused() {
        let refuse = |at: usize, byte: u8| {
            let mut head = kernel();
            head[at] = byte;
            parse(&head).unwrap_err()
        };
        assert_eq!(parse(b"MZ"), Err(ElfError::Format));
        assert_eq!(refuse(4, 1), ElfError::Format);
        assert_eq!(refuse(18, 3), ElfError::Format);
        assert_eq!(refuse(57, 9), ElfError::Range("number of program headers"));
        assert_eq!(refuse(54, 32), ElfError::Range("program header size"));
        assert_eq!(refuse(39, 1), ElfError::Range("program header offset"));
        assert_eq!(refuse(30, 1), ElfError::Range("entry point"));
        assert_eq!(refuse(64 + 39, 1), ElfError::Range("segment size"));
    }

    proptest! {
        #[test]
        fn no_header_makes_it_panic(mut at in 0usize..200, noise in proptest::collection::vec(any::<u8>(), 1..64)) {
            let mut head = kernel();
            for byte in noise {
                head[at] = byte;
                at += 3;
            }
            if let Ok(plan) = parse(&head) {
                prop_assert!(plan.end() > 0);
            }
        }
    }
}

//! Reads a tar stream: ustar, GNU long names and PAX (POSIX.1-2008 `pax`, OCI image-spec
//! `layer.md`).
//!
//! An own reader because extended headers must be bounded before they are read and because
//! PAX values are binary: a file capability may well contain a newline byte.

use std::io::{self, Read};

const BLOCK: usize = 512;
/// The most bytes of a member's extended headers together. Linux allows 64 KiB for one attribute's
/// value.
const EXTENDED_MAX: u64 = 1 << 20;
/// The longest path, as Linux has it.
const PATH_MAX: usize = 4096;

/// Why a stream is not an archive.
#[derive(Debug, thiserror::Error)]
pub(super) enum ArchiveError {
    #[error("reading the archive: {0}")]
    Read(#[from] io::Error),
    #[error("{0}")]
    Malformed(String),
}

fn malformed(text: impl Into<String>) -> ArchiveError {
    ArchiveError::Malformed(text.into())
}

/// What an archive member is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Directory,
    /// The target, as it is stored.
    Symlink(Vec<u8>),
    /// The path of another member.
    HardLink(Vec<u8>),
    CharacterDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// One member of an archive, without its contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Member {
    pub path: Vec<u8>,
    pub kind: Kind,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since the epoch, and nanoseconds beyond.
    pub mtime: (i64, u32),
    /// Bytes of contents.
    pub size: u64,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Reads an archive member by member.
pub(super) struct Archive<R> {
    reader: R,
    /// Bytes of the current member's contents not yet read.
    unread: u64,
    /// Zeros up to the next block.
    padding: u64,
}

impl<R: Read> Archive<R> {
    pub fn new(reader: R) -> Archive<R> {
        Archive {
            reader,
            unread: 0,
            padding: 0,
        }
    }

    /// The next member, or `None` at the archive's end. What was not read of the last member is
    /// skipped.
    pub fn next_member(&mut self) -> Result<Option<Member>, ArchiveError> {
        let mut extended = Extended::default();
        let mut room = EXTENDED_MAX;
        loop {
            self.skip_rest()?;
            let Some(header) = self.header()? else {
                return if extended == Extended::default() {
                    Ok(None)
                } else {
                    Err(malformed("the archive ends after an extended header"))
                };
            };
            let size = header.number(124, 12)?;
            match header.kind() {
                b'L' => extended.path = Some(until_nul(self.extended(size, &mut room)?)),
                b'K' => extended.link = Some(until_nul(self.extended(size, &mut room)?)),
                b'x' => {
                    let records = self.extended(size, &mut room)?;
                    extended.read_pax(&records)?;
                }
                // Global headers carry comments (a git commit) in what tools write today.
                b'g' => {
                    self.extended(size, &mut room)?;
                }
                _ => return self.member(&header, extended, size).map(Some),
            }
        }
    }

    /// Reads on in the current member's contents.
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<usize, ArchiveError> {
        let most = usize::try_from(self.unread)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let Some(buffer) = buffer.get_mut(..most).filter(|part| !part.is_empty()) else {
            return Ok(0);
        };
        let read = self.reader.read(buffer)?;
        if read == 0 {
            return Err(malformed("the archive ends within a file"));
        }
        self.unread -= read as u64;
        Ok(read)
    }

    /// Reads what follows the archive's end, which still counts for the stream's digest.
    pub fn finish(mut self) -> Result<R, ArchiveError> {
        io::copy(&mut self.reader, &mut io::sink())?;
        Ok(self.reader)
    }

    fn member(
        &mut self,
        header: &Header,
        extended: Extended,
        size: u64,
    ) -> Result<Member, ArchiveError> {
        let size = extended.size.unwrap_or(size);
        let path = match extended.path {
            Some(path) => path,
            None => header.path(),
        };
        let link = extended
            .link
            .unwrap_or_else(|| until_nul(header.field(157, 100).to_vec()));
        if path.len() >= PATH_MAX || link.len() >= PATH_MAX {
            return Err(malformed("a path is longer than 4095 bytes"));
        }
        let (major, minor) = (header.number_u32(329, 8), header.number_u32(337, 8));
        let kind = match header.kind() {
            b'0' | b'7' | 0 if path.ends_with(b"/") => Kind::Directory,
            b'0' | b'7' | 0 => Kind::File,
            b'1' => Kind::HardLink(link),
            b'2' => Kind::Symlink(link),
            b'3' => Kind::CharacterDevice {
                major: major?,
                minor: minor?,
            },
            b'4' => Kind::BlockDevice {
                major: major?,
                minor: minor?,
            },
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => {
                return Err(malformed(format!(
                    "member `{}` has the type `{}`, which is not supported",
                    path.escape_ascii(),
                    other.escape_ascii()
                )));
            }
        };
        // Only files have contents; some writers give a hard link its target's size, with
        // nothing behind it (POSIX: "if the link has contents, size says so", no tool does).
        let size = if kind == Kind::File { size } else { 0 };
        self.expect(size)?;
        Ok(Member {
            path,
            kind,
            mode: header.number_u32(100, 8)? & 0o7777,
            uid: extended.uid.map_or_else(|| header.number_u32(108, 8), Ok)?,
            gid: extended.gid.map_or_else(|| header.number_u32(116, 8), Ok)?,
            mtime: match extended.mtime {
                Some(mtime) => mtime,
                None => (header.signed(136, 12)?, 0),
            },
            size,
            xattrs: extended.xattrs,
        })
    }

    fn header(&mut self) -> Result<Option<Header>, ArchiveError> {
        let mut block = [0u8; BLOCK];
        let mut filled = 0;
        while let Some(rest) = block.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.reader.read(rest)? {
                // Some writers leave the two zero blocks at the end away.
                0 if filled == 0 => return Ok(None),
                0 => return Err(malformed("the archive ends within a header")),
                read => filled += read,
            }
        }
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let header = Header(block);
        let sum: u64 = block
            .iter()
            .enumerate()
            .map(|(at, byte)| {
                u64::from(if (148..156).contains(&at) {
                    b' '
                } else {
                    *byte
                })
            })
            .sum();
        if header.number(148, 8)? != sum {
            return Err(malformed(
                "the checksum of a header is wrong: this is not a tar archive",
            ));
        }
        Ok(Some(header))
    }

    /// Reads an extended header. Each takes a block at least from what there is room for.
    fn extended(&mut self, size: u64, room: &mut u64) -> Result<Vec<u8>, ArchiveError> {
        *room = room.checked_sub(size.max(BLOCK as u64)).ok_or_else(|| {
            malformed(format!(
                "a member's extended headers are larger than the limit of {EXTENDED_MAX} bytes"
            ))
        })?;
        self.expect(size)?;
        let mut bytes = Vec::new();
        let read = (&mut self.reader).take(size).read_to_end(&mut bytes)?;
        if read as u64 != size {
            return Err(malformed("the archive ends within an extended header"));
        }
        self.unread = 0;
        Ok(bytes)
    }

    fn expect(&mut self, size: u64) -> Result<(), ArchiveError> {
        let padded = size
            .checked_next_multiple_of(BLOCK as u64)
            .ok_or_else(|| malformed("a member's size is out of range"))?;
        self.unread = size;
        self.padding = padded - size;
        Ok(())
    }

    fn skip_rest(&mut self) -> Result<(), ArchiveError> {
        let rest = self.unread.saturating_add(self.padding);
        let skipped = io::copy(&mut (&mut self.reader).take(rest), &mut io::sink())?;
        if skipped != rest {
            return Err(malformed("the archive ends within a file"));
        }
        (self.unread, self.padding) = (0, 0);
        Ok(())
    }
}

struct Header([u8; BLOCK]);

impl Header {
    fn field(&self, at: usize, length: usize) -> &[u8] {
        self.0.get(at..at + length).unwrap_or_default()
    }

    fn kind(&self) -> u8 {
        self.field(156, 1).first().copied().unwrap_or_default()
    }

    /// The name, with the prefix that ustar (but not GNU, whose magic ends in a blank) has.
    fn path(&self) -> Vec<u8> {
        let name = until_nul(self.field(0, 100).to_vec());
        let prefix = until_nul(self.field(345, 155).to_vec());
        if self.field(257, 6) == b"ustar\0" && !prefix.is_empty() {
            [prefix.as_slice(), b"/", name.as_slice()].concat()
        } else {
            name
        }
    }

    /// Octal text, or (GNU) a big-endian number marked by the field's first bit.
    fn signed(&self, at: usize, length: usize) -> Result<i64, ArchiveError> {
        let field = self.field(at, length);
        let bad = || {
            malformed(format!(
                "the header field at byte {at} is not a number in range"
            ))
        };
        if let Some((first, rest)) = field.split_first().filter(|(first, _)| **first & 0x80 != 0) {
            // Six bits of value and the sign in the first byte, two's complement.
            let mut value = i128::from((first << 1) as i8 >> 1);
            for byte in rest {
                value = value
                    .checked_mul(256)
                    .and_then(|value| value.checked_add(i128::from(*byte)))
                    .ok_or_else(bad)?;
            }
            return i64::try_from(value).map_err(|_| bad());
        }
        let text = field
            .split(|byte| *byte == 0)
            .next()
            .unwrap_or_default()
            .trim_ascii();
        text.iter().try_fold(0i64, |value, digit| match digit {
            b'0'..=b'7' => value
                .checked_mul(8)
                .and_then(|value| value.checked_add(i64::from(digit - b'0')))
                .ok_or_else(bad),
            _ => Err(bad()),
        })
    }

    fn number(&self, at: usize, length: usize) -> Result<u64, ArchiveError> {
        u64::try_from(self.signed(at, length)?)
            .map_err(|_| malformed(format!("the header field at byte {at} is negative")))
    }

    fn number_u32(&self, at: usize, length: usize) -> Result<u32, ArchiveError> {
        u32::try_from(self.number(at, length)?)
            .map_err(|_| malformed(format!("the header field at byte {at} is out of range")))
    }
}

/// What extended headers say about the member after them.
#[derive(Default, PartialEq, Eq)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Extended {
    /// Reads records of the form `<length> <key>=<value>\n`, where the length counts all of it.
    fn read_pax(&mut self, mut records: &[u8]) -> Result<(), ArchiveError> {
        let bad = || malformed("an extended (PAX) header is malformed");
        while !records.is_empty() {
            let blank = records
                .iter()
                .position(|byte| *byte == b' ')
                .ok_or_else(bad)?;
            let length: usize = text_number(records.get(..blank)).ok_or_else(bad)?;
            let (record, rest) = records.split_at_checked(length).ok_or_else(bad)?;
            let record = record.get(blank + 1..).and_then(|r| r.strip_suffix(b"\n"));
            let record = record.ok_or_else(bad)?;
            let equals = record
                .iter()
                .position(|byte| *byte == b'=')
                .ok_or_else(bad)?;
            let (key, value) = record.split_at(equals);
            let value = value.get(1..).unwrap_or_default();
            self.set(key, value).ok_or_else(bad)?;
            if key.starts_with(b"GNU.sparse.") {
                return Err(malformed("sparse members are not supported in layers"));
            }
            records = rest;
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        match key {
            b"path" if !value.is_empty() => self.path = Some(value.to_vec()),
            b"linkpath" if !value.is_empty() => self.link = Some(value.to_vec()),
            b"size" if !value.is_empty() => self.size = Some(text_number(Some(value))?),
            b"uid" if !value.is_empty() => self.uid = Some(text_number(Some(value))?),
            b"gid" if !value.is_empty() => self.gid = Some(text_number(Some(value))?),
            // "If <value> is zero-length, the keyword shall be ignored" in favour of the header's.
            b"mtime" if !value.is_empty() => self.mtime = Some(time(value)?),
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
        let paths = [&self.path, &self.link];
        paths
            .iter()
            .all(|path| !path.as_ref().is_some_and(|p| p.contains(&0)))
            .then_some(())
    }
}

/// Seconds since the epoch and nanoseconds beyond, of decimal text.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let mut parts = text.splitn(2, |byte| *byte == b'.');
    let whole = parts.next()?;
    let mut seconds: i64 = text_number(Some(whole))?;
    let mut nanoseconds = 0;
    let fraction = parts.next().unwrap_or_default();
    for place in 0..9 {
        let digit = fraction.get(place).copied().unwrap_or(b'0');
        nanoseconds = nanoseconds * 10 + u32::from(digit.checked_sub(b'0').filter(|d| *d < 10)?);
    }
    if whole.starts_with(b"-") && nanoseconds > 0 {
        seconds = seconds.checked_sub(1)?;
        nanoseconds = 1_000_000_000 - nanoseconds;
    }
    Some((seconds, nanoseconds))
}

fn text_number<N: std::str::FromStr>(text: Option<&[u8]>) -> Option<N> {
    std::str::from_utf8(text?).ok()?.parse().ok()
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(nul) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(nul);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: tar::EntryType, size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(0o644);
        header.set_mtime(7);
        header
    }

    #[test]
    fn members_written_by_an_independent_writer_are_read() {
        let mut builder = tar::Builder::new(Vec::new());
        let long = format!("{}/f", "d".repeat(200));
        builder
            .append_data(&mut header(tar::EntryType::Regular, 3), &long, &b"abc"[..])
            .unwrap();
        builder
            .append_pax_extensions([("SCHILY.xattr.user.x", &b"1\n2"[..])])
            .unwrap();
        let mut big = header(tar::EntryType::Regular, 0);
        big.set_uid(3_000_000);
        builder.append_data(&mut big, "g", &b""[..]).unwrap();
        builder
            .append_link(&mut header(tar::EntryType::Symlink, 0), "l", "../../x")
            .unwrap();
        let bytes = builder.into_inner().unwrap();

        let mut archive = Archive::new(bytes.as_slice());
        let first = archive.next_member().unwrap().unwrap();
        assert_eq!(
            (first.path, first.size, first.mtime.0),
            (long.into_bytes(), 3, 7)
        );
        let mut body = [0; 8];
        assert_eq!(archive.read(&mut body).unwrap(), 3);
        assert_eq!(archive.read(&mut body).unwrap(), 0);
        let second = archive.next_member().unwrap().unwrap();
        assert_eq!(second.xattrs, [(b"user.x".to_vec(), b"1\n2".to_vec())]);
        assert_eq!(second.uid, 3_000_000);
        let third = archive.next_member().unwrap().unwrap();
        assert_eq!(third.kind, Kind::Symlink(b"../../x".to_vec()));
        assert_eq!(archive.next_member().unwrap(), None);
    }

    #[test]
    fn an_extended_header_may_not_fill_the_memory() {
        let bytes = {
            let mut header = header(tar::EntryType::GNULongName, 1 << 40);
            header.set_path("x").unwrap();
            header.set_cksum();
            header.as_bytes().to_vec()
        };
        let error = Archive::new(bytes.as_slice().chain(io::repeat(b'a'))).next_member();
        assert!(
            error
                .unwrap_err()
                .to_string()
                .contains("larger than the limit")
        );
    }

    #[test]
    fn extended_headers_of_one_member_are_bounded_together() {
        let mut builder = tar::Builder::new(Vec::new());
        let value = vec![0; 400 << 10];
        for _ in 0..3 {
            builder
                .append_pax_extensions([("SCHILY.xattr.user.x", &value[..])])
                .unwrap();
        }
        let bytes = builder.into_inner().unwrap();
        let error = Archive::new(bytes.as_slice()).next_member().unwrap_err();
        assert!(error.to_string().contains("larger than the limit"));
    }

    #[test]
    fn cut_and_scrambled_archives_are_errors() {
        let mut builder = tar::Builder::new(Vec::new());
        builder
            .append_data(
                &mut header(tar::EntryType::Regular, 600),
                "f",
                &[1u8; 600][..],
            )
            .unwrap();
        let bytes = builder.into_inner().unwrap();
        for length in [100, 512, 700, 1300] {
            let mut archive = Archive::new(&bytes[..length]);
            let mut result = archive.next_member();
            while let Ok(Some(_)) = result {
                result = archive.next_member();
            }
            assert!(result.is_err(), "{length}");
        }
        let mut scrambled = bytes;
        scrambled[3] ^= 0xff;
        assert!(Archive::new(scrambled.as_slice()).next_member().is_err());
        assert!(Archive::new(&[b'x'; 1024][..]).next_member().is_err());
    }
}

//! Extended attributes behind an inode (kernel: fs/erofs/erofs_fs.h, `erofs_xattr_ibody_header`).

use std::collections::BTreeMap;

use crate::LayoutError;

/// The header: a filter, the number of shared attributes, and nothing.
const HEADER: usize = 12;
/// The header of an attribute: length of its name, prefix, length of its value.
const ENTRY: usize = 4;
/// The longest name in Linux, with its prefix.
const NAME_MAX: usize = 255;
/// How much of a name an error shows, in bytes.
const SHOWN: usize = 64;
/// The most bytes that an inode's count can tell: each unit is four.
const MOST: usize = HEADER + 4 * (u16::MAX as usize - 1);

/// The prefixes that have a number.
const PREFIXES: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];

/// Refuses attributes that an inode cannot have, alone or together.
///
/// # Errors
/// The first of them, by its name.
pub fn check(xattrs: &BTreeMap<Vec<u8>, Vec<u8>>) -> Result<(), LayoutError> {
    encoded(xattrs).map(drop)
}

/// The bytes behind the inode; none without attributes, since a header alone is refused.
pub fn encoded(xattrs: &BTreeMap<Vec<u8>, Vec<u8>>) -> Result<Vec<u8>, LayoutError> {
    if xattrs.is_empty() {
        return Ok(Vec::new());
    }
    let mut body = vec![0; HEADER];
    for (name, value) in xattrs {
        let shown = name.get(..SHOWN).unwrap_or(name);
        let refused = || LayoutError::Xattr(shown.escape_ascii().to_string());
        if name.len() > NAME_MAX || name.contains(&0) {
            return Err(refused());
        }
        let (rest, prefix) = PREFIXES
            .iter()
            .find_map(|(prefix, number)| Some((name.strip_prefix(*prefix)?, *number)))
            .filter(|(rest, number)| rest.is_empty() == matches!(number, 2 | 3))
            .ok_or_else(refused)?;
        let length = u8::try_from(rest.len()).map_err(|_| refused())?;
        let size = u16::try_from(value.len()).map_err(|_| refused())?;
        body.extend([length, prefix]);
        body.extend(size.to_le_bytes());
        body.extend(rest);
        body.extend(value);
        body.resize(body.len().next_multiple_of(ENTRY), 0);
        if body.len() > MOST {
            return Err(refused());
        }
    }
    Ok(body)
}

/// What the inode says of a body of this many bytes (`i_xattr_icount`).
pub fn count(bytes: usize) -> u16 {
    match bytes.checked_sub(HEADER) {
        None => 0,
        Some(entries) => u16::try_from(1 + entries / 4).unwrap_or(u16::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(name: &[u8], value: &[u8]) -> Result<Vec<u8>, LayoutError> {
        encoded(&BTreeMap::from([(name.to_vec(), value.to_vec())]))
    }

    #[test]
    fn entries_are_aligned_and_counted_in_fours() {
        let body = one(b"user.abc", b"12").unwrap();
        assert_eq!(body.get(12..), Some(&b"\x03\x01\x02\x00abc12\0\0\0"[..]));
        assert_eq!(count(body.len()), 4);
        assert_eq!(count(encoded(&BTreeMap::new()).unwrap().len()), 0);
    }

    #[test]
    fn what_has_no_prefix_or_is_too_long_is_refused_by_name() {
        assert!(one(b"btrfs.compression", b"zstd").is_err());
        assert!(one(b"user.", b"").is_err());
        assert!(one(b"system.posix_acl_accessible", b"").is_err());
        assert!(one(&[b"user.".as_slice(), &[b'a'; 251]].concat(), b"").is_err());
        assert!(one(&[b"user.".as_slice(), &[b'a'; 250]].concat(), b"").is_ok());
        assert!(one(b"user.a\0trusted.b", b"").is_err());
        assert!(one(b"user.a", &vec![0; 1 << 16]).is_err());
        assert!(one(b"user.a", &vec![0; (1 << 16) - 1]).is_ok());
    }
}

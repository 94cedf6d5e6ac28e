//! Directories: blocks of entries, sorted by name (kernel: fs/erofs/erofs_fs.h, `erofs_dirent`).

use crate::{BLOCK, LayoutError};

/// An entry without its name: inode, place of the name, kind.
const ENTRY: usize = 12;
/// The longest name of a file in Linux, in bytes.
const NAME_MAX: usize = 255;

/// One entry.
pub struct Entry<'a> {
    pub name: &'a [u8],
    pub inode: u64,
    /// What it names, by the number that directories have for it.
    pub kind: u8,
}

/// Refuses what cannot be a name.
pub fn check_name(name: &[u8]) -> Result<(), LayoutError> {
    let fine = !name.is_empty()
        && name.len() <= NAME_MAX
        && name != b"."
        && name != b".."
        && !name.iter().any(|byte| matches!(byte, 0 | b'/'));
    if fine {
        return Ok(());
    }
    Err(LayoutError::Name(name.escape_ascii().to_string()))
}

/// How many bytes a directory with these names takes, `.` and `..` among them and in order. All
/// blocks but the last are full ones.
pub fn size<'a>(names: impl Iterator<Item = &'a [u8]>) -> u64 {
    let (mut full, mut used) = (0, 0);
    for name in names {
        let more = ENTRY + name.len();
        if used + more > BLOCK {
            full += BLOCK as u64;
            used = 0;
        }
        used += more;
    }
    full + used as u64
}

/// The bytes of a directory. The last name of a block ends at the block's end or at a zero.
pub fn encoded(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut all = Vec::new();
    let mut left = entries;
    while !left.is_empty() {
        let mut used = 0;
        let fitting = left
            .iter()
            .take_while(|entry| {
                used += ENTRY + entry.name.len();
                used <= BLOCK
            })
            .count();
        let (block, rest) = left.split_at(fitting);
        left = rest;
        let mut names = fitting * ENTRY;
        for entry in block {
            all.extend(entry.inode.to_le_bytes());
            // Below BLOCK, by the count of those that fit.
            all.extend((names as u16).to_le_bytes());
            all.extend([entry.kind, 0]);
            names += entry.name.len();
        }
        block.iter().for_each(|entry| all.extend(entry.name));
        if !left.is_empty() {
            all.resize(all.len().next_multiple_of(BLOCK), 0);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_is_what_is_written() {
        for count in [1, 2, 14, 15, 16, 300, 5000] {
            let names: Vec<Vec<u8>> = (0..count)
                .map(|number| format!("{number:0width$}", width = 1 + number % 255).into_bytes())
                .collect();
            let entries: Vec<Entry<'_>> = names
                .iter()
                .map(|name| Entry {
                    name,
                    inode: 7,
                    kind: 1,
                })
                .collect();
            let names = names.iter().map(Vec::as_slice);
            assert_eq!(encoded(&entries).len() as u64, size(names), "{count}");
        }
    }

    #[test]
    fn names_that_are_none_are_refused() {
        for name in [&b""[..], b".", b"..", b"a/b", b"a\0", &[b'a'; 256]] {
            assert!(check_name(name).is_err(), "{}", name.escape_ascii());
        }
        assert!(check_name(&[0xff; 255]).is_ok());
    }
}

//! The end of what a guest or a VMM wrote, as it is shown in an error.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

/// The most that goes into an error, in bytes: it has to fit a gRPC trailer.
const TAIL_BYTES: usize = 1536;
/// The most that is read of a file, in bytes.
const READ_BYTES: u64 = 64 << 10;

/// The last whole lines that fit an error, without control characters; "(nothing)" if there are
/// none.
pub fn tail(text: &str) -> String {
    let shown: String = text
        .chars()
        .filter(|c| *c == '\n' || !c.is_control())
        .collect();
    let mut start = shown.len().saturating_sub(TAIL_BYTES);
    while !shown.is_char_boundary(start) {
        start += 1;
    }
    let rest = shown.get(start..).unwrap_or_default();
    let rest = match rest.split_once('\n') {
        Some((_, whole)) if start > 0 => whole,
        _ => rest,
    };
    let rest = rest.trim();
    if rest.is_empty() {
        "(nothing)".to_owned()
    } else {
        rest.to_owned()
    }
}

/// The last 64 KiB of a file; nothing of one that cannot be read. Blocks.
pub fn end_of_file(path: &Path) -> String {
    let read = || {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(READ_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(READ_BYTES).read_to_end(&mut bytes)?;
        Ok::<_, std::io::Error>(bytes)
    };
    String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_is_whole_lines_that_can_be_shown() {
        assert_eq!(tail(""), "(nothing)");
        assert_eq!(tail("\u{1b}[1mpanic\r\n"), "[1mpanic");
        let long = format!("{}\nlast line\n", "é".repeat(TAIL_BYTES));
        assert_eq!(tail(&long), "last line");
    }

    #[test]
    fn a_files_end_is_bounded() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let bytes = [vec![b'a'; 1 << 20], b"the end".to_vec()].concat();
        std::fs::write(file.path(), bytes).unwrap();
        let end = end_of_file(file.path());
        assert_eq!(end.len() as u64, READ_BYTES);
        assert!(end.ends_with("the end"));
        assert_eq!(end_of_file(Path::new("/nonexistent/file")), "");
    }
}

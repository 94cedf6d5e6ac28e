//! Initramfs archives, for guests that are not the product's.

use anyhow::Result;

/// One file of an archive.
pub struct Entry<'a> {
    path: &'a str,
    mode: u32,
    device: (u32, u32),
    contents: &'a [u8],
}

impl<'a> Entry<'a> {
    /// A directory.
    pub fn directory(path: &'a str) -> Self {
        Self::new(path, 0o040_755, (0, 0), &[])
    }

    /// A file that can be executed.
    pub fn program(path: &'a str, contents: &'a [u8]) -> Self {
        Self::new(path, 0o100_755, (0, 0), contents)
    }

    /// A character device.
    pub fn character_device(path: &'a str, major: u32, minor: u32) -> Self {
        Self::new(path, 0o020_600, (major, minor), &[])
    }

    fn new(path: &'a str, mode: u32, device: (u32, u32), contents: &'a [u8]) -> Self {
        Self {
            path,
            mode,
            device,
            contents,
        }
    }
}

/// An archive in the format `newc` (Linux, Documentation/driver-api/early-userspace/
/// buffer-format.rst): a header of hexadecimal numbers, the name, the contents, each padded to
/// four bytes.
pub fn newc(entries: &[Entry<'_>]) -> Result<Vec<u8>> {
    let mut archive = Vec::new();
    let end = Entry::new("TRAILER!!!", 0, (0, 0), &[]);
    for (number, entry) in (1_u32..).zip(entries.iter().chain([&end])) {
        let size = u32::try_from(entry.contents.len())?;
        let name = u32::try_from(entry.path.len())? + 1;
        let (major, minor) = entry.device;
        archive.extend_from_slice(b"070701");
        // Number, mode, owner, group, links, time, size, device, device of a node, name, check.
        for field in [
            number, entry.mode, 0, 0, 1, 0, size, 0, 0, major, minor, name, 0,
        ] {
            archive.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        archive.extend_from_slice(entry.path.as_bytes());
        archive.push(0);
        pad(&mut archive);
        archive.extend_from_slice(entry.contents);
        pad(&mut archive);
    }
    Ok(archive)
}

fn pad(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(4), 0);
}

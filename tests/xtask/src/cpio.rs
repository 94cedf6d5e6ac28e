//! The `newc` form of cpio archives, which Linux unpacks as its initramfs
//! (Documentation/driver-api/early-userspace/buffer-format.rst). Written here rather than by cpio(1)
//! so that device nodes need no privilege and the same input gives the same bytes.

/// An archive being written. Entries must come after the directories they are in.
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

const REGULAR: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

impl Archive {
    /// An empty archive.
    pub fn new() -> Self {
        Self {
            bytes: Vec::new(),
            entries: 0,
        }
    }

    /// Adds a directory with the permission bits `mode`. `name` has no leading slash.
    pub fn directory(&mut self, name: &str, mode: u32) {
        self.entry(name, DIRECTORY | mode, (0, 0), &[]);
    }

    /// Adds a file with the permission bits `mode`.
    pub fn file(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entry(name, REGULAR | mode, (0, 0), content);
    }

    /// Adds a character device with the permission bits `mode`.
    pub fn character_device(&mut self, name: &str, mode: u32, major: u32, minor: u32) {
        self.entry(name, CHARACTER_DEVICE | mode, (major, minor), &[]);
    }

    /// The finished archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        let inode = self.entries;
        self.entries += 1;
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        let fields = [
            inode,
            mode,
            0, // user
            0, // group
            links,
            0, // time of change
            content.len() as u32,
            0, // device the file is on
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0, // checksum
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::Archive;

    #[test]
    fn headers_names_and_contents_are_aligned_to_four_bytes() {
        let mut archive = Archive::new();
        archive.directory("dev", 0o755);
        archive.character_device("dev/console", 0o600, 5, 1);
        archive.file("init", 0o755, b"hello");
        let bytes = archive.finish();

        assert_eq!(bytes.len() % 4, 0);
        let starts: Vec<usize> = (0..bytes.len() - 5)
            .filter(|&at| &bytes[at..at + 6] == b"070701")
            .collect();
        assert_eq!(starts.len(), 4, "three entries and the trailer");
        assert!(starts.iter().all(|at| at % 4 == 0));
        let console = &bytes[starts[1]..];
        assert_eq!(
            &console[14..22],
            b"00002180",
            "mode: character device, 0600"
        );
        assert_eq!(&console[78..94], b"0000000500000001", "major and minor");
        let init = &bytes[starts[2]..];
        assert_eq!(&init[54..62], b"00000005", "length of the content");
        assert_eq!(&init[110..115], b"init\0");
        assert_eq!(&init[116..121], b"hello");
    }
}

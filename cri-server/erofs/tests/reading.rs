//! What the kernel and the file system's own tools make of what is written. Needs root, a kernel
//! with EROFS, and erofs-utils.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_erofs::{BLOCK, Content, Device, Layout, LayoutError, Node, SMALL, Tree};
use proptest::prelude::*;

fn node(mode: u16, content: Content) -> Node {
    Node {
        mode,
        uid: 1000,
        gid: 100_000,
        mtime: 1_700_000_000,
        mtime_nanoseconds: 123_456_789,
        xattrs: BTreeMap::new(),
        content,
    }
}

/// A tree that is made name by name.
struct Builder {
    tree: Tree,
    /// The bytes of small files, one after the other, and of large ones, in blocks.
    small: Vec<u8>,
    large: Vec<u8>,
}

impl Builder {
    fn new() -> Self {
        let root = node(0o755, Content::Directory(BTreeMap::new()));
        Self {
            tree: Tree { nodes: vec![root] },
            small: Vec::new(),
            large: Vec::new(),
        }
    }

    fn add(&mut self, parent: usize, name: &[u8], node: Node) -> usize {
        self.tree.nodes.push(node);
        let id = self.tree.nodes.len() - 1;
        self.link(parent, name, id);
        id
    }

    fn link(&mut self, parent: usize, name: &[u8], id: usize) {
        let Content::Directory(entries) = &mut self.tree.nodes[parent].content else {
            panic!("no directory");
        };
        entries.insert(name.to_vec(), id);
    }

    fn directory(&mut self, parent: usize, name: &[u8]) -> usize {
        self.add(
            parent,
            name,
            node(0o1777, Content::Directory(BTreeMap::new())),
        )
    }

    fn file(&mut self, parent: usize, name: &[u8], bytes: &[u8]) -> usize {
        let content = if bytes.len() <= SMALL {
            let at = self.small.len() as u64;
            self.small.extend(bytes);
            let size = u32::try_from(bytes.len()).unwrap();
            Content::Small { at, size }
        } else {
            let block = u32::try_from(self.large.len() / BLOCK).unwrap();
            self.large.extend(bytes);
            self.large
                .resize(self.large.len().next_multiple_of(BLOCK), 0);
            let size = bytes.len() as u64;
            Content::Large { block, size }
        };
        self.add(parent, name, node(0o4711, content))
    }

    /// The disk: superblock, bodies, metadata.
    fn disk(&self) -> Vec<u8> {
        let bodies = u32::try_from(self.large.len() / BLOCK).unwrap();
        let layout = Layout::new(&self.tree).unwrap();
        let image = layout.place(1 + bodies, 1, [7; 16]).unwrap();
        let mut disk = image.superblock();
        disk.extend(&self.large);
        let mut small = |at: u64, bytes: &mut [u8]| {
            let at = usize::try_from(at).unwrap();
            bytes.copy_from_slice(&self.small[at..at + bytes.len()]);
            Ok(())
        };
        image.write(&mut disk, &mut small).unwrap();
        assert_eq!(disk.len(), image.blocks() as usize * BLOCK);
        disk
    }

    /// Checks the disk, and mounts it at `root` in the directory that is returned.
    fn mounted(&self) -> Mounted {
        let home = tempfile::tempdir().unwrap();
        let (disk, root) = (home.path().join("disk"), home.path().join("root"));
        fs::write(&disk, self.disk()).unwrap();
        run(Command::new("fsck.erofs").arg("--extract").arg(&disk));
        fs::create_dir(&root).unwrap();
        let options = ["-t", "erofs", "-o", "loop,ro"];
        run(Command::new("mount").args(options).args([&disk, &root]));
        Mounted(home)
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {words}");
}

/// A mounted file system, until dropped.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.path().join("root").join(name)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run(Command::new("umount").arg(self.0.path().join("root")));
    }
}

#[test]
fn every_kind_of_file_is_read_back() {
    let mut builder = Builder::new();
    let device = Device {
        major: 4000,
        minor: 300_000,
    };
    let directory = builder.directory(0, b"!before-the-dots");
    builder.file(directory, b"empty", b"");
    let first = builder.file(directory, b"\xff\xfe not text", b"bytes");
    builder.link(0, b"linked", first);
    builder.file(0, b"large", &vec![42; 3 * BLOCK + 1]);
    builder.file(0, b"just-small", &vec![1; SMALL]);
    builder.file(0, b"just-large", &vec![2; SMALL + 1]);
    builder.add(
        0,
        b"symlink",
        node(0o777, Content::Symlink(vec![b'x'; 4095])),
    );
    builder.add(
        0,
        b"short",
        node(0o777, Content::Symlink(b"../etc".to_vec())),
    );
    builder.add(0, b"chr", node(0o600, Content::CharacterDevice(device)));
    builder.add(0, b"blk", node(0o600, Content::BlockDevice(device)));
    builder.add(0, b"fifo", node(0o622, Content::Fifo));
    let root = builder.mounted();
    let look = |name: &str| fs::symlink_metadata(root.path(name)).unwrap();

    let directory = look("!before-the-dots");
    assert_eq!((directory.mode() & 0o7777, directory.nlink()), (0o1777, 2));
    assert_eq!((directory.uid(), directory.gid()), (1000, 100_000));
    let file = look("linked");
    assert_eq!((file.mode() & 0o7777, file.nlink()), (0o4711, 2));
    assert_eq!(
        (file.mtime(), file.mtime_nsec()),
        (1_700_000_000, 123_456_789)
    );
    assert_eq!(fs::read(root.path("linked")).unwrap(), b"bytes");
    assert_eq!(
        fs::read(root.path("large")).unwrap(),
        vec![42; 3 * BLOCK + 1]
    );
    assert_eq!(fs::read(root.path("just-small")).unwrap(), vec![1; SMALL]);
    assert_eq!(
        fs::read(root.path("just-large")).unwrap(),
        vec![2; SMALL + 1]
    );
    assert_eq!(
        fs::read_link(root.path("short")).unwrap(),
        Path::new("../etc")
    );
    assert_eq!(look("symlink").len(), 4095);
    assert_eq!(look("chr").rdev(), libc::makedev(4000, 300_000));
    assert!(look("blk").file_type().is_block_device());
    assert!(look("fifo").file_type().is_fifo());
}

#[test]
fn directories_of_any_size_keep_all_their_names() {
    let mut builder = Builder::new();
    for count in [1, 13, 16, 17, 1000, 100_000] {
        let directory = builder.directory(0, count.to_string().as_bytes());
        let file = builder.file(directory, b"first", b"x");
        for number in 1..count {
            builder.link(directory, format!("{number:0>200}").as_bytes(), file);
        }
    }
    let root = builder.mounted();
    for count in [1, 13, 16, 17, 1000, 100_000] {
        let path = root.path(count.to_string());
        assert_eq!(fs::read_dir(path).unwrap().count(), count);
    }
}

#[test]
fn what_is_no_tree_is_refused() {
    let refused = |tree: &Tree| Layout::new(tree).map(drop).unwrap_err();
    assert_eq!(refused(&Tree::default()), LayoutError::Root);
    let mut builder = Builder::new();
    builder.link(0, b"gone", 5);
    assert_eq!(refused(&builder.tree), LayoutError::Missing(5));
    let mut builder = Builder::new();
    builder.link(0, b"round", 0);
    assert_eq!(refused(&builder.tree), LayoutError::Linked(0));
    let mut builder = Builder::new();
    let directory = builder.directory(0, b"a");
    builder.link(0, b"b", directory);
    assert_eq!(refused(&builder.tree), LayoutError::Linked(directory));
    let mut builder = Builder::new();
    builder.file(0, b"..", b"");
    assert_eq!(refused(&builder.tree), LayoutError::Name("..".into()));
    let mut builder = Builder::new();
    builder.add(0, b"link", node(0, Content::Symlink(Vec::new())));
    assert_eq!(refused(&builder.tree), LayoutError::Target(0));
    let mut builder = Builder::new();
    let far = Content::Large {
        block: u32::MAX,
        size: 1,
    };
    builder.add(0, b"far", node(0, far));
    let layout = Layout::new(&builder.tree).unwrap();
    assert_eq!(
        layout.place(1, 1, [0; 16]).map(drop).unwrap_err(),
        LayoutError::TooLarge
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn trees_come_back_as_they_were(files in prop::collection::vec(
        (0_usize..8, prop::collection::vec(1_u8..=255, 1..40), 0_usize..9000, 0_usize..5000), 0..60,
    )) {
        let mut builder = Builder::new();
        let mut directories = vec![0];
        let mut expected = BTreeMap::new();
        let mut paths = vec![Vec::new()];
        for (parent, name, size, value) in files {
            let slash = name.contains(&b'/') || name == b"." || name == b"..";
            let parent = parent % directories.len();
            let path = [&paths[parent][..], b"/", &name].concat();
            if slash || expected.contains_key(&path) || paths.contains(&path) {
                continue;
            }
            let id = if size % 5 == 0 {
                let id = builder.directory(directories[parent], &name);
                directories.push(id);
                paths.push(path);
                id
            } else {
                let bytes = vec![u8::try_from(size % 256).unwrap(); size];
                let id = builder.file(directories[parent], &name, &bytes);
                expected.insert(path, (bytes, (value % 3 == 0).then_some(value)));
                id
            };
            if value % 3 == 0 {
                builder.tree.nodes[id].xattrs.insert(b"user.a".to_vec(), vec![9; value]);
            }
        }
        let root = builder.mounted();
        let place = |path: &[u8]| root.path(OsStr::from_bytes(&path[1..]));
        for (path, (bytes, attribute)) in expected {
            prop_assert_eq!(fs::read(place(&path)).unwrap(), bytes);
            let mut value = vec![0; 1 << 16];
            let size = rustix::fs::lgetxattr(place(&path), "user.a", value.as_mut_slice());
            prop_assert_eq!(size.ok(), attribute);
        }
        for path in &paths[1..] {
            prop_assert!(place(path).is_dir());
        }
    }
}

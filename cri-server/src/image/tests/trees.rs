//! Layers on top of each other.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use tar::EntryType;

use super::bed::LayerBuilder;
use crate::image::bodies::Bodies;
use crate::image::tree::{Tree, TreeError, TreeLimits};

const LIMITS: TreeLimits = TreeLimits {
    bytes: 1 << 20,
    members: 1000,
    depth: 32,
    memory: 1 << 20,
};

/// A directory with the tree mounted at `root`, until dropped.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Nothing is mounted of a tree that was refused.
        let root = self.path().join("root");
        rustix::mount::unmount(root, rustix::mount::UnmountFlags::DETACH).ok();
    }
}

fn unpack(path: &Path, layers: Vec<LayerBuilder>) -> Result<(), TreeError> {
    let (disk, root) = (path.join("disk"), path.join("root"));
    let mut bodies = Bodies::create(&disk).unwrap();
    let mut tree = Tree::new(LIMITS);
    for layer in layers {
        tree.apply(layer.tar().as_slice(), &mut bodies)?;
    }
    let length = bodies.finish(&tree.finish(), [7; 16]).unwrap();
    assert_eq!(fs::metadata(&disk).unwrap().len(), length);
    let mut mount = Command::new("mount");
    mount.args(["-t", "erofs", "-o", "loop,ro"]).arg(disk);
    let output = mount.arg(root).output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words}");
    Ok(())
}

/// Mounts what the layers make. The kernel reads it; needs root and EROFS.
fn unpacked(layers: Vec<LayerBuilder>) -> (Mounted, Result<(), TreeError>) {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("root")).unwrap();
    fs::create_dir(directory.path().join("outside")).unwrap();
    let secret = directory.path().join("outside/secret");
    fs::write(&secret, "host").unwrap();
    let result = unpack(directory.path(), layers);
    assert_eq!(names(&directory.path().join("outside")), ["secret"]);
    assert_eq!(fs::read_to_string(&secret).unwrap(), "host");
    assert_eq!(fs::metadata(&secret).unwrap().nlink(), 1);
    (Mounted(directory), result)
}

fn names(path: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_whiteout_hides_what_lower_layers_put_there() {
    let (directory, result) = unpacked(vec![
        LayerBuilder::new()
            .directory("d/")
            .file("d/a", "a")
            .file("d/b", "b")
            .file("f", "f"),
        LayerBuilder::new()
            .whiteout("d/.wh.a")
            .whiteout(".wh.f")
            .whiteout("x/.wh.none"),
    ]);
    result.unwrap();
    assert_eq!(names(&directory.path().join("root")), ["d"]);
    assert_eq!(names(&directory.path().join("root/d")), ["b"]);
}

#[test]
fn an_opaque_directory_keeps_what_its_own_layer_put_there_before_and_after() {
    let (directory, result) = unpacked(vec![
        LayerBuilder::new()
            .directory("d/")
            .file("d/a", "a")
            .directory("d/s/")
            .file("d/s/x", "x"),
        LayerBuilder::new()
            .directory("d/")
            .file("d/before", "1")
            .whiteout("d/.wh..wh..opq")
            .file("d/s/after", "2"),
    ]);
    result.unwrap();
    assert_eq!(names(&directory.path().join("root/d")), ["before", "s"]);
    assert_eq!(names(&directory.path().join("root/d/s")), ["after"]);
}

#[test]
fn a_whiteout_spares_its_own_layers_entry_of_the_same_name() {
    let (directory, result) = unpacked(vec![
        LayerBuilder::new().directory("d/").file("d/old", "old"),
        LayerBuilder::new()
            .directory("d/")
            .file("d/new", "new")
            .whiteout(".wh.d"),
    ]);
    result.unwrap();
    assert_eq!(names(&directory.path().join("root/d")), ["new"]);
}

#[test]
fn files_and_directories_replace_each_other() {
    let (directory, result) = unpacked(vec![
        LayerBuilder::new()
            .directory("d/")
            .file("d/a", "a")
            .file("f", "f")
            .symlink("l", "d"),
        LayerBuilder::new()
            .file("d", "now a file")
            .directory("f/")
            .directory("l/")
            .file("l/x", ""),
    ]);
    result.unwrap();
    let root = directory.path().join("root");
    assert_eq!(fs::read_to_string(root.join("d")).unwrap(), "now a file");
    assert!(root.join("f").is_dir());
    assert_eq!(names(&root.join("l")), ["x"]);
}

#[test]
fn hard_links_join_across_layers_and_survive_a_replaced_name() {
    let (directory, result) = unpacked(vec![
        LayerBuilder::new().file("a", "shared"),
        LayerBuilder::new()
            .hard_link("b", "a")
            .hard_link("/c", "/./a")
            .hard_link("a", "b"),
        LayerBuilder::new().file("a", "own"),
    ]);
    result.unwrap();
    let root = directory.path().join("root");
    assert_eq!(fs::read_to_string(root.join("a")).unwrap(), "own");
    assert_eq!(fs::read_to_string(root.join("c")).unwrap(), "shared");
    assert_eq!(fs::metadata(root.join("b")).unwrap().nlink(), 2);
}

#[test]
fn modes_owners_times_attributes_and_devices_survive() {
    // CAP_NET_BIND_SERVICE, permitted and effective, with a newline among the bytes.
    let capability = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\x0a\0\0\0\0\0\0\0";
    let (directory, result) = unpacked(vec![
        LayerBuilder::new()
            .member(
                "su",
                EntryType::Regular,
                0o4755,
                b"x",
                &[("uid", b"1000"), ("gid", b"2000")],
            )
            .member(
                "ping",
                EntryType::Regular,
                0o755,
                b"x",
                &[("SCHILY.xattr.security.capability", capability)],
            )
            .member(
                "dir/",
                EntryType::Directory,
                0o1777,
                b"",
                &[
                    ("SCHILY.xattr.user.k", b"v"),
                    ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
                ],
            )
            .file("dir/child", "x")
            .device("null", EntryType::Char, 1, 3)
            .device("pipe", EntryType::Fifo, 0, 0),
    ]);
    result.unwrap();
    let root = directory.path().join("root");
    let su = fs::metadata(root.join("su")).unwrap();
    assert_eq!(
        (su.mode() & 0o7777, su.uid(), su.gid()),
        (0o4755, 1000, 2000)
    );
    assert_eq!(su.mtime(), 1_000_000_000);
    let mut value = [0u8; 64];
    let length =
        rustix::fs::getxattr(root.join("ping"), "security.capability", &mut value).unwrap();
    assert_eq!(&value[..length], capability);
    let dir = fs::metadata(root.join("dir")).unwrap();
    assert_eq!((dir.mode() & 0o7777, dir.mtime()), (0o1777, 1_000_000_000));
    let length = rustix::fs::getxattr(root.join("dir"), "user.k", &mut value).unwrap();
    assert_eq!(&value[..length], b"v");
    let overlay = rustix::fs::getxattr(root.join("dir"), "trusted.overlay.opaque", &mut value);
    assert_eq!(overlay, Err(rustix::io::Errno::NODATA));
    let null = fs::metadata(root.join("null")).unwrap();
    assert!(null.file_type().is_char_device());
    assert_eq!(null.rdev(), rustix::fs::makedev(1, 3));
    assert!(
        fs::metadata(root.join("pipe"))
            .unwrap()
            .file_type()
            .is_fifo()
    );
}

#[test]
fn missing_parents_are_made_and_links_to_directories_are_followed_inside() {
    let (directory, result) = unpacked(vec![
        LayerBuilder::new()
            .directory("usr/lib/")
            .symlink("lib", "/usr/lib"),
        LayerBuilder::new().file("lib/a.so", "a").file("x/y/z", "z"),
    ]);
    result.unwrap();
    let root = directory.path().join("root");
    assert!(root.join("lib").is_symlink());
    assert_eq!(names(&root.join("usr/lib")), ["a.so"]);
    assert_eq!(fs::read_to_string(root.join("x/y/z")).unwrap(), "z");
}

#[test]
fn no_path_leads_out_of_the_tree() {
    let attempts: Vec<(&str, LayerBuilder)> = vec![
        ("dots", LayerBuilder::new().file("../outside/new", "evil")),
        (
            "inner dots",
            LayerBuilder::new()
                .directory("d/")
                .file("d/../../outside/new", "evil"),
        ),
        (
            "whiteout dots",
            LayerBuilder::new().whiteout("../outside/.wh.secret"),
        ),
        ("whiteout of ..", LayerBuilder::new().whiteout(".wh..")),
        ("whiteout of nothing", LayerBuilder::new().whiteout(".wh.")),
        (
            "link dots",
            LayerBuilder::new().hard_link("l", "../outside/secret"),
        ),
        (
            "link absolute",
            LayerBuilder::new().hard_link("l", "/outside/secret"),
        ),
        (
            "link through a link",
            LayerBuilder::new()
                .symlink("s", "../outside")
                .hard_link("l", "s/secret"),
        ),
        (
            "link to a directory",
            LayerBuilder::new().directory("d/").hard_link("l", "d"),
        ),
        (
            "loop",
            LayerBuilder::new()
                .symlink("a", "b")
                .symlink("b", "a")
                .file("a/x", ""),
        ),
        ("link to itself", LayerBuilder::new().hard_link("l", "l")),
        (
            "root as a file",
            LayerBuilder::new().symlink("/", "/outside"),
        ),
    ];
    for (name, layer) in attempts {
        let (_directory, result) = unpacked(vec![layer]);
        assert!(
            matches!(result, Err(TreeError::Refused(_))),
            "{name}: {result:?}"
        );
    }
}

#[test]
fn a_link_planted_by_one_layer_leads_the_next_nowhere_but_inside() {
    let (directory, result) = unpacked(vec![
        LayerBuilder::new()
            .directory("outside/")
            .symlink("s", "/outside"),
        LayerBuilder::new()
            .file("s/new", "inside")
            .whiteout("s/.wh.secret"),
    ]);
    result.unwrap();
    assert_eq!(names(&directory.path().join("root/outside")), ["new"]);
}

#[test]
fn writing_to_a_link_replaces_the_link() {
    let (directory, result) = unpacked(vec![
        LayerBuilder::new().symlink("l", "../outside/secret"),
        LayerBuilder::new().file("l", "a file of the image"),
    ]);
    result.unwrap();
    let link = directory.path().join("root/l");
    assert!(!link.is_symlink());
    assert_eq!(fs::read_to_string(link).unwrap(), "a file of the image");
}

#[test]
fn a_parent_that_a_link_leads_to_is_made_where_the_link_leads() {
    let (directory, result) = unpacked(vec![
        LayerBuilder::new()
            .symlink("var/run", "/run")
            .file("var/run/deeper/x", "x")
            .symlink("s", "../../outside")
            .file("s/new", "")
            .symlink("long", &format!("{}tmp", "../".repeat(20)))
            .file("long/new", ""),
    ]);
    result.unwrap();
    assert_eq!(names(&directory.path().join("root/outside")), ["new"]);
    assert_eq!(names(&directory.path().join("root/tmp")), ["new"]);
    assert_eq!(names(&directory.path().join("root/run/deeper")), ["x"]);
    assert!(directory.path().join("root/var/run").is_symlink());
}

#[test]
fn a_directory_may_be_hidden_often() {
    let (directory, result) = unpacked(vec![
        LayerBuilder::new().directory("d/").file("d/old", ""),
        LayerBuilder::new()
            .whiteout(".wh.d")
            .file("d/one", "")
            .whiteout("d/.wh..wh..opq")
            .file("d/two", "")
            .whiteout(".wh.d"),
    ]);
    result.unwrap();
    assert_eq!(names(&directory.path().join("root/d")), ["one", "two"]);
}

#[test]
fn an_acl_refines_the_mode() {
    // The owner all, a user by number all, the group and others nothing, masked to reading.
    let named = b"\x02\0\0\0\x01\0\x07\0\xff\xff\xff\xff\x02\0\x07\0\xe8\x03\0\0\
        \x04\0\0\0\xff\xff\xff\xff\x10\0\x04\0\xff\xff\xff\xff\x20\0\0\0\xff\xff\xff\xff";
    let acl = [("SCHILY.xattr.system.posix_acl_access", &named[..])];
    let layer = LayerBuilder::new().member("f", EntryType::Regular, 0o4777, b"", &acl);
    let (directory, result) = unpacked(vec![layer]);
    result.unwrap();
    let file = directory.path().join("root/f");
    assert_eq!(fs::metadata(&file).unwrap().mode() & 0o7777, 0o4740);
    let mut value = [0; 64];
    let length = rustix::fs::getxattr(&file, "system.posix_acl_access", &mut value).unwrap();
    assert_eq!(&value[..length], named);
}

#[test]
fn times_are_kept_to_the_nanosecond() {
    let time = [("mtime", &b"-1.25"[..])];
    let layer = LayerBuilder::new().member("f", EntryType::Regular, 0o644, b"", &time);
    let (directory, result) = unpacked(vec![layer]);
    result.unwrap();
    let file = fs::metadata(directory.path().join("root/f")).unwrap();
    assert_eq!((file.mtime(), file.mtime_nsec()), (-2, 750_000_000));
}

#[test]
fn attributes_the_kernel_would_not_take_are_refused() {
    for (name, value) in [
        ("user.a\0trusted.overlay.opaque", &b"y"[..]),
        ("user.", b""),
        ("security.capability", b"\x01\0\0\x02"),
        (
            "system.posix_acl_access",
            b"\x02\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff",
        ),
        ("system.posix_acl_default", b"\x02\0\0\0"),
    ] {
        let key = format!("SCHILY.xattr.{name}");
        let attributes = [(&*key, value)];
        let layer = LayerBuilder::new().member("f", EntryType::Regular, 0o644, b"", &attributes);
        let (_directory, result) = unpacked(vec![layer]);
        assert!(
            matches!(result, Err(TreeError::Refused(_))),
            "{name}: {result:?}"
        );
    }
}

#[test]
fn bombs_are_stopped_at_the_limits() {
    let big = "x".repeat(600 << 10);
    let many = (0..1001).fold(LayerBuilder::new(), |layer, n| {
        layer.file(&format!("f{n}"), "")
    });
    let deep = LayerBuilder::new().directory(&"d/".repeat(33));
    // Deep by way of links, where no single path is long.
    let mut links = LayerBuilder::new();
    for n in 0..4 {
        let down = "d/".repeat(10);
        links = links.directory(&format!("s{n}/{down}")).symlink(
            &format!("s{}", n + 1),
            &format!("s{n}/{}", down.trim_end_matches('/')),
        );
    }
    let implied = (0..60).fold(LayerBuilder::new(), |layer, n| {
        layer.file(&format!("{n}/{}f", "a/".repeat(20)), "")
    });
    let value = [0; 60_000];
    let attributes = (0..20).fold(LayerBuilder::new(), |layer, n| {
        let attributes = [("SCHILY.xattr.user.a", &value[..])];
        layer.member(
            &format!("f{n}"),
            EntryType::Regular,
            0o644,
            b"",
            &attributes,
        )
    });
    for (name, layers) in [
        (
            "bytes",
            vec![
                LayerBuilder::new().file("a", &big),
                LayerBuilder::new().file("b", &big),
            ],
        ),
        ("members", vec![many]),
        ("depth", vec![deep]),
        ("depth by links", vec![links]),
        ("directories nobody names", vec![implied]),
        ("attributes", vec![attributes]),
    ] {
        let (_directory, result) = unpacked(layers);
        assert!(
            matches!(result, Err(TreeError::TooLarge(_))),
            "{name}: {result:?}"
        );
    }
}

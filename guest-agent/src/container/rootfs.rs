//! A container's file tree: the image below, its own changes above, mounts, and what it may not
//! see or write. All of it is made in the container's own mount namespace, so that nothing of it
//! is left when the last process ends.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::mount::UnmountFlags;

use crate::container::device;
use crate::container::plan::{Mounting, Source, Tree};
use crate::mount::{self, Attributes, Missing, NO_DEV, NO_EXEC, NO_SUID, READ_ONLY, Root};

/// Why a tree cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}: {source}")]
pub struct TreeError {
    what: String,
    source: io::Error,
}

fn cannot<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> TreeError {
    let what = what.into();
    move |source| TreeError {
        what,
        source: source.into(),
    }
}

/// Where the tree is put together in the new mount namespace.
const PLACE: &str = "/run/bulkhead/root";

/// Where the container's device nodes are made in the new mount namespace.
const NODES: &str = "/run/bulkhead/nodes";

/// (name, target) of the links every /dev has.
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Where an image is mounted with the ids of a user namespace.
const MAPPED: &str = "/run/bulkhead/image";

/// Makes the tree and makes it this process's root. `users` is the user namespace whose ids the
/// image's files have; what is made besides is this process's.
pub fn enter(tree: &Tree, directory: &str, users: Option<BorrowedFd<'_>>) -> Result<(), TreeError> {
    mount::make_private().map_err(cannot("leave the guest's mounts"))?;
    device::make_nodes(NODES, &tree.devices).map_err(cannot("make device nodes"))?;
    let lower = match users {
        Some(users) => {
            map_image(&tree.lower, users)
                .map_err(cannot("mount the image with the pod's user ids"))?;
            MAPPED
        }
        None => &tree.lower,
    };
    let overlay = overlay(lower, &tree.scratch)?;
    // The devices' nodes must be reachable until they are bound, so the old root stays until the
    // tree is done.
    fs::create_dir_all(PLACE).map_err(cannot("make the root's mount point"))?;
    let place = rustix::fs::open(PLACE, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(cannot("open the root's mount point"))?;
    mount::attach(overlay.as_fd(), place.as_fd()).map_err(cannot("mount the root"))?;
    let root = rustix::fs::open(PLACE, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(cannot("open the root"))?;
    let root = Root::new(root);
    for mounting in &tree.mounts {
        place_mount(&root, mounting).map_err(cannot(format!("mount {}", mounting.target)))?;
    }
    for (at, node) in tree.devices.iter().enumerate() {
        root.find_or_make(&node.path, Missing::File)
            .and_then(|place| bind_node(&at.to_string(), place.as_fd()))
            .map_err(cannot(format!("make the device {}", node.path)))?;
    }
    for path in &tree.frozen {
        freeze(&root, path).map_err(cannot(format!("make {path} read-only")))?;
    }
    for path in &tree.masked {
        mask(&root, path).map_err(cannot(format!("mask {path}")))?;
    }
    root.find_or_make(directory, Missing::Directory)
        .map_err(cannot(format!("make the working directory {directory}")))?;
    if tree.read_only {
        let read_only = Attributes {
            set: READ_ONLY,
            clear: 0,
        };
        mount::change(root.directory(), read_only, false)
            .map_err(cannot("make the root read-only"))?;
    }
    pivot(&root).map_err(cannot("change the root"))
}

fn map_image(lower: &str, users: BorrowedFd<'_>) -> io::Result<()> {
    let image = mount::bind(lower, false)?;
    crate::sys::map_mount_ids(image.as_fd(), users)?;
    fs::create_dir_all(MAPPED)?;
    let place = rustix::fs::open(MAPPED, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    mount::attach(image.as_fd(), place.as_fd())
}

fn overlay(lower: &str, scratch: &str) -> Result<OwnedFd, TreeError> {
    for name in ["upper", "work"] {
        let path = format!("{scratch}/{name}");
        fs::create_dir_all(&path).map_err(cannot(format!("make {path}")))?;
    }
    // The root directory itself looks as the image's.
    let upper = format!("{scratch}/upper");
    copy_owner(Path::new(lower), Path::new(&upper))
        .map_err(cannot(format!("take the owner of {lower}")))?;
    let options = [
        format!("lowerdir={lower}"),
        format!("upperdir={upper}"),
        format!("workdir={scratch}/work"),
    ];
    mount::file_system("overlay", Some("overlay"), &options, NO_DEV)
        .map_err(cannot("lay the container's changes over its image"))
}

fn copy_owner(from: &Path, to: &Path) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    let metadata = fs::metadata(from)?;
    std::os::unix::fs::chown(to, Some(metadata.uid()), Some(metadata.gid()))?;
    fs::set_permissions(to, metadata.permissions())
}

fn place_mount(root: &Root, mounting: &Mounting) -> io::Result<()> {
    let options = &mounting.options;
    match &mounting.source {
        Source::Devices => devices(root, mounting),
        Source::FileSystem { kind, source } => {
            // A kernel's file system elsewhere than where it is looked for would leave its masks and
            // read-only paths behind. Files in memory may be where the image says.
            let target = match kind.as_str() {
                "tmpfs" => root.find_or_make(&mounting.target, Missing::Directory)?,
                _ => root.find_or_make_plain(&mounting.target)?,
            };
            let made = mount::file_system(kind, Some(source), &options.data, 0)?;
            mount::change(made.as_fd(), options.attributes, false)?;
            mount::attach(made.as_fd(), target.as_fd())
        }
        Source::Bind { path, recursive } => {
            let kind = if fs::metadata(path)?.is_dir() {
                Missing::Directory
            } else {
                Missing::File
            };
            let target = root.find_or_make(&mounting.target, kind)?;
            let copy = mount::bind(path, *recursive)?;
            mount::change(copy.as_fd(), options.recursive, true)?;
            mount::change(copy.as_fd(), options.attributes, false)?;
            mount::attach(copy.as_fd(), target.as_fd())
        }
    }
}

/// A /dev on which nobody can open nodes but the few that are bound into it.
fn devices(root: &Root, mounting: &Mounting) -> io::Result<()> {
    let target = root.find_or_make_plain(&mounting.target)?;
    let made = mount::file_system("tmpfs", Some("tmpfs"), &mounting.options.data, 0)?;
    let mut attributes = mounting.options.attributes;
    let all = attributes.set & NO_DEV == 0;
    attributes.set |= NO_SUID;
    // A read-only /dev is made so after it is filled.
    let read_only = attributes.set & READ_ONLY;
    attributes.set &= !READ_ONLY;
    mount::change(made.as_fd(), attributes, false)?;
    mount::attach(made.as_fd(), target.as_fd())?;
    let inside = Root::new(root.find(&mounting.target)?);
    for (name, ..) in device::DEFAULT {
        let place = inside.find_or_make(name, Missing::File)?;
        bind_node(name, place.as_fd())?;
    }
    for (name, target) in LINKS {
        rustix::fs::symlinkat(target, inside.directory(), name)?;
    }
    for name in ["pts", "shm", "mqueue"] {
        inside.find_or_make(name, Missing::Directory)?;
    }
    if all {
        device::copy_all(inside.directory())?;
    }
    let frozen = Attributes {
        set: read_only,
        clear: 0,
    };
    mount::change(inside.directory(), frozen, false)
}

/// Puts a node of [`NODES`] into place.
fn bind_node(name: &str, place: BorrowedFd<'_>) -> io::Result<()> {
    let copy = mount::bind(&format!("{NODES}/{name}"), false)?;
    let quiet = Attributes {
        set: NO_EXEC | NO_SUID,
        clear: 0,
    };
    mount::change(copy.as_fd(), quiet, false)?;
    mount::attach(copy.as_fd(), place)
}

/// config-linux.md "Readonly Paths". What is not there needs no protection.
fn freeze(root: &Root, path: &str) -> io::Result<()> {
    let target = match root.find(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found?,
    };
    below_root(root, target.as_fd())?;
    let copy = mount::bind_descriptor(target.as_fd(), true)?;
    let read_only = Attributes {
        set: READ_ONLY,
        clear: 0,
    };
    mount::change(copy.as_fd(), read_only, true)?;
    mount::attach(copy.as_fd(), target.as_fd())
}

/// config-linux.md "Masked Paths": an empty directory over a directory, /dev/null over the rest.
fn mask(root: &Root, path: &str) -> io::Result<()> {
    let target = match root.find(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found?,
    };
    below_root(root, target.as_fd())?;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&target)?.st_mode);
    let cover = if kind == FileType::Directory {
        let options = [
            "size=0".to_owned(),
            "nr_inodes=2".to_owned(),
            "mode=0555".to_owned(),
        ];
        mount::file_system(
            "tmpfs",
            None,
            &options,
            NO_DEV | NO_SUID | NO_EXEC | READ_ONLY,
        )?
    } else {
        // The container's own: nothing it does to it reaches another. The read-only mount keeps its
        // mode, and a device can be written to all the same.
        let null = mount::bind(&format!("{NODES}/null"), false)?;
        let quiet = Attributes {
            set: NO_EXEC | NO_SUID | READ_ONLY,
            clear: 0,
        };
        mount::change(null.as_fd(), quiet, false)?;
        null
    };
    mount::attach(cover.as_fd(), target.as_fd())
}

/// A mount over the root is above the root that processes have, and covers nothing.
fn below_root(root: &Root, target: BorrowedFd<'_>) -> io::Result<()> {
    let (root, target) = (
        rustix::fs::fstat(root.directory())?,
        rustix::fs::fstat(target)?,
    );
    match (root.st_dev, root.st_ino) == (target.st_dev, target.st_ino) {
        true => Err(io::Error::other("it leads to the root itself")),
        false => Ok(()),
    }
}

/// pivot_root(2) with the old root stacked on the new one for a moment, which needs no directory
/// in the image.
fn pivot(root: &Root) -> io::Result<()> {
    rustix::process::fchdir(root.directory())?;
    rustix::process::pivot_root(".", ".")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    Ok(rustix::process::chdir("/")?)
}

/// Leaves for an empty root, in a mount namespace of the caller's own.
pub fn leave() -> Result<(), TreeError> {
    mount::make_private().map_err(cannot("leave the guest's mounts"))?;
    let options = [
        "size=0".to_owned(),
        "nr_inodes=2".to_owned(),
        "mode=0555".to_owned(),
    ];
    let attributes = NO_DEV | NO_SUID | NO_EXEC | READ_ONLY;
    fs::create_dir_all(PLACE).map_err(cannot("make the root's mount point"))?;
    mount::file_system_at(PLACE, "tmpfs", None, &options, attributes)
        .map_err(cannot("mount an empty root"))?;
    let root = rustix::fs::open(PLACE, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(cannot("open the root"))?;
    pivot(&Root::new(root)).map_err(cannot("change the root"))
}

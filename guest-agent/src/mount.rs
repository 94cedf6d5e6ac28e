//! File systems and bind mounts through the descriptor-based mount API: a mount is made without
//! a place, and put into place on a descriptor, so no path is walked twice.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags,
};

use crate::sys;

/// Mount attributes, the `MOUNT_ATTR_*` of linux/mount.h, to set and to clear.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Attributes {
    /// Bits to set.
    pub set: u64,
    /// Bits to clear; the access-time bits are cleared as one when one of them is set.
    pub clear: u64,
}

/// No writing through this mount.
pub const READ_ONLY: u64 = 0x1;
/// No set-user-id bits or file capabilities.
pub const NO_SUID: u64 = 0x2;
/// No device nodes.
pub const NO_DEV: u64 = 0x4;
/// No programs.
pub const NO_EXEC: u64 = 0x8;

/// Makes a file system. `options` are keys, with or without `=value`; the kernel names the one
/// it refuses only in its log, so the error names the option.
pub fn file_system(
    kind: &str,
    source: Option<&str>,
    options: &[String],
    attributes: u64,
) -> io::Result<OwnedFd> {
    let context = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(|error| about(error, &format!("file system {kind}")))?;
    if let Some(source) = source {
        rustix::mount::fsconfig_set_string(&context, "source", source)?;
    }
    if attributes & READ_ONLY != 0 {
        // The file system too, not only this mount of it: else its disk is opened to write.
        rustix::mount::fsconfig_set_flag(&context, "ro")?;
    }
    for option in options {
        match option.split_once('=') {
            Some((key, value)) => rustix::mount::fsconfig_set_string(&context, key, value),
            None => rustix::mount::fsconfig_set_flag(&context, option.as_str()),
        }
        .map_err(|error| about(error, &format!("{kind} option {option:?}")))?;
    }
    if let Err(error) = rustix::mount::fsconfig_create(&context) {
        let words = words(&context);
        return Err(about(error, &format!("file system {kind}{words}")));
    }
    let attributes = MountAttrFlags::from_bits_retain(attributes as u32);
    Ok(rustix::mount::fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        attributes,
    )?)
}

/// What the kernel said about a failure, if anything: lines such as "e overlay: …".
fn words(context: &OwnedFd) -> String {
    let mut line = [0; 512];
    match rustix::io::read(context, &mut line) {
        Ok(length) => {
            let line = String::from_utf8_lossy(line.get(..length).unwrap_or_default());
            format!(" ({})", line.trim_start_matches("e ").trim())
        }
        Err(_) => String::new(),
    }
}

fn about(error: rustix::io::Errno, what: &str) -> io::Error {
    let error = io::Error::from(error);
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

/// A copy of the mount at `path` (the part of it from `path` on), with those below when
/// `recursive`.
pub fn bind(path: &str, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    Ok(rustix::mount::open_tree(CWD, path, flags)?)
}

/// As [`bind`], of what a descriptor names.
pub fn bind_descriptor(place: BorrowedFd<'_>, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    Ok(rustix::mount::open_tree(place, "", flags)?)
}

/// Changes a mount's attributes, with those below when `recursive`.
pub fn change(mount: BorrowedFd<'_>, attributes: Attributes, recursive: bool) -> io::Result<()> {
    if attributes == Attributes::default() {
        return Ok(());
    }
    sys::set_mount_attributes(mount, recursive, attributes.set, attributes.clear, 0)
}

/// Puts a mount into place.
pub fn attach(mount: BorrowedFd<'_>, place: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::mount::move_mount(
        mount,
        "",
        place,
        "",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
    )?)
}

/// Makes a file system at a path of the agent's own.
pub fn file_system_at(
    place: &str,
    kind: &str,
    source: Option<&str>,
    options: &[String],
    attributes: u64,
) -> io::Result<()> {
    let mount = file_system(kind, source, options, attributes)?;
    let place = rustix::fs::open(place, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    attach(mount.as_fd(), place.as_fd())
}

/// Detaches the mount at a path of the agent's own.
pub fn detach(place: &str) -> io::Result<()> {
    Ok(rustix::mount::unmount(place, UnmountFlags::DETACH)?)
}

/// Unmounts what is at a path of the agent's own, failing when it is in use.
pub fn unmount(place: &str) -> io::Result<()> {
    Ok(rustix::mount::unmount(place, UnmountFlags::NOFOLLOW)?)
}

/// Keeps the mounts of this namespace from reaching any other.
pub fn make_private() -> io::Result<()> {
    Ok(rustix::mount::mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )?)
}

/// A directory tree in which every path resolves inside, whatever symbolic links it holds.
#[derive(Debug)]
pub struct Root {
    directory: OwnedFd,
}

/// What to make at the end of a path when nothing is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// A directory.
    Directory,
    /// An empty file.
    File,
}

/// Most components of a path in a container: what PATH_MAX allows anyway.
const MOST_COMPONENTS: usize = 256;
/// How often a path is resolved anew that others disturb.
const MOST_TRIES: usize = 1000;

impl Root {
    /// Takes the directory.
    pub fn new(directory: OwnedFd) -> Self {
        Self { directory }
    }

    /// The directory itself.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Opens a path, `O_PATH`, following links inside the root.
    pub fn find(&self, path: &str) -> io::Result<OwnedFd> {
        self.open(path, OFlags::PATH)
    }

    /// Opens a path, following links inside the root.
    pub fn open(&self, path: &str, flags: OFlags) -> io::Result<OwnedFd> {
        let path = if path.is_empty() { "." } else { path };
        Ok(self.resolve(path, flags, ResolveFlags::NO_MAGICLINKS)?)
    }

    /// openat2(2) inside the root. It answers EAGAIN where anything on this machine was renamed or
    /// mounted just while a `..` was resolved, and the caller is to try again; a container that
    /// renames all the time shall not keep others waiting for ever.
    fn resolve(&self, path: &str, flags: OFlags, how: ResolveFlags) -> Result<OwnedFd, Errno> {
        let how = how | ResolveFlags::IN_ROOT;
        let flags = flags | OFlags::CLOEXEC;
        let open = || rustix::fs::openat2(&self.directory, path, flags, Mode::empty(), how);
        for _ in 0..MOST_TRIES {
            match open() {
                Err(Errno::AGAIN) => std::thread::yield_now(),
                done => return done,
            }
        }
        open()
    }

    /// As [`Root::find`], making what is missing: directories with mode 0755 on the way.
    ///
    /// Each step opens what stands there before the next is made in it, so that a link on the
    /// way is followed inside the root.
    pub fn find_or_make(&self, path: &str, missing: Missing) -> io::Result<OwnedFd> {
        match self.find(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            done => return done,
        }
        let names: Vec<&str> = path
            .split('/')
            .filter(|name| !name.is_empty() && *name != ".")
            .collect();
        if names.len() > MOST_COMPONENTS || names.contains(&"..") {
            return Err(io::Error::other("the path holds \"..\" or too many parts"));
        }
        let mut walked = String::new();
        let mut at = self.find("")?;
        for (step, name) in names.iter().enumerate() {
            walked.push('/');
            walked.push_str(name);
            at = match self.find(&walked) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    let last = step + 1 == names.len();
                    make(at.as_fd(), name, last.then_some(missing))?;
                    self.find(&walked)?
                }
                found => found?,
            };
        }
        Ok(at)
    }

    /// As [`Root::find_or_make`] of a directory to which no symbolic link leads.
    pub fn find_or_make_plain(&self, path: &str) -> io::Result<OwnedFd> {
        let find = || {
            let flags = OFlags::PATH | OFlags::DIRECTORY;
            self.resolve(path, flags, ResolveFlags::NO_SYMLINKS)
        };
        let found = match find() {
            Err(Errno::NOENT) => {
                self.find_or_make(path, Missing::Directory)?;
                find()
            }
            found => found,
        };
        found.map_err(|error| match error {
            Errno::LOOP => io::Error::other("a symbolic link of the image stands on the way"),
            error => error.into(),
        })
    }
}

fn make(directory: BorrowedFd<'_>, name: &str, missing: Option<Missing>) -> io::Result<()> {
    let name = CString::new(name).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let made = match missing {
        Some(Missing::File) => rustix::fs::openat(
            directory,
            &name,
            OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::from_raw_mode(0o644),
        )
        .map(drop),
        _ => rustix::fs::mkdirat(directory, &name, Mode::from_raw_mode(0o755)),
    };
    match made {
        // A dangling link: what it points to is not made, as a container could aim it anywhere.
        Err(rustix::io::Errno::EXIST) => Err(io::Error::other(
            "a symbolic link to nothing stands on the way",
        )),
        made => Ok(made?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn root(directory: &std::path::Path) -> Root {
        Root::new(rustix::fs::open(directory, OFlags::PATH, Mode::empty()).unwrap())
    }

    #[test]
    fn links_of_the_image_resolve_inside_the_root() {
        let home = tempfile::tempdir().unwrap();
        let inside = home.path().join("root");
        std::fs::create_dir_all(inside.join("etc")).unwrap();
        symlink("/", inside.join("up")).unwrap();
        symlink("../../../../etc", inside.join("away")).unwrap();
        let root = root(&inside);
        root.find_or_make("/up/a/b", Missing::Directory).unwrap();
        assert!(inside.join("a/b").is_dir());
        root.find_or_make("/away/made", Missing::File).unwrap();
        assert!(inside.join("etc/made").is_file());
    }

    #[test]
    fn a_plain_directory_has_no_link_on_its_way() {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join("there")).unwrap();
        symlink("/", home.path().join("proc")).unwrap();
        let root = root(home.path());
        for path in ["/proc", "/proc/there"] {
            let refusal = root.find_or_make_plain(path).unwrap_err().to_string();
            assert!(refusal.contains("symbolic link"), "{refusal}");
        }
        root.find_or_make_plain("/there/made").unwrap();
        assert!(home.path().join("there/made").is_dir());
    }

    /// A container that shares a directory with the one being made moves things about in it.
    #[test]
    fn an_exchange_while_a_path_is_made_does_not_lead_outside() {
        use std::sync::atomic::{AtomicBool, Ordering};
        let home = tempfile::tempdir().unwrap();
        let inside = home.path().join("root");
        let outside = home.path().join("outside");
        std::fs::create_dir_all(inside.join("shared/a")).unwrap();
        std::fs::create_dir(&outside).unwrap();
        symlink(&outside, inside.join("shared/b")).unwrap();
        let shared = rustix::fs::open(inside.join("shared"), OFlags::PATH, Mode::empty()).unwrap();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let exchange = rustix::fs::RenameFlags::EXCHANGE;
                    rustix::fs::renameat_with(&shared, "a", &shared, "b", exchange).unwrap();
                }
            });
            let root = root(&inside);
            let made = (0..2000).filter(|number| {
                let path = format!("/shared/a/{number}/file");
                root.find_or_make(&path, Missing::File).is_ok()
            });
            assert!(made.count() > 0);
            over.store(true, Ordering::Relaxed);
        });
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
    }

    #[test]
    fn nothing_is_made_through_a_dangling_link() {
        let home = tempfile::tempdir().unwrap();
        symlink("/nowhere/at/all", home.path().join("link")).unwrap();
        let root = root(home.path());
        assert!(root.find_or_make("/link", Missing::File).is_err());
        assert!(root.find_or_make("/link/x", Missing::Directory).is_err());
        assert!(root.find_or_make("/a/../b", Missing::Directory).is_err());
        assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 1);
    }
}

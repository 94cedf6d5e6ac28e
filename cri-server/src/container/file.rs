//! Small files that go into a container by copy, and back when it has ended.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use bulkhead_agent_api::v1::File;
use bulkhead_agent_api::v1::left_out::Reason;
use serde::{Deserialize, Serialize};

use super::mount::HostFile;
use super::users;
use crate::image::Digest;

/// The largest file that is copied, in bytes (Kubernetes' bound for a Secret or ConfigMap).
const LARGEST: u64 = 1 << 20;
/// The largest file that comes back, in bytes. The kubelet reads 4096 of a termination message.
const LARGEST_BACK: usize = 64 << 10;

/// Why a mount cannot be copied.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The host's file cannot be read.
    #[error("The mount {host_path} at {container_path} cannot be read: {source}")]
    Read {
        /// The host's side.
        host_path: String,
        /// The container's side.
        container_path: String,
        /// The system's error.
        source: std::io::Error,
    },
    /// The mount is something that copying does not do justice to.
    #[error(
        "The mount {host_path} at {container_path} is not supported: {reason}; only regular \
         files of up to 1 MiB can be mounted"
    )]
    Unsupported {
        /// The host's side.
        host_path: String,
        /// The container's side.
        container_path: String,
        /// What it is.
        reason: &'static str,
    },
    /// What the container has written stays in the guest.
    #[error("What was written to {container_path} does not come back to {host_path}: {reason}")]
    Back {
        /// The host's side.
        host_path: String,
        /// The container's side.
        container_path: String,
        /// What stands against it.
        reason: String,
    },
}

/// A file of the host that a container may write, as it was when it was copied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copied {
    /// Where it is on the host.
    pub host_path: String,
    /// Where the container sees it.
    pub container_path: String,
    /// Number of its device.
    device: u64,
    /// Number of its inode.
    inode: u64,
    /// Of what was in it.
    content: Digest,
}

/// Reads a file of the host; with what it is, if it may be written. Blocks.
pub fn read(file: &HostFile) -> Result<(File, Option<Copied>), FileError> {
    let failed = |source| FileError::Read {
        host_path: file.host_path.clone(),
        container_path: file.container_path.clone(),
        source,
    };
    let unsupported = |reason| FileError::Unsupported {
        host_path: file.host_path.clone(),
        container_path: file.container_path.clone(),
        reason,
    };
    // Opening a FIFO or a device must neither wait nor do anything.
    let nonblock = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOCTTY;
    let open = OpenOptions::new()
        .read(true)
        .custom_flags(nonblock.bits().cast_signed())
        .open(Path::new(&file.host_path));
    let host = match open {
        // A socket.
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NXIO.raw_os_error()) => {
            return Err(unsupported(
                "it is a socket, which cannot cross into a guest",
            ));
        }
        other => other.map_err(failed)?,
    };
    let metadata = host.metadata().map_err(failed)?;
    if metadata.is_dir() {
        return Err(unsupported("it is a directory"));
    }
    if !metadata.is_file() {
        return Err(unsupported("it is not a regular file"));
    }
    let mut content = Vec::new();
    host.take(LARGEST + 1)
        .read_to_end(&mut content)
        .map_err(failed)?;
    if content.len() as u64 > LARGEST {
        return Err(unsupported("it is larger"));
    }
    let copied = Copied {
        host_path: file.host_path.clone(),
        container_path: file.container_path.clone(),
        device: metadata.dev(),
        inode: metadata.ino(),
        content: Digest::of(&content),
    };
    let file = File {
        path: file.container_path.clone(),
        content,
        mode: metadata.mode() & 0o777,
        read_only: file.read_only,
        uid: Some(users::outside(&file.ids.0, metadata.uid())),
        gid: Some(users::outside(&file.ids.1, metadata.gid())),
    };
    let copied = (!file.read_only).then_some(copied);
    Ok((file, copied))
}

/// Those of `copies`, one for each of `files`, that no later file covers at its path: what is
/// written there belongs to the last one.
pub fn seen(files: &[File], copies: Vec<Option<Copied>>) -> Vec<Copied> {
    let covered = |at: usize, path: &str| files.iter().skip(at + 1).any(|file| file.path == path);
    let copies = copies.into_iter().enumerate();
    copies
        .filter_map(|(at, copied)| copied.filter(|copied| !covered(at, &copied.container_path)))
        .collect()
}

/// Writes what a container has made of a file into the host's, in place, as if it had been mounted.
/// Only into the very file that was copied, and only if nobody has written it since. Blocks.
pub fn write_back(copied: &Copied, content: &[u8]) -> Result<(), FileError> {
    let fail = |reason: String| FileError::Back {
        host_path: copied.host_path.clone(),
        container_path: copied.container_path.clone(),
        reason,
    };
    let failed = |error: std::io::Error| fail(error.to_string());
    if content.len() > LARGEST_BACK {
        return Err(fail(format!("it is larger than {LARGEST_BACK} bytes")));
    }
    // Opening a FIFO or a device in its place must neither wait nor do anything.
    let flags =
        rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOCTTY;
    let host = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags.bits().cast_signed())
        .open(Path::new(&copied.host_path))
        .map_err(failed)?;
    let metadata = host.metadata().map_err(failed)?;
    if !metadata.is_file() || (metadata.dev(), metadata.ino()) != (copied.device, copied.inode) {
        return Err(fail("it is another file by now".to_owned()));
    }
    let mut present = Vec::new();
    let bounded = (&host).take(LARGEST + 1);
    { bounded }.read_to_end(&mut present).map_err(failed)?;
    // By a server that ended before it could say so.
    if present == content {
        return Ok(());
    }
    if Digest::of(&present) != copied.content {
        return Err(fail("the host has written it meanwhile".to_owned()));
    }
    host.write_all_at(content, 0).map_err(failed)?;
    host.set_len(content.len() as u64).map_err(failed)
}

/// Why the guest does not send what was written into a file, for the log.
pub fn left_out(copied: &Copied, reason: Reason) -> FileError {
    let reason = match reason {
        Reason::Large => format!("it is larger than {LARGEST_BACK} bytes"),
        Reason::Many => "the container's files that were written are too large together".into(),
        Reason::Unreadable => "the guest cannot read it; its console says why".into(),
        Reason::Unspecified => "the guest does not say why".into(),
    };
    FileError::Back {
        host_path: copied.host_path.clone(),
        container_path: copied.container_path.clone(),
        reason,
    }
}

/// `/etc/hosts` and `/etc/hostname` for a container that mounts none of its own.
pub fn identity(present: &[File], hostname: &str, addresses: &[String]) -> Vec<File> {
    let mut hosts = String::from(
        "127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n",
    );
    for address in addresses.iter().filter(|_| !hostname.is_empty()) {
        hosts.push_str(&format!("{address}\t{hostname}\n"));
    }
    let files = [
        ("/etc/hosts", hosts),
        ("/etc/hostname", format!("{hostname}\n")),
    ];
    files
        .into_iter()
        .filter(|(path, _)| present.iter().all(|file| file.path != *path))
        .map(|(path, content)| File {
            path: path.to_owned(),
            content: content.into_bytes(),
            mode: 0o644,
            ..File::default()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host_file(path: &Path) -> HostFile {
        HostFile {
            host_path: path.to_string_lossy().into_owned(),
            container_path: "/in".into(),
            read_only: true,
            ids: Default::default(),
        }
    }

    #[test]
    fn a_small_file_is_read_with_its_mode_and_owners() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hosts");
        std::fs::write(&path, "127.0.0.1 me\n").unwrap();
        let (file, copied) = read(&host_file(&path)).unwrap();
        assert_eq!(copied, None);
        assert_eq!(file.content, b"127.0.0.1 me\n");
        assert_eq!(file.path, "/in");
        assert!(file.read_only);
        let owner = std::fs::metadata(&path).unwrap();
        assert_eq!((file.uid, file.gid), (Some(owner.uid()), Some(owner.gid())));
        let range = |container_id| bulkhead_cri_api::v1::IdMapping {
            host_id: 70_000,
            container_id,
            length: 1,
        };
        let mapped = HostFile {
            ids: (vec![range(owner.uid())], vec![range(owner.gid() + 1)]),
            ..host_file(&path)
        };
        let (file, _) = read(&mapped).unwrap();
        assert_eq!((file.uid, file.gid), (Some(70_000), Some(65_534)));
    }

    #[test]
    fn what_is_no_small_file_is_refused_and_named() {
        let directory = tempfile::tempdir().unwrap();
        let refuse = |path: &Path, word: &str| {
            let refusal = read(&host_file(path)).unwrap_err().to_string();
            assert!(refusal.contains(word), "{refusal}");
            assert!(refusal.contains(&*path.to_string_lossy()), "{refusal}");
        };
        refuse(directory.path(), "directory");
        refuse(&directory.path().join("absent"), "cannot be read");
        let large = directory.path().join("large");
        std::fs::write(&large, vec![0; (LARGEST + 1) as usize]).unwrap();
        refuse(&large, "larger");
        let socket = directory.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        refuse(&socket, "socket");
    }

    #[test]
    fn a_file_that_is_covered_does_not_get_what_was_written_to_the_other() {
        let directory = tempfile::tempdir().unwrap();
        let mounted = ["a", "b"].map(|name| {
            let path = directory.path().join(name);
            std::fs::write(&path, name).unwrap();
            HostFile {
                read_only: false,
                ..host_file(&path)
            }
        });
        let (files, copies): (Vec<_>, Vec<_>) =
            mounted.iter().map(|file| read(file).unwrap()).unzip();
        let seen = seen(&files, copies);
        assert_eq!(seen.len(), 1);
        assert_eq!(seen[0].host_path, mounted[1].host_path);
    }

    #[test]
    fn what_a_container_wrote_goes_into_the_file_it_was_copied_from() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        std::fs::write(&path, "a longer text").unwrap();
        let writable = HostFile {
            read_only: false,
            ..host_file(&path)
        };
        let copied = || read(&writable).unwrap().1.unwrap();
        let before = std::fs::metadata(&path).unwrap().ino();
        let first = copied();
        write_back(&first, b"reason").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"reason");
        assert_eq!(std::fs::metadata(&path).unwrap().ino(), before);
        // Once more, as after a restart; but nothing else.
        write_back(&first, b"reason").unwrap();
        let refuse = |copied: &Copied, content: &[u8], why: &str| {
            let refusal = write_back(copied, content).unwrap_err().to_string();
            assert!(refusal.contains(why), "{refusal}");
        };
        refuse(&first, b"other", "meanwhile");
        let second = copied();
        refuse(&second, &vec![0; LARGEST_BACK + 1], "larger");
        let aside = directory.path().join("aside");
        std::fs::rename(&path, &aside).unwrap();
        refuse(&second, b"x", "No such file");
        std::fs::write(&path, "reason").unwrap();
        refuse(&second, b"x", "another file");
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&aside, &path).unwrap();
        refuse(&second, b"x", "symbolic links");
        assert_eq!(std::fs::read(&aside).unwrap(), b"reason");
    }

    #[test]
    fn the_identity_files_give_way_to_mounts() {
        let mounted = File {
            path: "/etc/hosts".into(),
            ..Default::default()
        };
        let files = identity(&[mounted], "web", &["10.0.0.2".into()]);
        assert_eq!(files.len(), 1);
        assert_eq!(files[0].content, b"web\n");
        let files = identity(&[], "web", &["10.0.0.2".into()]);
        let hosts = String::from_utf8(files[0].content.clone()).unwrap();
        assert!(hosts.ends_with("10.0.0.2\tweb\n"), "{hosts}");
    }
}

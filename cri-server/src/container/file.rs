//! Small files that go into a container by copy.

use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use bulkhead_agent_api::v1::File;

use super::mount::HostFile;

/// The largest file that is copied, in bytes (Kubernetes' bound for a Secret or ConfigMap).
const LARGEST: u64 = 1 << 20;

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
}

/// Reads a file of the host. Blocks.
pub fn read(file: &HostFile) -> Result<File, FileError> {
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
    let open = std::fs::OpenOptions::new()
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
    Ok(File {
        path: file.container_path.clone(),
        content,
        mode: metadata.mode() & 0o777,
        read_only: file.read_only,
    })
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
            read_only: false,
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
        }
    }

    #[test]
    fn a_small_file_is_read_with_its_mode() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hosts");
        std::fs::write(&path, "127.0.0.1 me\n").unwrap();
        let file = read(&host_file(&path)).unwrap();
        assert_eq!(file.content, b"127.0.0.1 me\n");
        assert_eq!(file.path, "/in");
        assert!(file.read_only);
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

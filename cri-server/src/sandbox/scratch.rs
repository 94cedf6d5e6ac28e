//! The disk that a pod's containers write to: a sparse ext4, copied from a template.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::io::Errno;

/// By which the guest knows the disk.
pub const SERIAL: &str = "scratch";

/// Why there is no disk.
#[derive(Debug, thiserror::Error)]
pub enum ScratchError {
    /// `mke2fs` could not make the template.
    #[error("mke2fs could not make {path}: {reason}; is e2fsprogs 1.47 or later installed?")]
    Format {
        /// The template.
        path: PathBuf,
        /// What it said.
        reason: String,
    },
    /// A file failed.
    #[error("The scratch disk {path} cannot be made: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
}

/// Makes the disk at `path`, of `mebibytes`, replacing what is there; `templates` keeps one
/// formatted file of each size. Blocks.
pub fn make(templates: &Path, path: &Path, mebibytes: u32) -> Result<File, ScratchError> {
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| ScratchError::File { path, source }
    };
    let template = templates.join(format!("scratch-{mebibytes}.ext4"));
    let source = match File::open(&template) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let mut directory = DirBuilder::new();
            let made = directory.recursive(true).mode(0o700).create(templates);
            made.map_err(at(templates))?;
            format(templates, &template, mebibytes)?;
            File::open(&template).map_err(at(&template))?
        }
        Err(error) => return Err(at(&template)(error)),
    };
    let target = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(at(path))?;
    copy(&source, &target).map_err(at(path))?;
    Ok(target)
}

fn format(templates: &Path, template: &Path, mebibytes: u32) -> Result<(), ScratchError> {
    let failed = |reason: String| ScratchError::Format {
        path: template.to_owned(),
        reason,
    };
    // Under a name of its own, so that a template is whole or absent.
    let fresh = tempfile_in(templates, template).map_err(|source| ScratchError::File {
        path: template.to_owned(),
        source,
    })?;
    let output = Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-m", "0", "-I", "256"])
        // The disk lives no longer than the pod: nothing to recover, so no journal.
        .args(["-O", "^has_journal,quota,project"])
        // A new sparse file reads as zeros: neither mke2fs nor the guest has to write them.
        .args([
            "-E",
            "quotatype=prjquota,assume_storage_prezeroed=1,nodiscard",
        ])
        .arg(&fresh)
        .arg(format!("{mebibytes}M"))
        .output();
    let made = match output {
        Ok(output) if output.status.success() => {
            std::fs::rename(&fresh, template).map_err(|error| failed(error.to_string()))
        }
        Ok(output) => Err(failed(
            String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        )),
        Err(error) => Err(failed(error.to_string())),
    };
    if made.is_err() {
        // Only tidying; the failure is what counts.
        let _ = std::fs::remove_file(&fresh);
    }
    made
}

/// A new private file beside `template`.
fn tempfile_in(templates: &Path, template: &Path) -> std::io::Result<PathBuf> {
    for attempt in 0..1000 {
        let name = format!("{}-{attempt}.new", std::process::id());
        let path = templates.join(name);
        let mut options = OpenOptions::new();
        match options.write(true).create_new(true).mode(0o600).open(&path) {
            Ok(_) => return Ok(path),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(std::io::Error::other(format!(
        "too many unfinished files beside {}",
        template.display()
    )))
}

/// Copies `source` with its holes; shares its blocks where the file system can.
fn copy(mut source: &File, mut target: &File) -> std::io::Result<()> {
    if rustix::fs::ioctl_ficlone(target, source).is_ok() {
        return Ok(());
    }
    let length = source.metadata()?.len();
    target.set_len(length)?;
    let mut at = 0;
    while at < length {
        let data = match rustix::fs::seek(source, rustix::fs::SeekFrom::Data(at)) {
            Ok(data) => data,
            // Nothing but a hole follows.
            Err(Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let hole = rustix::fs::seek(source, rustix::fs::SeekFrom::Hole(data))?;
        source.seek(SeekFrom::Start(data))?;
        target.seek(SeekFrom::Start(data))?;
        copy_piece(source, target, hole.saturating_sub(data))?;
        at = hole;
    }
    Ok(())
}

fn copy_piece(source: &File, mut target: &File, length: u64) -> std::io::Result<()> {
    let mut piece = source.take(length);
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = piece.read(&mut buffer)?;
        match buffer.get(..count) {
            Some(bytes) if !bytes.is_empty() => target.write_all(bytes)?,
            _ => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_disk_is_a_sparse_copy_of_its_template() {
        let root = tempfile::tempdir().unwrap();
        let templates = root.path().join("templates");
        let make = |name: &str| make(&templates, &root.path().join(name), 1024).unwrap();
        let (one, two) = (make("one"), make("two"));
        for disk in [&one, &two] {
            let metadata = disk.metadata().unwrap();
            assert_eq!(metadata.len(), 1 << 30);
            assert!(metadata.blocks() * 512 < 64 << 20, "{}", metadata.blocks());
        }
        let mut magic = [0; 2];
        std::os::unix::fs::FileExt::read_exact_at(&two, &mut magic, 1080).unwrap();
        assert_eq!(magic, [0x53, 0xef]);
        assert_eq!(std::fs::read_dir(&templates).unwrap().count(), 1);
    }
}

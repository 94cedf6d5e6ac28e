//! Files that the host has made for a container: into the guest, and back when the container has
//! ended.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use bulkhead_agent_api::v1::left_out::Reason;
use bulkhead_agent_api::v1::{ChangedFilesResponse, File, LeftOut};

use super::{SandboxError, step};
use crate::container::mapping::Mapping;
use crate::container::{ContainerError, PlanError};

/// Most bytes of one file.
const LARGEST: usize = 1 << 20;
/// Most bytes of one file that goes back, and of all of a container's.
const LARGEST_BACK: u64 = 64 << 10;
const MOST_BACK: usize = 1 << 20;

/// A file that a container may write.
#[derive(Debug)]
pub struct Copied {
    /// Where the container has it.
    target: String,
    /// Where it lies in the guest. The container has it as a mount and cannot put another there.
    path: String,
    /// What it was when it was made.
    made: Look,
}

/// By what a change of a file is known: what its writer can set, and the time of the last change,
/// which nobody can (inode(7)). One that was given other owners or modes counts as changed.
#[derive(Debug, PartialEq, Eq)]
struct Look {
    modified: (i64, i64),
    changed: (i64, i64),
    bytes: u64,
}

impl Look {
    fn at(path: &str) -> io::Result<Self> {
        let metadata = fs::symlink_metadata(path)?;
        Ok(Self {
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
            bytes: metadata.len(),
        })
    }
}

/// Makes the files in the directory `home`, which is there, by their numbers. Answers those that may be written.
pub(super) fn write(
    home: &str,
    files: &[File],
    mapping: Option<&Mapping>,
) -> Result<Vec<Copied>, SandboxError> {
    let mut copies = Vec::new();
    for (at, file) in files.iter().enumerate() {
        if file.content.len() > LARGEST {
            let what = format!("files {}: larger than {LARGEST} bytes", file.path);
            return Err(ContainerError::from(PlanError::Invalid {
                field: "files".into(),
                what,
            })
            .into());
        }
        let path = format!("{home}/{at}");
        let mode = fs::Permissions::from_mode(file.mode & 0o777);
        let written =
            fs::write(&path, &file.content).and_then(|()| fs::set_permissions(&path, mode));
        step(&format!("write {}", file.path), written)?;
        // Without a mapping the container's root is who makes the file.
        let uid = file.uid.or(mapping.map(|mapping| mapping.user(0)));
        let gid = file.gid.or(mapping.map(|mapping| mapping.group(0)));
        let given = std::os::unix::fs::chown(&path, uid, gid);
        step(&format!("give {} to its owners", file.path), given)?;
        if !file.read_only {
            copies.push(Copied {
                target: file.path.clone(),
                made: step(&format!("look at {}", file.path), Look::at(&path))?,
                path,
            });
        }
    }
    Ok(copies)
}

/// Those that are no longer what they were, as far as they are small; of others their names and why.
/// Nobody writes any more. Blocks.
pub(super) fn changed(copies: &[Copied]) -> ChangedFilesResponse {
    let mut answer = ChangedFilesResponse::default();
    let mut left = MOST_BACK;
    for copied in copies {
        let path = copied.target.clone();
        match content(copied, left) {
            Ok(None) => {}
            Ok(Some(content)) => {
                left -= content.len();
                answer.files.push(File {
                    path,
                    content,
                    ..File::default()
                });
            }
            Err(reason) => answer.left_out.push(LeftOut {
                path,
                reason: reason.into(),
            }),
        }
    }
    answer
}

/// What is in it, if that has changed and has no more than `left` bytes.
fn content(copied: &Copied, left: usize) -> Result<Option<Vec<u8>>, Reason> {
    let unreadable = |error: io::Error| {
        crate::console::say(&format!("cannot read {}: {error}", copied.path));
        Reason::Unreadable
    };
    if Look::at(&copied.path).map_err(unreadable)? == copied.made {
        return Ok(None);
    }
    let mut content = Vec::new();
    let file = fs::File::open(&copied.path).map_err(unreadable)?;
    let read = file.take(LARGEST_BACK + 1).read_to_end(&mut content);
    read.map_err(unreadable)?;
    match content.len() {
        bytes if bytes as u64 > LARGEST_BACK => Err(Reason::Large),
        bytes if bytes > left => Err(Reason::Many),
        _ => Ok(Some(content)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_goes_back_if_it_is_small() {
        let directory = tempfile::tempdir().unwrap();
        let home = directory.path().display().to_string();
        let file = |path: &str, read_only| File {
            path: path.into(),
            content: b"old".to_vec(),
            mode: 0o644,
            read_only,
            ..File::default()
        };
        let mut files = vec![
            file("/log", false),
            file("/same", false),
            file("/fixed", true),
            file("/large", false),
            file("/gone", false),
        ];
        files.extend((0..17).map(|at| file(&format!("/many/{at}"), false)));
        let copies = write(&home, &files, None).unwrap();
        assert_eq!(changed(&copies), ChangedFilesResponse::default());
        // Of the same size, and as old as before.
        let before = fs::metadata(format!("{home}/0")).unwrap();
        fs::write(format!("{home}/0"), "new").unwrap();
        let log = fs::File::options().write(true).open(format!("{home}/0"));
        log.unwrap()
            .set_modified(before.modified().unwrap())
            .unwrap();
        fs::write(format!("{home}/2"), "not to be").unwrap();
        fs::write(format!("{home}/3"), vec![0; LARGEST_BACK as usize + 1]).unwrap();
        fs::remove_file(format!("{home}/4")).unwrap();
        for at in 5..files.len() {
            fs::write(format!("{home}/{at}"), vec![0; LARGEST_BACK as usize]).unwrap();
        }
        let answer = changed(&copies);
        assert_eq!(answer.files[0].path, "/log");
        assert_eq!(answer.files[0].content, b"new");
        assert_eq!(answer.files.len(), 16);
        let left_out = answer.left_out.iter();
        let left_out: Vec<_> = left_out.map(|it| (it.path.as_str(), it.reason())).collect();
        let wanted = [
            ("/large", Reason::Large),
            ("/gone", Reason::Unreadable),
            ("/many/15", Reason::Many),
            ("/many/16", Reason::Many),
        ];
        assert_eq!(left_out, wanted);
    }
}

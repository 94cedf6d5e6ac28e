//! Files that the host has made for a container: into the guest, and back when the container has
//! ended.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::time::SystemTime;

use bulkhead_agent_api::v1::File;

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

/// By what a change of a file is known.
#[derive(Debug, PartialEq, Eq)]
struct Look {
    modified: SystemTime,
    bytes: u64,
}

impl Look {
    fn at(path: &str) -> io::Result<Self> {
        let metadata = fs::symlink_metadata(path)?;
        Ok(Self {
            modified: metadata.modified()?,
            bytes: metadata.len(),
        })
    }
}

/// Makes the files in the directory `home`, by their numbers. Answers those that may be written.
pub(super) fn write(
    home: &str,
    files: &[File],
    mapping: Option<&Mapping>,
) -> Result<Vec<Copied>, SandboxError> {
    let mut copies = Vec::new();
    step("make a directory for files", fs::create_dir_all(home))?;
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

/// Those that are no longer what they were, as far as they are small. Nobody writes any more. Blocks.
pub(super) fn changed(copies: &[Copied]) -> Vec<File> {
    let mut files = Vec::new();
    let mut left = MOST_BACK;
    for copied in copies {
        let Some(content) = content(copied).filter(|content| content.len() <= left) else {
            continue;
        };
        left -= content.len();
        files.push(File {
            path: copied.target.clone(),
            content,
            ..File::default()
        });
    }
    files
}

fn content(copied: &Copied) -> Option<Vec<u8>> {
    if Look::at(&copied.path).ok()? == copied.made {
        return None;
    }
    let mut content = Vec::new();
    let file = fs::File::open(&copied.path).ok()?;
    file.take(LARGEST_BACK + 1).read_to_end(&mut content).ok()?;
    (content.len() as u64 <= LARGEST_BACK).then_some(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_goes_back_if_it_is_small() {
        let directory = tempfile::tempdir().unwrap();
        let home = directory.path().join("files").display().to_string();
        let file = |path: &str, read_only| File {
            path: path.into(),
            content: b"old".to_vec(),
            mode: 0o644,
            read_only,
            ..File::default()
        };
        let files = [
            file("/log", false),
            file("/same", false),
            file("/fixed", true),
            file("/large", false),
            file("/gone", false),
        ];
        let copies = write(&home, &files, None).unwrap();
        assert!(changed(&copies).is_empty());
        fs::write(format!("{home}/0"), "the reason").unwrap();
        fs::write(format!("{home}/2"), "not to be").unwrap();
        fs::write(format!("{home}/3"), vec![0; LARGEST_BACK as usize + 1]).unwrap();
        fs::remove_file(format!("{home}/4")).unwrap();
        let back = changed(&copies);
        let back: Vec<_> = back
            .iter()
            .map(|file| (file.path.as_str(), file.content.as_slice()))
            .collect();
        assert_eq!(back, [("/log", b"the reason".as_slice())]);
    }
}

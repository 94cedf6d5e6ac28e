//! Users by name: looked up in the image's own /etc/passwd and /etc/group.

use std::io::Read;
use std::os::fd::OwnedFd;

use rustix::fs::{FileType, Mode, OFlags};

use crate::container::plan::PlanError;
use crate::container::spec::User;
use crate::mount::Root;

/// Most bytes of either file. That of a distribution with a thousand users has a tenth of it.
const MOST: u64 = 1 << 20;
/// The largest id of a user or a group.
const MOST_ID: u32 = i32::MAX as u32;
/// Most supplementary groups of a process, the kernel's NGROUPS_MAX.
const MOST_GROUPS: usize = 65_536;

/// Fills in the numbers of a user that is named `user[:group]`, each a name or a number. `image`
/// is the image's directory in the guest.
///
/// `merge` adds the groups whose lines list the user (the CRI's policy Merge); without it only
/// those asked for are there (Strict). The group itself is always one of them: else a process
/// could rid itself of it by a setgid program, and of what a file's mode denies that group.
pub fn resolve(user: &mut User, image: &str, merge: bool) -> Result<(), PlanError> {
    let invalid = |what| PlanError::Invalid {
        field: "process.user".into(),
        what,
    };
    let mut groups = Vec::new();
    if let Some(name) = user.username.take().filter(|name| !name.is_empty()) {
        let passwd = read(image, "/etc/passwd").map_err(invalid)?;
        let group = read(image, "/etc/group").map_err(invalid)?;
        (user.uid, user.gid, groups) = identify(&name, &passwd, &group).map_err(invalid)?;
    }
    // To the kernel 2^32 - 1 is "leave it as it is": a process asked to have that id stays root. As
    // other runtimes do, the upper half is refused as a whole.
    let ids = [user.uid, user.gid].into_iter();
    let mut ids = ids.chain(user.additional_gids.iter().copied());
    if let Some(id) = ids.find(|id| *id > MOST_ID) {
        return Err(invalid(format!("the id {id} is more than {MOST_ID}")));
    }
    groups.retain(|group| merge && *group <= MOST_ID);
    let asked = std::mem::take(&mut user.additional_gids);
    let mut known = std::collections::HashSet::new();
    user.additional_gids = std::iter::once(user.gid)
        .chain(asked)
        .chain(groups)
        .filter(|group| known.insert(*group))
        .collect();
    if user.additional_gids.len() > MOST_GROUPS {
        return Err(invalid(format!("more than {MOST_GROUPS} groups")));
    }
    Ok(())
}

/// The home directory of a user, as the files below `root` have it. Files that cannot be read
/// name none.
pub fn home(root: &str, uid: u32) -> Option<String> {
    let passwd = read(root, "/etc/passwd").ok()?;
    lines(&passwd)
        .find(|fields| field(fields, 2) == Some(uid))
        .and_then(|fields| fields.get(5).map(ToString::to_string))
        .filter(|home| home.starts_with('/'))
}

/// A file of an image or a container: hostile, so only a regular one of a bounded size. One that
/// is not there lists nobody.
fn read(root: &str, path: &str) -> Result<String, String> {
    let cannot = |error: std::io::Error| format!("cannot read the image's {path}: {error}");
    let open = |flags| {
        let root = rustix::fs::open(root, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        Root::new(root).open(path, flags)
    };
    // Looked at before it is opened, for the answer's sake: no device of an image opens anyway. And
    // once more after, as a container may change its files meanwhile.
    let found = match open(OFlags::PATH) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(String::new()),
        found => found.map_err(cannot)?,
    };
    regular(path, &found)?;
    let file = open(OFlags::RDONLY | OFlags::NONBLOCK).map_err(cannot)?;
    let bytes = regular(path, &file)?;
    let mut text = Vec::new();
    std::fs::File::from(file)
        .take(MOST + 1)
        .read_to_end(&mut text)
        .map_err(cannot)?;
    if text.len() as u64 > MOST {
        return Err(format!(
            "the image's {path} has {bytes} bytes; at most {MOST} are read"
        ));
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// The size of what must be a regular file.
fn regular(path: &str, file: &OwnedFd) -> Result<i64, String> {
    let status = rustix::fs::fstat(file)
        .map_err(|error| format!("cannot look at the image's {path}: {error}"))?;
    let kind = match FileType::from_raw_mode(status.st_mode) {
        FileType::RegularFile => return Ok(status.st_size),
        FileType::Directory => "a directory",
        FileType::Fifo => "a FIFO",
        FileType::CharacterDevice | FileType::BlockDevice => "a device",
        _ => "no regular file",
    };
    Err(format!("the image's {path} is {kind}, not a file of users"))
}

/// User id, group id and the groups that list the user.
fn identify(name: &str, passwd: &str, group: &str) -> Result<(u32, u32, Vec<u32>), String> {
    let (user, wanted) = match name.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (name, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number: Option<u32> = user.parse().ok();
    // A name made of digits is a number to everybody.
    let entry = lines(passwd).find(|fields| match number {
        Some(uid) => field(fields, 2) == Some(uid),
        None => fields.first() == Some(&user),
    });
    let uid = number
        .or_else(|| entry.as_ref().and_then(|fields| field(fields, 2)))
        .ok_or_else(|| format!("the image's /etc/passwd has no user {user:?}"))?;
    let gid = match wanted {
        Some(group_name) => {
            let listed = || {
                let line = lines(group).find(|fields| fields.first() == Some(&group_name))?;
                field(&line, 2)
            };
            group_name
                .parse()
                .ok()
                .or_else(listed)
                .ok_or_else(|| format!("the image's /etc/group has no group {group_name:?}"))?
        }
        None => entry
            .as_ref()
            .and_then(|fields| field(fields, 3))
            .unwrap_or(0),
    };
    let login = entry.as_ref().and_then(|fields| fields.first().copied());
    let groups = lines(group)
        .filter(|fields| {
            let members = fields.get(3).copied().unwrap_or_default();
            login.is_some_and(|login| members.split(',').any(|member| member.trim() == login))
        })
        .filter_map(|fields| field(&fields, 2))
        .collect();
    Ok((uid, gid, groups))
}

fn lines(text: &str) -> impl Iterator<Item = Vec<&str>> {
    text.lines().map(|line| line.split(':').collect())
}

fn field(fields: &[&str], at: usize) -> Option<u32> {
    fields.get(at)?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nwww:x:33:34::/srv:/bin/false\n";
    const GROUP: &str = "root:x:0:\nweb:x:34:\nlogs:x:40:www,other\ntapes:x:41:other\n";

    fn named(name: &str) -> Result<(u32, u32, Vec<u32>), String> {
        identify(name, PASSWD, GROUP)
    }

    #[test]
    fn a_user_has_the_ids_and_groups_of_the_image() {
        assert_eq!(named("www"), Ok((33, 34, vec![40])));
        assert_eq!(named("33"), Ok((33, 34, vec![40])));
        assert_eq!(named("www:tapes"), Ok((33, 41, vec![40])));
        assert_eq!(named("www:7"), Ok((33, 7, vec![40])));
        assert_eq!(named(":web"), Ok((0, 34, vec![])));
    }

    #[test]
    fn numbers_need_no_entry_but_names_do() {
        assert_eq!(named("1000"), Ok((1000, 0, vec![])));
        assert_eq!(named("1000:1001"), Ok((1000, 1001, vec![])));
        assert!(named("nobody").unwrap_err().contains("\"nobody\""));
        assert!(named("www:none").unwrap_err().contains("\"none\""));
        assert!(named("4294967296").is_err());
    }

    #[test]
    fn groups_are_merged_or_strictly_those_asked_for() {
        let image = tempfile::tempdir().unwrap();
        let etc = image.path().join("etc");
        std::fs::create_dir(&etc).unwrap();
        std::fs::write(etc.join("passwd"), PASSWD).unwrap();
        std::fs::write(etc.join("group"), GROUP).unwrap();
        let groups = |merge| {
            let mut user = User {
                username: Some("www".into()),
                additional_gids: vec![7, 34],
                ..User::default()
            };
            resolve(&mut user, image.path().to_str().unwrap(), merge).unwrap();
            assert_eq!((user.uid, user.gid), (33, 34));
            user.additional_gids
        };
        assert_eq!(groups(true), [34, 7, 40]);
        assert_eq!(groups(false), [34, 7]);
    }

    #[test]
    fn an_id_that_means_no_change_is_refused() {
        let image = image(|passwd| {
            std::fs::write(passwd, "evil:x:4294967295:4294967295::/:/bin/sh\n").unwrap();
        });
        for name in ["4294967295", "0:4294967295", "2147483648", "evil"] {
            let mut user = User {
                username: Some(name.into()),
                ..User::default()
            };
            let refused = resolve(&mut user, image.path().to_str().unwrap(), true);
            let refusal = refused.unwrap_err().to_string();
            assert!(
                refusal.contains("more than 2147483647"),
                "{name}: {refusal}"
            );
        }
    }

    /// An image whose /etc/passwd is made by `make`.
    fn image(make: impl FnOnce(&std::path::Path)) -> tempfile::TempDir {
        let image = tempfile::tempdir().unwrap();
        std::fs::create_dir(image.path().join("etc")).unwrap();
        make(&image.path().join("etc/passwd"));
        image
    }

    fn refusal(image: &tempfile::TempDir) -> String {
        read(image.path().to_str().unwrap(), "/etc/passwd").unwrap_err()
    }

    #[test]
    fn an_image_cannot_make_the_agent_wait() {
        let fifo = image(|passwd| {
            let kind = FileType::Fifo;
            rustix::fs::mknodat(rustix::fs::CWD, passwd, kind, Mode::RWXU, 0).unwrap();
        });
        assert!(refusal(&fifo).contains("/etc/passwd is a FIFO"));
        let directory = image(|passwd| std::fs::create_dir(passwd).unwrap());
        assert!(refusal(&directory).contains("/etc/passwd is a directory"));
        let circle = image(|passwd| std::os::unix::fs::symlink("passwd", passwd).unwrap());
        assert!(refusal(&circle).contains("/etc/passwd"));
        let group = image(|passwd| {
            std::fs::write(passwd, PASSWD).unwrap();
            std::os::unix::fs::symlink("there", passwd.with_file_name("group")).unwrap();
            std::os::unix::fs::symlink("group", passwd.with_file_name("there")).unwrap();
        });
        let mut user = User {
            username: Some("www".into()),
            ..User::default()
        };
        let refused = resolve(&mut user, group.path().to_str().unwrap(), true).unwrap_err();
        assert!(refused.to_string().contains("/etc/group"), "{refused}");
    }

    #[test]
    fn an_image_cannot_fill_the_agents_memory() {
        let large = image(|passwd| {
            let file = std::fs::File::create(passwd).unwrap();
            file.set_len(1 << 30).unwrap();
        });
        let refusal = refusal(&large);
        assert!(refusal.contains("1073741824 bytes"), "{refusal}");
    }

    #[test]
    fn an_image_cannot_show_the_guests_files() {
        let image = image(|passwd| {
            std::os::unix::fs::symlink("/../../../../etc/passwd-of-the-image", passwd).unwrap();
        });
        std::fs::write(image.path().join("etc/passwd-of-the-image"), "inside").unwrap();
        let root = image.path().to_str().unwrap();
        assert_eq!(read(root, "/etc/passwd").unwrap(), "inside");
        assert_eq!(read(root, "/etc/group").unwrap(), "");
    }

    #[test]
    fn a_home_is_the_one_of_the_number() {
        let image = image(|passwd| std::fs::write(passwd, PASSWD).unwrap());
        let root = image.path().to_str().unwrap();
        assert_eq!(home(root, 33).as_deref(), Some("/srv"));
        assert_eq!(home(root, 34), None);
    }
}

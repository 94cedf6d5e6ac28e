//! Users by name: looked up in the image's own /etc/passwd and /etc/group.

use std::io::Read;

use rustix::fs::{FileType, Mode, OFlags};

use crate::container::plan::PlanError;
use crate::container::spec::User;
use crate::mount::Root;

/// Most bytes read of either file.
const MOST: u64 = 1 << 20;

/// Fills in the numbers of a user that is named `user[:group]`, each a name or a number, and adds
/// the groups which list it. `image` is the image's directory in the guest.
pub fn resolve(user: &mut User, image: &str) -> Result<(), PlanError> {
    let Some(name) = user.username.take().filter(|name| !name.is_empty()) else {
        return Ok(());
    };
    let found = identify(
        &name,
        &read(image, "/etc/passwd"),
        &read(image, "/etc/group"),
    );
    let (uid, gid, groups) = found.map_err(|what| PlanError::Invalid {
        field: "process.user".into(),
        what,
    })?;
    (user.uid, user.gid) = (uid, gid);
    for group in groups {
        if !user.additional_gids.contains(&group) {
            user.additional_gids.push(group);
        }
    }
    Ok(())
}

/// A file of an image: hostile, so only a regular one, and not all of a long one. One that is
/// not there lists nobody.
fn read(image: &str, path: &str) -> String {
    let mut text = Vec::new();
    let read = rustix::fs::open(image, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(std::io::Error::from)
        .and_then(|image| Root::new(image).open(path, OFlags::RDONLY | OFlags::NONBLOCK))
        .and_then(|file| {
            let kind = FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode);
            match kind {
                FileType::RegularFile => {
                    std::fs::File::from(file).take(MOST).read_to_end(&mut text)
                }
                _ => Ok(0),
            }
        });
    match read {
        Ok(_) => String::from_utf8_lossy(&text).into_owned(),
        Err(_) => String::new(),
    }
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
    fn an_image_cannot_make_the_agent_wait_or_read_its_own_files() {
        let image = tempfile::tempdir().unwrap();
        let etc = image.path().join("etc");
        std::fs::create_dir(&etc).unwrap();
        let fifo = etc.join("passwd");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::RWXU, 0).unwrap();
        std::os::unix::fs::symlink("/../../../../etc/passwd", etc.join("group")).unwrap();
        let image = image.path().to_str().unwrap();
        assert_eq!(read(image, "/etc/passwd"), "");
        assert_eq!(read(image, "/etc/group"), "");
    }
}

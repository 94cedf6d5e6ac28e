//! A pod's ids: which of the guest's ids its containers' are, user_namespaces(7).

use bulkhead_agent_api::v1::IdMapping;
use serde::{Deserialize, Serialize};

/// Most ranges the kernel takes.
const MOST: usize = 340;
/// What an id that has no other looks like.
const NOBODY: u32 = 65_534;

/// The ids of a pod's user namespace, by ranges.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    users: Vec<Range>,
    groups: Vec<Range>,
}

/// Ids next to one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Range {
    /// The first in containers.
    inside: u32,
    /// The first in the guest.
    outside: u32,
    length: u32,
}

impl Mapping {
    /// Reads a request; `None` without ranges. The error is a sentence.
    pub fn read(users: &[IdMapping], groups: &[IdMapping]) -> Result<Option<Self>, String> {
        if users.is_empty() && groups.is_empty() {
            return Ok(None);
        }
        let ranges = |what: &str, asked: &[IdMapping]| {
            if asked.len() > MOST {
                return Err(format!("user namespace: more than {MOST} ranges of {what}"));
            }
            let ranges: Vec<Range> = asked
                .iter()
                .map(|range| Range {
                    inside: range.container_id,
                    outside: range.host_id,
                    length: range.length,
                })
                .collect();
            // Files, mounts and the pod's first process are root's.
            match outside(&ranges, 0) {
                Some(_) => Ok(ranges),
                None => Err(format!(
                    "user namespace: the ranges of {what} have nothing for root"
                )),
            }
        };
        Ok(Some(Self {
            users: ranges("users", users)?,
            groups: ranges("groups", groups)?,
        }))
    }

    /// The guest's id of a container's user.
    pub fn user(&self, inside: u32) -> u32 {
        outside(&self.users, inside).unwrap_or(NOBODY)
    }

    /// The guest's id of a container's group.
    pub fn group(&self, inside: u32) -> u32 {
        outside(&self.groups, inside).unwrap_or(NOBODY)
    }

    /// Whether containers have this user.
    pub fn has_user(&self, inside: u32) -> bool {
        outside(&self.users, inside).is_some()
    }

    /// Whether containers have this group.
    pub fn has_group(&self, inside: u32) -> bool {
        outside(&self.groups, inside).is_some()
    }

    /// The contents of uid_map and gid_map.
    pub fn files(&self) -> [String; 2] {
        [&self.users, &self.groups].map(|ranges| {
            ranges
                .iter()
                .map(|range| format!("{} {} {}\n", range.inside, range.outside, range.length))
                .collect()
        })
    }

    /// `uid=` and `gid=` options of a file system, for one that is mounted outside.
    pub fn option(&self, option: &str) -> String {
        let id = |number: &str| number.parse().ok();
        match option.split_once('=') {
            Some(("uid", number)) => id(number).map(|id| format!("uid={}", self.user(id))),
            Some(("gid", number)) => id(number).map(|id| format!("gid={}", self.group(id))),
            _ => None,
        }
        .unwrap_or_else(|| option.to_owned())
    }
}

fn outside(ranges: &[Range], inside: u32) -> Option<u32> {
    ranges.iter().find_map(|range| {
        let offset = inside.checked_sub(range.inside)?;
        let outside = range.outside.checked_add(offset)?;
        (offset < range.length).then_some(outside)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(container_id: u32, host_id: u32, length: u32) -> IdMapping {
        IdMapping {
            container_id,
            host_id,
            length,
        }
    }

    #[test]
    fn ids_are_those_of_the_ranges() {
        let users = [range(0, 65_536, 1000), range(2000, 0, 1)];
        let mapping = Mapping::read(&users, &[range(0, 7, 10)]).unwrap().unwrap();
        assert_eq!(
            [0, 999, 2000].map(|id| mapping.user(id)),
            [65_536, 66_535, 0]
        );
        assert_eq!([1000, 2001].map(|id| mapping.user(id)), [NOBODY; 2]);
        assert!(mapping.has_user(999) && !mapping.has_user(1000) && !mapping.has_group(10));
        assert_eq!(mapping.option("gid=5"), "gid=12");
        assert_eq!(mapping.option("mode=0620"), "mode=0620");
        let files = mapping.files();
        assert_eq!(files, ["0 65536 1000\n2000 0 1\n", "0 7 10\n"]);
    }

    #[test]
    fn a_namespace_without_root_is_refused() {
        assert_eq!(Mapping::read(&[], &[]), Ok(None));
        let refusal = Mapping::read(&[range(0, 1, 1)], &[range(1, 1, 1)]).unwrap_err();
        assert!(refusal.contains("groups"), "{refusal}");
        assert!(Mapping::read(&[range(0, 1, 1)], &[]).is_err());
    }
}

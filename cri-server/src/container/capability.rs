//! A container's capability sets.

use std::collections::HashSet;

use bulkhead_cri_api::v1 as cri;
use oci_spec::runtime::{Capability, LinuxCapabilities};

use super::spec::SpecError;

/// Every capability Linux has, in the order of their numbers.
const ALL: [Capability; 41] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::LinuxImmutable,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetAdmin,
    Capability::NetRaw,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::SysModule,
    Capability::SysRawio,
    Capability::SysChroot,
    Capability::SysPtrace,
    Capability::SysPacct,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysNice,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Mknod,
    Capability::Lease,
    Capability::AuditWrite,
    Capability::AuditControl,
    Capability::Setfcap,
    Capability::MacOverride,
    Capability::MacAdmin,
    Capability::Syslog,
    Capability::WakeAlarm,
    Capability::BlockSuspend,
    Capability::AuditRead,
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];

/// What a container has that asks for nothing: the set every container engine grants.
const DEFAULT: [Capability; 14] = [
    Capability::AuditWrite,
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Mknod,
    Capability::NetBindService,
    Capability::NetRaw,
    Capability::Setfcap,
    Capability::Setgid,
    Capability::Setpcap,
    Capability::Setuid,
    Capability::SysChroot,
];

/// The sets for what CRI `Capability` asks: `ALL` added, `ALL` dropped, then the names added, then
/// the names dropped. Ambient ones are held as well; one that is dropped cannot be.
pub fn sets(asked: &cri::Capability, privileged: bool) -> Result<LinuxCapabilities, SpecError> {
    let mut held: HashSet<Capability> = DEFAULT.into_iter().collect();
    if privileged || names_all(&asked.add_capabilities) {
        held.extend(ALL);
    }
    let mut dropped = Vec::new();
    if !privileged {
        if names_all(&asked.drop_capabilities) {
            held.clear();
        }
        held.extend(parse(&asked.add_capabilities, "add_capabilities")?);
        dropped = parse(&asked.drop_capabilities, "drop_capabilities")?;
        held.retain(|capability| !dropped.contains(capability));
    }
    let field = "add_ambient_capabilities";
    let invalid = |reason: String| SpecError::Invalid { field, reason };
    if names_all(&asked.add_ambient_capabilities) {
        return Err(invalid("ALL is no capability; name each".to_owned()));
    }
    let mut ambient = HashSet::new();
    for capability in parse(&asked.add_ambient_capabilities, field)? {
        if dropped.contains(&capability) {
            return Err(invalid(format!("{capability} is dropped as well")));
        }
        // The kernel refuses an ambient capability that is not permitted.
        held.insert(capability);
        ambient.insert(capability);
    }
    let mut sets = LinuxCapabilities::default();
    sets.set_bounding(Some(held.clone()))
        .set_effective(Some(held.clone()))
        .set_permitted(Some(held))
        .set_inheritable(Some(ambient.clone()))
        .set_ambient(Some(ambient));
    Ok(sets)
}

fn names_all(names: &[String]) -> bool {
    names.iter().any(|name| name.eq_ignore_ascii_case("ALL"))
}

fn parse(names: &[String], field: &'static str) -> Result<Vec<Capability>, SpecError> {
    names
        .iter()
        .filter(|name| !name.eq_ignore_ascii_case("ALL"))
        .map(|name| {
            let upper = name.to_ascii_uppercase();
            let plain = upper.strip_prefix("CAP_").unwrap_or(&upper);
            ALL.into_iter()
                .find(|known| known.to_string() == plain)
                .ok_or_else(|| SpecError::Invalid {
                    field,
                    reason: format!("{name:?} is no capability Linux knows"),
                })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bounding(add: &[&str], drop: &[&str]) -> HashSet<Capability> {
        let asked = cri::Capability {
            add_capabilities: add.iter().map(|name| name.to_string()).collect(),
            drop_capabilities: drop.iter().map(|name| name.to_string()).collect(),
            ..Default::default()
        };
        sets(&asked, false).unwrap().bounding().clone().unwrap()
    }

    #[test]
    fn names_are_taken_with_and_without_their_prefix_in_any_case() {
        let set = bounding(&["NET_ADMIN", "cap_sys_time"], &["CAP_CHOWN", "kill"]);
        assert!(set.contains(&Capability::NetAdmin));
        assert!(set.contains(&Capability::SysTime));
        assert!(!set.contains(&Capability::Chown));
        assert!(!set.contains(&Capability::Kill));
        assert!(set.contains(&Capability::Setuid));
    }

    #[test]
    fn all_is_everything_or_nothing() {
        assert_eq!(bounding(&["ALL"], &[]).len(), ALL.len());
        assert!(bounding(&[], &["all"]).is_empty());
        assert!(bounding(&["ALL"], &["ALL"]).is_empty());
        let only = bounding(&["NET_BIND_SERVICE"], &["ALL"]);
        assert_eq!(only, HashSet::from([Capability::NetBindService]));
        let but = bounding(&["ALL"], &["SYS_ADMIN"]);
        assert_eq!(but.len(), ALL.len() - 1);
    }

    #[test]
    fn an_unknown_name_is_refused_and_named() {
        let asked = cri::Capability {
            add_capabilities: vec!["FLY".into()],
            ..Default::default()
        };
        let refusal = sets(&asked, false).unwrap_err().to_string();
        assert!(refusal.contains("FLY"), "{refusal}");
    }

    #[test]
    fn an_ambient_capability_is_also_permitted() {
        let asked = cri::Capability {
            drop_capabilities: vec!["ALL".into()],
            add_ambient_capabilities: vec!["NET_RAW".into()],
            ..Default::default()
        };
        let sets = sets(&asked, false).unwrap();
        let only = Some(HashSet::from([Capability::NetRaw]));
        assert_eq!(sets.ambient(), &only);
        assert_eq!(sets.permitted(), &only);
    }

    #[test]
    fn an_ambient_capability_is_named_and_not_dropped() {
        for (ambient, word) in [("ALL", "name each"), ("KILL", "dropped")] {
            let asked = cri::Capability {
                drop_capabilities: vec!["KILL".into()],
                add_ambient_capabilities: vec![ambient.into()],
                ..Default::default()
            };
            let refusal = sets(&asked, false).unwrap_err().to_string();
            assert!(refusal.contains(word), "{refusal}");
        }
    }
}

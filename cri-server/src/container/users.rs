//! The user namespace of a pod (CRI `NamespaceOption.userns_options`). Pure.

use bulkhead_cri_api::v1 as cri;

use super::spec::SpecError;

const FIELD: &str = "namespace_options.userns_options";
/// Whose what belongs to nobody known is.
const NOBODY: u32 = 65_534;

/// The ranges of user and group ids a pod asks for; none where its ids are the guest's.
pub type Ranges = (Vec<cri::IdMapping>, Vec<cri::IdMapping>);

/// Reads the options of a pod or a container. What ranges make a namespace the guest's kernel knows.
pub fn ranges(options: Option<&cri::NamespaceOption>) -> Result<Ranges, SpecError> {
    let Some(asked) = options.and_then(|options| options.userns_options.as_ref()) else {
        return Ok(Ranges::default());
    };
    let mapped = !asked.uids.is_empty() || !asked.gids.is_empty();
    match cri::NamespaceMode::try_from(asked.mode) {
        Ok(cri::NamespaceMode::Node) if mapped => Err(invalid("NODE has no ids to map")),
        Ok(cri::NamespaceMode::Node) => Ok(Ranges::default()),
        Ok(cri::NamespaceMode::Pod) if asked.uids.is_empty() || asked.gids.is_empty() => {
            Err(invalid("POD needs ranges of user ids and of group ids"))
        }
        Ok(cri::NamespaceMode::Pod) => Ok((asked.uids.clone(), asked.gids.clone())),
        Ok(mode) => Err(invalid(format!(
            "{} does not apply: a pod has one user namespace",
            mode.as_str_name()
        ))),
        Err(_) => Err(invalid(format!("{} is no mode the CRI knows", asked.mode))),
    }
}

/// Refuses a container whose user namespace is not its pod's, or whose mounts map other ids.
pub fn check_container(
    container: &cri::ContainerConfig,
    own: Option<&cri::NamespaceOption>,
    pod: Option<&cri::NamespaceOption>,
) -> Result<(), SpecError> {
    let pod = ranges(pod)?;
    if ranges(own)? != pod {
        return Err(invalid("they differ from the pod's"));
    }
    for mount in &container.mounts {
        let asked = (&mount.uid_mappings, &mount.gid_mappings);
        let mapped = !asked.0.is_empty() || !asked.1.is_empty();
        if mapped && asked != (&pod.0, &pod.1) {
            let path = &mount.container_path;
            return Err(SpecError::Invalid {
                field: "mounts.uidMappings",
                reason: format!(
                    "at {path} they differ from the ranges of the pod's user namespace"
                ),
            });
        }
    }
    Ok(())
}

/// The id in the guest of what belongs to `id` on the host, seen through a mount with these mappings:
/// nobody's where they have none, the same where there are no mappings.
pub fn outside(ranges: &[cri::IdMapping], id: u32) -> u32 {
    if ranges.is_empty() {
        return id;
    }
    let mapped = ranges.iter().find_map(|range| {
        let offset = id.checked_sub(range.container_id)?;
        let outside = range.host_id.checked_add(offset)?;
        (offset < range.length).then_some(outside)
    });
    mapped.unwrap_or(NOBODY)
}

fn invalid(reason: impl Into<String>) -> SpecError {
    SpecError::Invalid {
        field: FIELD,
        reason: reason.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use cri::NamespaceMode::{Container, Node, Pod};

    fn range(host_id: u32) -> Vec<cri::IdMapping> {
        vec![cri::IdMapping {
            host_id,
            container_id: 0,
            length: 65_536,
        }]
    }

    fn options(mode: i32, host: Option<u32>) -> cri::NamespaceOption {
        let ids = host.map(range).unwrap_or_default();
        cri::NamespaceOption {
            userns_options: Some(cri::UserNamespace {
                mode,
                uids: ids.clone(),
                gids: ids,
            }),
            ..Default::default()
        }
    }

    #[test]
    fn only_a_namespace_of_the_pod_has_ranges() {
        let ranges = |mode, host| ranges(Some(&options(mode, host)));
        assert_eq!(ranges(Pod.into(), Some(7)), Ok((range(7), range(7))));
        assert_eq!(ranges(Node.into(), None), Ok(Ranges::default()));
        assert_eq!(super::ranges(None), Ok(Ranges::default()));
        for (mode, host) in [
            (Pod.into(), None),
            (Node.into(), Some(7)),
            (Container.into(), Some(7)),
            (9, None),
        ] {
            let refusal = ranges(mode, host).unwrap_err().to_string();
            assert!(refusal.contains("userns_options"), "{refusal}");
        }
    }

    #[test]
    fn ids_of_the_host_are_those_the_mount_maps() {
        assert_eq!(outside(&[], 5), 5);
        let mut ranges = range(70_000);
        ranges.extend([cri::IdMapping {
            host_id: u32::MAX,
            container_id: 80_000,
            length: 9,
        }]);
        let ids = [0, 65_535, 65_536, 80_001].map(|id| outside(&ranges, id));
        assert_eq!(ids, [70_000, 135_535, NOBODY, NOBODY]);
    }

    #[test]
    fn a_container_has_the_user_namespace_of_its_pod() {
        let (seven, eight) = (options(Pod.into(), Some(7)), options(Pod.into(), Some(8)));
        let node = options(Node.into(), None);
        let plain = cri::ContainerConfig::default();
        let check = |own, pod| check_container(&plain, own, pod);
        assert_eq!(check(Some(&seven), Some(&seven)), Ok(()));
        assert_eq!(check(Some(&node), None), Ok(()));
        assert!(check(Some(&eight), Some(&seven)).is_err());
        assert!(check(Some(&seven), None).is_err());
        assert!(check(None, Some(&seven)).is_err());
        let mounts = |host_id| cri::ContainerConfig {
            mounts: vec![cri::Mount {
                container_path: "/etc/hosts".into(),
                uid_mappings: range(host_id),
                gid_mappings: range(host_id),
                ..Default::default()
            }],
            ..Default::default()
        };
        assert_eq!(
            check_container(&mounts(7), Some(&seven), Some(&seven)),
            Ok(())
        );
        let refusal = check_container(&mounts(9), Some(&seven), Some(&seven));
        assert!(refusal.unwrap_err().to_string().contains("/etc/hosts"));
    }
}

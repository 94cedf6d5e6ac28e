//! A container's devices. The host's do not exist in the guest; what can be asked for by a host path
//! is what every Linux has of itself, the guest's kernel included.

use bulkhead_cri_api::v1 as cri;
use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

use super::spec::SpecError;

/// Host path, major and minor number (Documentation/admin-guide/devices.txt) of the devices that are
/// no hardware.
const KNOWN: [(&str, i64, i64); 8] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
    ("/dev/fuse", 10, 229),
    ("/dev/net/tun", 10, 200),
];

/// The nodes and the rules for what CRI `Device`s ask. A privileged container may use every device
/// the guest has; the guest keeps the pod's own disks from it.
pub fn devices(
    asked: &[cri::Device],
    privileged: bool,
) -> Result<(Vec<LinuxDevice>, Vec<LinuxDeviceCgroup>), SpecError> {
    let mut everything = LinuxDeviceCgroup::default();
    everything
        .set_allow(privileged)
        .set_typ(Some(LinuxDeviceType::A))
        .set_major(None)
        .set_minor(None)
        .set_access(Some("rwm".to_owned()));
    let (mut nodes, mut rules) = (Vec::new(), vec![everything]);
    for device in asked {
        let (node, rule) = known(device)?;
        nodes.push(node);
        rules.push(rule);
    }
    Ok((nodes, rules))
}

fn known(device: &cri::Device) -> Result<(LinuxDevice, LinuxDeviceCgroup), SpecError> {
    let cri::Device {
        container_path,
        host_path,
        permissions,
    } = device;
    let Some((_, major, minor)) = KNOWN.iter().find(|(path, ..)| path == host_path) else {
        return Err(SpecError::Unsupported {
            field: "devices",
            reason: format!("the host's {host_path} does not exist in the guest"),
        });
    };
    let invalid = |reason| SpecError::Invalid {
        field: "devices",
        reason,
    };
    let path = match container_path.as_str() {
        "" => host_path,
        path => path,
    };
    if !path.starts_with('/') || path.split('/').any(|part| part == "..") {
        return Err(invalid(format!("{path:?} is not a plain absolute path")));
    }
    if permissions.is_empty() || permissions.chars().any(|letter| !"rwm".contains(letter)) {
        return Err(invalid(format!(
            "the permissions {permissions:?} of {path} are not of the letters r, w and m"
        )));
    }
    let mut node = LinuxDevice::default();
    node.set_path(path.into())
        .set_typ(LinuxDeviceType::C)
        .set_major(*major)
        .set_minor(*minor)
        .set_file_mode(Some(0o666));
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(true)
        .set_typ(Some(LinuxDeviceType::C))
        .set_major(Some(*major))
        .set_minor(Some(*minor))
        .set_access(Some(permissions.clone()));
    Ok((node, rule))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(host: &str, container: &str, permissions: &str) -> cri::Device {
        cri::Device {
            host_path: host.into(),
            container_path: container.into(),
            permissions: permissions.into(),
        }
    }

    #[test]
    fn a_device_of_every_kernel_becomes_a_node_and_a_rule() {
        let asked = [device("/dev/fuse", "/dev/files", "rw")];
        let (nodes, rules) = devices(&asked, false).unwrap();
        assert_eq!(nodes[0].path().to_str(), Some("/dev/files"));
        assert_eq!((nodes[0].major(), nodes[0].minor()), (10, 229));
        let allowed: Vec<_> = rules.iter().map(|rule| rule.allow()).collect();
        assert_eq!(allowed, [false, true]);
        assert_eq!(rules[1].access().as_deref(), Some("rw"));
    }

    #[test]
    fn a_privileged_container_may_use_every_device() {
        let (nodes, rules) = devices(&[], true).unwrap();
        assert!(nodes.is_empty() && rules[0].allow());
    }

    #[test]
    fn what_the_guest_has_not_or_has_no_sense_is_refused_and_named() {
        let refuse = |asked, word: &str| {
            let refusal = devices(&[asked], true).unwrap_err().to_string();
            assert!(refusal.contains(word), "{refusal}");
        };
        refuse(device("/dev/kvm", "/dev/kvm", "rw"), "/dev/kvm");
        refuse(device("/dev/fuse", "/dev/../etc", "rw"), "/dev/../etc");
        refuse(device("/dev/fuse", "", "rx"), "\"rx\"");
        refuse(device("/dev/fuse", "", ""), "\"\"");
    }
}

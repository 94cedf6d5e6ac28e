//! Device nodes of a container, and which devices its processes may open or make nodes of
//! (config-linux.md "Devices", "Device whitelist").
//!
//! Two walls keep the pod's disks from its containers, and each stands alone: mounts do not let
//! device nodes be opened but where a node was bound or `dev` was asked for; and a BPF program on the
//! container's cgroup lets only listed devices through, never a disk of the pod. A privileged
//! container may change its mounts, but not that program.

mod filter;
mod node;

pub use filter::confine;
pub use node::{check, copy_all, make_nodes};

use serde::{Deserialize, Serialize};

use crate::container::plan::PlanError;
use crate::container::spec::{Device, DeviceRule};

/// Most devices, and most rules, of a container.
const MOST: usize = 256;

/// Devices every container has, config-linux.md "Default Devices": name in /dev, major, minor.
pub const DEFAULT: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// A character device.
    Character,
    /// A block device.
    Block,
    /// A FIFO.
    Fifo,
}

/// A node to be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Absolute path in the container.
    pub path: String,
    /// What it is.
    pub kind: Kind,
    /// Major number; 0 for a FIFO.
    pub major: u32,
    /// Minor number; 0 for a FIFO.
    pub minor: u32,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// Reading.
const READ: u8 = 1;
/// Writing.
const WRITE: u8 = 2;
/// Making a node.
const MAKE: u8 = 4;

/// What may or may not be done with devices. The last rule that speaks of an access decides it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    allow: bool,
    /// `None`: both kinds.
    kind: Option<Kind>,
    /// `None`: each.
    major: Option<u32>,
    /// `None`: each.
    minor: Option<u32>,
    access: u8,
}

fn invalid(field: &str, what: impl Into<String>) -> PlanError {
    PlanError::Invalid {
        field: field.into(),
        what: what.into(),
    }
}

/// The nodes of `linux.devices`.
pub fn nodes(devices: &[Device]) -> Result<Vec<Node>, PlanError> {
    const FIELD: &str = "linux.devices";
    if devices.len() > MOST {
        return Err(invalid(FIELD, format!("more than {MOST}")));
    }
    let node = |device: &Device| {
        let path = &device.path;
        let named = |what: &str| invalid(FIELD, format!("{path:?}: {what}"));
        let climbs = path.split('/').any(|part| part == "..");
        if !path.starts_with('/') || path.len() > 4095 || path.contains('\0') || climbs {
            return Err(named("not a plain absolute path"));
        }
        let kind = match device.kind.as_str() {
            "c" | "u" => Kind::Character,
            "b" => Kind::Block,
            "p" => Kind::Fifo,
            other => return Err(named(&format!("no device has the type {other:?}"))),
        };
        let number = |value: Option<i64>, name: &str, most: u32| match (kind, value) {
            (Kind::Fifo, _) => Ok(0),
            (_, Some(value)) => u32::try_from(value)
                .ok()
                .filter(|value| *value <= most)
                .ok_or_else(|| named(&format!("{name} {value} does not exist"))),
            (_, None) => Err(named(&format!("{name} is missing"))),
        };
        Ok(Node {
            path: path.clone(),
            kind,
            // The kernel's 12 and 20 bits.
            major: number(device.major, "major", 0xfff)?,
            minor: number(device.minor, "minor", 0xf_ffff)?,
            mode: device.file_mode.unwrap_or(0o666) & 0o777,
            uid: device.uid.unwrap_or(0),
            gid: device.gid.unwrap_or(0),
        })
    };
    devices.iter().map(node).collect()
}

/// The rules of `linux.resources.devices`: nothing but what they say, and the default devices,
/// terminals and the making of nodes with them, as every runtime grants.
pub fn rules(listed: &[DeviceRule]) -> Result<Vec<Rule>, PlanError> {
    const FIELD: &str = "linux.resources.devices";
    if listed.len() > MOST {
        return Err(invalid(FIELD, format!("more than {MOST}")));
    }
    let everything = READ | WRITE | MAKE;
    let rule = |allow, kind, major, minor, access| Rule {
        allow,
        kind,
        major,
        minor,
        access,
    };
    let mut rules = vec![rule(false, None, None, None, everything)];
    for listed in listed {
        let kind = match listed.kind.as_deref().unwrap_or("a") {
            "a" => None,
            "c" | "u" => Some(Kind::Character),
            "b" => Some(Kind::Block),
            other => return Err(invalid(FIELD, format!("no device has the type {other:?}"))),
        };
        let number = |value: Option<i64>| match value {
            None | Some(-1) => Ok(None),
            Some(value) => u32::try_from(value)
                .ok()
                .filter(|value| *value <= 0xf_ffff)
                .map(Some)
                .ok_or_else(|| invalid(FIELD, format!("no device has the number {value}"))),
        };
        let mut access = 0;
        for letter in listed.access.as_deref().unwrap_or("rwm").chars() {
            access |= match letter {
                'r' => READ,
                'w' => WRITE,
                'm' => MAKE,
                other => return Err(invalid(FIELD, format!("{other:?} is no access"))),
            };
        }
        let (major, minor) = (number(listed.major)?, number(listed.minor)?);
        rules.push(rule(listed.allow, kind, major, minor, access));
    }
    let character = Some(Kind::Character);
    for (_, major, minor) in DEFAULT {
        rules.push(rule(true, character, Some(major), Some(minor), everything));
    }
    // /dev/ptmx and the terminals behind it, major numbers of Documentation/admin-guide/devices.txt.
    rules.push(rule(true, character, Some(5), Some(2), everything));
    rules.push(rule(true, character, Some(136), None, everything));
    rules.push(rule(true, None, None, None, MAKE));
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(kind: &str, major: Option<i64>) -> Device {
        Device {
            kind: kind.into(),
            path: "/dev/x".into(),
            major,
            minor: Some(1),
            ..Device::default()
        }
    }

    #[test]
    fn a_device_becomes_a_node() {
        let nodes = nodes(&[device("c", Some(10)), device("p", None)]).unwrap();
        assert_eq!((nodes[0].kind, nodes[0].major), (Kind::Character, 10));
        assert_eq!(nodes[0].mode, 0o666);
        assert_eq!((nodes[1].kind, nodes[1].minor), (Kind::Fifo, 0));
    }

    #[test]
    fn a_device_without_sense_is_named() {
        let refused = |device: Device| nodes(&[device]).unwrap_err().to_string();
        assert!(refused(device("x", Some(1))).contains("\"x\""));
        assert!(refused(device("c", None)).contains("major is missing"));
        assert!(refused(device("b", Some(-1))).contains("major -1"));
        assert!(refused(device("b", Some(4096))).contains("major 4096"));
        let mut climbing = device("c", Some(1));
        climbing.path = "/dev/../etc/x".into();
        assert!(refused(climbing).contains("/dev/../etc/x"));
    }

    #[test]
    fn a_rule_without_sense_is_named() {
        let rule = |kind: &str, access: &str, major| DeviceRule {
            allow: true,
            kind: Some(kind.into()),
            major,
            minor: None,
            access: Some(access.into()),
        };
        let refused = |rule| rules(&[rule]).unwrap_err().to_string();
        assert!(refused(rule("z", "r", None)).contains("\"z\""));
        assert!(refused(rule("c", "x", None)).contains("'x'"));
        assert!(refused(rule("c", "r", Some(-2))).contains("-2"));
        assert!(rules(&[rule("a", "", Some(-1))]).is_ok());
    }
}

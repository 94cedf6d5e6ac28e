//! What the stage is to do, worked out of the specification before anything is done.

mod program;
mod refusal;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::container::device::{self, Node};
use crate::container::mapping::Mapping;
use crate::container::option::{self, MountOptions};
use crate::container::seccomp::{self, Filter};
use crate::container::spec::{Mount, Process, Resources, Spec};

/// Most mounts, masked and read-only paths of a container.
const MOST_PATHS: usize = 1024;
pub use program::Program;

/// Why a specification is not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Not JSON, or not of the right shape.
    #[error("the OCI specification cannot be read: {0}")]
    Malformed(String),
    /// A value that makes no sense.
    #[error("{field}: {what}")]
    Invalid {
        /// The field, as in the specification.
        field: String,
        /// What is wrong.
        what: String,
    },
    /// A field this agent does not carry out.
    #[error("{field} is not supported: {why}")]
    Refused {
        /// The field, as in the specification.
        field: &'static str,
        /// Why.
        why: &'static str,
    },
}

/// Everything the stage needs to know.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The container's cgroup, a directory of the agent's.
    pub cgroup: String,
    /// Where the process is to live.
    pub place: Place,
    /// What to become.
    pub program: Program,
    /// Which system calls may be made, besides the filter that every container has.
    pub filter: Option<Filter>,
    /// The ids of the pod's user namespace, if it has one.
    pub mapping: Option<Mapping>,
}

/// Where a process is to live.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Place {
    /// In namespaces and a file tree of its own. With `shared_pids` the PID namespace is the one a
    /// descriptor sent along names, or that of the process it names.
    New {
        /// Whether to join a PID namespace that is there.
        shared_pids: bool,
        /// The file tree.
        tree: Box<Tree>,
    },
    /// In those of the process whose pidfd is sent along.
    Beside,
}

/// A container's file tree.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tree {
    /// The image's directory in the guest.
    pub lower: String,
    /// The container's own changes, with `upper` and `work` in it.
    pub scratch: String,
    /// Whether the root cannot be written.
    pub read_only: bool,
    /// In order.
    pub mounts: Vec<Mounting>,
    /// Hidden paths.
    pub masked: Vec<String>,
    /// Paths that cannot be written.
    pub frozen: Vec<String>,
    /// Device nodes besides the default ones.
    pub devices: Vec<Node>,
}

/// One mount.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mounting {
    /// Absolute path in the container.
    pub target: String,
    /// What.
    pub source: Source,
    /// How.
    pub options: MountOptions,
}

/// What is mounted.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// A new file system.
    FileSystem {
        /// Its name in the kernel.
        kind: String,
        /// Its source, which most ignore.
        source: String,
    },
    /// A path of the guest.
    Bind {
        /// Absolute.
        path: String,
        /// With the mounts below it.
        recursive: bool,
    },
    /// A small /dev with the devices every container has; with all of the guest's but its disks
    /// when the mount's options let devices be opened.
    Devices,
}

/// Where things of one container lie in the guest.
#[derive(Debug, Clone)]
pub struct Places {
    /// The container's cgroup.
    pub cgroup: String,
    /// The image, mounted.
    pub image: String,
    /// The container's part of the scratch disk.
    pub scratch: String,
    /// Files made for this container: (path in the container, path in the guest, read-only).
    pub files: Vec<(String, String, bool)>,
    /// Whether to join a PID namespace that is there.
    pub shared_pids: bool,
    /// The ids of the pod's user namespace, if it has one.
    pub mapping: Option<Mapping>,
}

fn invalid(field: impl Into<String>, what: impl Into<String>) -> PlanError {
    PlanError::Invalid {
        field: field.into(),
        what: what.into(),
    }
}

/// Reads a specification.
pub fn read_spec(json: &[u8]) -> Result<Spec, PlanError> {
    let malformed = |error: serde_json::Error| PlanError::Malformed(error.to_string());
    let value: Value = serde_json::from_slice(json).map_err(malformed)?;
    refusal::unread(&value)?;
    serde_json::from_value(value).map_err(malformed)
}

/// Whether a container has a PID namespace of its own, config-linux.md "Namespaces".
pub fn own_pids(spec: &Spec) -> bool {
    let mut namespaces = spec.linux.iter().flat_map(|linux| &linux.namespaces);
    namespaces.any(|namespace| namespace.kind == "pid")
}

/// Reads a specification's `process`, alone.
pub fn read_process(json: &[u8]) -> Result<Process, PlanError> {
    let malformed = |error: serde_json::Error| PlanError::Malformed(error.to_string());
    let value: Value = serde_json::from_slice(json).map_err(malformed)?;
    refusal::unread(&json!({ "process": value }))?;
    serde_json::from_value(value).map_err(malformed)
}

/// Reads a specification's `linux.resources`.
pub fn read_resources(json: &[u8]) -> Result<Resources, PlanError> {
    serde_json::from_slice(json).map_err(|error| PlanError::Malformed(error.to_string()))
}

/// Plans a container.
pub fn container(spec: &Spec, places: &Places) -> Result<Plan, PlanError> {
    refusal::unmade(spec)?;
    let process = spec
        .process
        .as_ref()
        .ok_or_else(|| invalid("process", "is missing"))?;
    let linux = spec.linux.as_ref();
    let masked = linux
        .map(|linux| linux.masked_paths.clone())
        .unwrap_or_default();
    let frozen = linux
        .map(|linux| linux.readonly_paths.clone())
        .unwrap_or_default();
    if spec.mounts.len().max(masked.len()).max(frozen.len()) > MOST_PATHS {
        return Err(invalid("mounts", format!("more than {MOST_PATHS} paths")));
    }
    for (field, paths) in [
        ("linux.maskedPaths", &masked),
        ("linux.readonlyPaths", &frozen),
    ] {
        for path in paths {
            absolute(field, path)?;
            let mut parts = path.split('/');
            if parts.all(|part| matches!(part, "" | "." | "..")) {
                return Err(invalid(field, format!("{path:?} is the root itself")));
            }
        }
    }
    let devices = linux.map(|linux| device::nodes(&linux.devices));
    let mut devices = devices.transpose()?.unwrap_or_default();
    let mut mounts = spec
        .mounts
        .iter()
        .map(mounting)
        .collect::<Result<Vec<_>, _>>()?;
    for (target, path, read_only) in &places.files {
        absolute("files", target)?;
        mounts.push(Mounting {
            target: target.clone(),
            source: Source::Bind {
                path: path.clone(),
                recursive: false,
            },
            options: MountOptions::file(*read_only),
        });
    }
    if let Some(mapping) = &places.mapping {
        for mounting in &mut mounts {
            if let Source::FileSystem { .. } = mounting.source {
                let data = &mut mounting.options.data;
                *data = data.iter().map(|option| mapping.option(option)).collect();
            }
        }
        for node in &mut devices {
            (node.uid, node.gid) = (mapping.user(node.uid), mapping.group(node.gid));
        }
    }
    Ok(Plan {
        cgroup: places.cgroup.clone(),
        mapping: places.mapping.clone(),
        place: Place::New {
            shared_pids: places.shared_pids,
            tree: Box::new(Tree {
                lower: places.image.clone(),
                scratch: places.scratch.clone(),
                read_only: spec.root.as_ref().is_some_and(|root| root.readonly),
                mounts,
                masked,
                frozen,
                devices,
            }),
        },
        program: program::program(process, places.mapping.as_ref())?,
        filter: linux
            .and_then(|linux| linux.seccomp.as_ref())
            .map(seccomp::filter)
            .transpose()?,
    })
}

/// Plans a further process of a container, under the container's filter.
pub fn exec(
    process: &Process,
    cgroup: &str,
    filter: Option<Filter>,
    mapping: Option<&Mapping>,
) -> Result<Plan, PlanError> {
    Ok(Plan {
        cgroup: cgroup.to_owned(),
        place: Place::Beside,
        program: program::program(process, mapping)?,
        filter,
        mapping: mapping.cloned(),
    })
}

fn absolute(field: &str, path: &str) -> Result<(), PlanError> {
    if path.starts_with('/') && path.len() < 4096 && !path.contains('\0') {
        Ok(())
    } else {
        Err(invalid(field, format!("{path:?} is not an absolute path")))
    }
}

fn mounting(mount: &Mount) -> Result<Mounting, PlanError> {
    let field = format!("mounts {}", mount.destination);
    absolute("mounts.destination", &mount.destination)?;
    let options = option::parse(&mount.options).map_err(|what| invalid(&field, what))?;
    if !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty() {
        return Err(PlanError::Refused {
            field: "mounts.uidMappings",
            why: "the ids are the pod's, which Prepare maps",
        });
    }
    let target = mount.destination.trim_end_matches('/').to_owned();
    if target.is_empty() {
        return Err(invalid(field, "the root itself cannot be mounted over"));
    }
    let kind = mount.kind.as_deref().unwrap_or_default();
    let source = mount.source.as_deref().unwrap_or_default();
    let source = match (target.as_str(), kind) {
        ("/dev", "tmpfs") => Source::Devices,
        // The pod has one, of the size the pod asks for.
        ("/dev/shm", "tmpfs") => Source::Bind {
            path: "/dev/shm".into(),
            recursive: false,
        },
        (_, "cgroup" | "cgroup2") => Source::FileSystem {
            kind: "cgroup2".into(),
            source: "cgroup".into(),
        },
        (_, "proc" | "sysfs" | "tmpfs" | "devpts" | "mqueue") => Source::FileSystem {
            kind: kind.into(),
            source: if source.is_empty() { kind } else { source }.into(),
        },
        _ if kind == "bind" || kind == "none" || options.bind.is_some() => {
            absolute(&format!("{field}: source"), source)?;
            Source::Bind {
                path: source.into(),
                recursive: options.bind.unwrap_or(true),
            }
        }
        _ => {
            let what = format!("file system {kind:?} is not mounted in containers");
            return Err(invalid(field, what));
        }
    };
    // The size of the shared /dev/shm and the mode of a bind's source are not the mount's.
    let options = match &source {
        Source::Bind { .. } => options.without_data(),
        // Its nodes are terminals, and nobody can make others there.
        Source::FileSystem { kind, .. } if kind == "devpts" => options.with_devices(),
        _ => options,
    };
    Ok(Mounting {
        target,
        source,
        options,
    })
}

#[cfg(test)]
mod tests;

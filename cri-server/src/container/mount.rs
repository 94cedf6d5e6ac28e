//! The mounts of a container.

use bulkhead_cri_api::v1 as cri;
use oci_spec::runtime::Mount;

use super::spec::SpecError;
use super::users::Ranges;

/// A small file of the host that is copied into the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFile {
    /// Where it is on the host.
    pub host_path: String,
    /// Where the container sees it; absolute.
    pub container_path: String,
    /// Whether the container may not write.
    pub read_only: bool,
    /// The mount's id mappings of users and groups; without any the ids are the host's.
    pub ids: Ranges,
}

/// The file systems every container has, before the mounts it asks for.
pub fn defaults(privileged: bool) -> Vec<Mount> {
    let access = if privileged { "rw" } else { "ro" };
    // The guest fills a /dev in which devices can be opened with all it has but the pod's disks.
    let devices = if privileged { "dev" } else { "nodev" };
    vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount(
            "/dev",
            "tmpfs",
            "tmpfs",
            &["nosuid", devices, "strictatime", "mode=755", "size=65536k"],
        ),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        // The pod's, which all its containers share.
        mount(
            "/dev/shm",
            "bind",
            "/dev/shm",
            &["rbind", "nosuid", "noexec", "nodev"],
        ),
        mount(
            "/dev/mqueue",
            "mqueue",
            "mqueue",
            &["nosuid", "noexec", "nodev"],
        ),
        mount(
            "/sys",
            "sysfs",
            "sysfs",
            &["nosuid", "noexec", "nodev", access],
        ),
        mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", access],
        ),
    ]
}

/// The host files among the mounts asked for. Whether a path is a small regular file is seen when
/// it is read; a mount that could be none is refused here.
pub fn host_files(asked: &[cri::Mount]) -> Result<Vec<HostFile>, SpecError> {
    asked.iter().map(host_file).collect()
}

fn host_file(mount: &cri::Mount) -> Result<HostFile, SpecError> {
    let path = &mount.container_path;
    let invalid = |reason: String| SpecError::Invalid {
        field: "mounts",
        reason,
    };
    let unsupported = |reason: String| SpecError::Unsupported {
        field: "mounts",
        reason,
    };
    let climbs = path.split('/').any(|part| part == "..");
    if !path.starts_with('/') || path.contains('\0') || climbs {
        return Err(invalid(format!(
            "the container path {path:?} is not a plain absolute path"
        )));
    }
    if cri::MountPropagation::try_from(mount.propagation).is_err() {
        return Err(invalid(format!(
            "{} at {path} is no propagation the CRI knows",
            mount.propagation
        )));
    }
    if mount.propagation() == cri::MountPropagation::PropagationBidirectional {
        return Err(unsupported(format!(
            "Bidirectional propagation at {path}: mounts made in a guest cannot appear on the host"
        )));
    }
    // Below a file is nothing, so that the CRI's terms are kept is all there is to it.
    let private = mount.propagation() == cri::MountPropagation::PropagationPrivate;
    if mount.recursive_read_only && !(mount.readonly && private) {
        return Err(invalid(format!(
            "recursive_read_only at {path} needs readonly and private propagation"
        )));
    }
    let of_image = mount.image.is_some() || !mount.image_sub_path.is_empty();
    if of_image || mount.host_path.is_empty() {
        return Err(unsupported(format!("{path} is an image volume")));
    }
    Ok(HostFile {
        host_path: mount.host_path.clone(),
        container_path: path.clone(),
        read_only: mount.readonly,
        ids: (mount.uid_mappings.clone(), mount.gid_mappings.clone()),
    })
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Mount {
    let options = options.iter().map(|option| option.to_string()).collect();
    let mut mount = Mount::default();
    mount
        .set_destination(destination.into())
        .set_typ(Some(kind.to_owned()))
        .set_source(Some(source.into()))
        .set_options(Some(options));
    mount
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_path_becomes_a_file_to_copy() {
        let mount = cri::Mount {
            host_path: "/var/lib/kubelet/hosts".into(),
            container_path: "/etc/hosts".into(),
            readonly: true,
            ..Default::default()
        };
        // The host's file keeps its label whatever is asked; the copy has none.
        let relabelled = cri::Mount {
            selinux_relabel: true,
            ..mount.clone()
        };
        let files = host_files(&[mount, relabelled]).unwrap();
        assert_eq!(files[0].container_path, "/etc/hosts");
        assert!(files[0].read_only);
        assert_eq!(files[0], files[1]);
    }

    #[test]
    fn what_cannot_be_copied_is_refused_and_named() {
        let refuse = |mount: cri::Mount, word: &str| {
            let refusal = host_files(&[mount]).unwrap_err().to_string();
            assert!(refusal.contains(word), "{refusal}");
        };
        let mount = cri::Mount {
            host_path: "/a".into(),
            container_path: "/data".into(),
            ..Default::default()
        };
        let mut shared = mount.clone();
        shared.set_propagation(cri::MountPropagation::PropagationBidirectional);
        refuse(shared, "Bidirectional");
        let climbing = cri::Mount {
            container_path: "/data/../etc".into(),
            ..mount.clone()
        };
        refuse(climbing, "/data/../etc");
        let writable = cri::Mount {
            recursive_read_only: true,
            ..mount.clone()
        };
        refuse(writable, "recursive_read_only");
        let part = cri::Mount {
            image_sub_path: "part".into(),
            ..mount.clone()
        };
        refuse(part, "image volume");
        let image = cri::Mount {
            host_path: String::new(),
            ..mount
        };
        refuse(image, "image volume");
    }
}

//! From the CRI's container configuration and the image's defaults to an OCI runtime spec.
//!
//! Pure: nothing here reads a file or asks the guest. Users stay names; the guest resolves them in
//! the image's own `/etc/passwd`.

mod process;
mod refusal;

use std::path::{Path, PathBuf};

use bulkhead_cri_api::v1 as cri;
use oci_spec::runtime::{Linux, LinuxNamespace, LinuxNamespaceType, Root, Spec};

use super::mount::HostFile;
use super::seccomp::{self, Asked};
use super::{device, mount, resource};

pub use process::exec as exec_process;
pub use refusal::check_pod;

/// What an image says about the processes started from it (OCI image specification, `config`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageDefaults {
    /// First part of the command line.
    pub entrypoint: Vec<String>,
    /// Rest of the command line.
    pub cmd: Vec<String>,
    /// `NAME=value` each.
    pub env: Vec<String>,
    /// Empty: `/`.
    pub working_dir: String,
    /// `user[:group]`, names or numbers; empty: root.
    pub user: String,
}

/// A container, ready for the guest.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The OCI runtime specification.
    pub spec: Spec,
    /// Files of the host to copy into the container.
    pub files: Vec<HostFile>,
    /// A file of the host whose text is yet to be given to [`Plan::confine`].
    pub profile: Option<PathBuf>,
    /// Whether the groups of the image that list the user are left out.
    pub strict_groups: bool,
    /// The container of the pod whose PID namespace is joined.
    pub pid_target: Option<String>,
}

impl Plan {
    /// Has the container confined by a seccomp profile, the text of the file `path`.
    pub fn confine(&mut self, path: &Path, text: &str) -> Result<(), SpecError> {
        let profile = seccomp::parse(path, text)?;
        let mut linux = self.spec.linux().clone().unwrap_or_default();
        linux.set_seccomp(Some(profile));
        self.spec.set_linux(Some(linux));
        Ok(())
    }
}

/// Why a container cannot be made as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// The request contradicts itself or the CRI.
    #[error("{field} cannot be used: {reason}")]
    Invalid {
        /// The CRI field.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A pod in a VM cannot do this, or this version cannot.
    #[error("{field} is not supported: {reason}")]
    Unsupported {
        /// The CRI field.
        field: &'static str,
        /// What stands against it.
        reason: String,
    },
}

/// Makes the plan of a container of `pod`.
pub fn plan(
    container: &cri::ContainerConfig,
    pod: &cri::PodSandboxConfig,
    image: &ImageDefaults,
) -> Result<Plan, SpecError> {
    let linux = container.linux.clone().unwrap_or_default();
    let security = linux.security_context.clone().unwrap_or_default();
    refusal::check_container(container, pod, &security)?;
    let limits = linux.resources.unwrap_or_default();

    let (nodes, rules) = device::devices(&container.devices, security.privileged)?;
    let mut resources = resource::limits(&limits)?;
    resources.set_devices(Some(rules));

    let mut runtime = Linux::default();
    runtime
        .set_devices(Some(nodes))
        .set_namespaces(Some(namespaces(&security)))
        .set_resources(Some(resources))
        .set_masked_paths(Some(Vec::new()))
        .set_readonly_paths(Some(Vec::new()));
    if !security.privileged {
        runtime
            .set_masked_paths(Some(security.masked_paths.clone()))
            .set_readonly_paths(Some(security.readonly_paths.clone()));
    }

    let mut process = process::first(container, pod, image, &security)?;
    let profile = match seccomp::asked(&security)? {
        Asked::Unconfined => None,
        Asked::Default => {
            let sets = process.capabilities().clone().unwrap_or_default();
            let bounding = sets.bounding().clone().unwrap_or_default();
            runtime.set_seccomp(Some(seccomp::default_profile(&bounding)?));
            None
        }
        Asked::File(path) => Some(path),
    };
    process.set_oom_score_adj(i32::try_from(limits.oom_score_adj).ok());

    let mut root = Root::default();
    root.set_path("rootfs".into())
        .set_readonly(Some(security.readonly_rootfs));

    let mut spec = Spec::default();
    spec.set_version("1.2.0".to_owned())
        .set_root(Some(root))
        .set_process(Some(process))
        // The pod's, which all its containers share.
        .set_hostname(None)
        .set_mounts(Some(mount::defaults(security.privileged)))
        .set_annotations(None)
        .set_linux(Some(runtime));
    Ok(Plan {
        spec,
        files: mount::host_files(&container.mounts)?,
        profile,
        strict_groups: security.supplemental_groups_policy()
            == cri::SupplementalGroupsPolicy::Strict,
        pid_target: pid_target(&security)?,
    })
}

/// The container whose PID namespace is joined (CRI `NamespaceOption.target_id`).
fn pid_target(security: &cri::LinuxContainerSecurityContext) -> Result<Option<String>, SpecError> {
    let options = security.namespace_options.clone().unwrap_or_default();
    match options.pid() {
        cri::NamespaceMode::Target if options.target_id.is_empty() => {
            Err(invalid("namespace_options.target_id", "TARGET needs one"))
        }
        cri::NamespaceMode::Target => Ok(Some(options.target_id)),
        _ => Ok(None),
    }
}

/// The namespaces made for a container; network, UTS and IPC are the guest's, which are the pod's.
/// Without an entry for PID the guest puts it into the pod's, or into that of `pid_target`.
fn namespaces(security: &cri::LinuxContainerSecurityContext) -> Vec<LinuxNamespace> {
    let options = security.namespace_options.clone().unwrap_or_default();
    let mut types = vec![LinuxNamespaceType::Mount, LinuxNamespaceType::Cgroup];
    if options.pid() == cri::NamespaceMode::Container {
        types.push(LinuxNamespaceType::Pid);
    }
    types
        .into_iter()
        .map(|kind| {
            let mut namespace = LinuxNamespace::default();
            namespace.set_typ(kind);
            namespace
        })
        .collect()
}

fn identifier(value: i64, field: &'static str) -> Result<u32, SpecError> {
    // 2^32 - 1 means "no id" to the kernel.
    match u32::try_from(value) {
        Ok(id) if id != u32::MAX => Ok(id),
        _ => Err(invalid(field, format!("{value} is no id"))),
    }
}

fn invalid(field: &'static str, reason: impl Into<String>) -> SpecError {
    SpecError::Invalid {
        field,
        reason: reason.into(),
    }
}

fn unsupported(field: &'static str, reason: impl Into<String>) -> SpecError {
    SpecError::Unsupported {
        field,
        reason: reason.into(),
    }
}

#[cfg(test)]
mod snapshots;
#[cfg(test)]
mod tests;

//! From the CRI's container configuration and the image's defaults to an OCI runtime spec.
//!
//! Pure: nothing here reads a file or asks the guest. Users stay names; the guest resolves them in
//! the image's own `/etc/passwd`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bulkhead_cri_api::v1 as cri;
use oci_spec::runtime::{
    Linux, LinuxNamespace, LinuxNamespaceType, PosixRlimitBuilder, PosixRlimitType, Process, Root,
    Spec, User,
};

use super::mount::HostFile;
use super::seccomp::{self, Asked};
use super::{capability, device, mount, resource, users};

/// Where programs are looked for when nobody says (OCI image specification, and every runtime).
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What programs are told of a terminal when nobody says more, as by containerd and docker.
const TERMINAL: &str = "xterm";
/// Open files a process may have; what container engines grant.
const OPEN_FILES: u64 = 1 << 20;

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

/// Refuses what no pod in a VM can have, naming the field.
pub fn check_pod(pod: &cri::PodSandboxConfig) -> Result<(), SpecError> {
    let linux = pod.linux.clone().unwrap_or_default();
    let security = linux.security_context.unwrap_or_default();
    if let Some(namespaces) = &security.namespace_options {
        check_namespaces(namespaces)?;
        if namespaces.pid() == cri::NamespaceMode::Target {
            let reason = "TARGET is for a container; a pod is there before any";
            return Err(invalid("namespace_options.pid", reason));
        }
    }
    check_labels(security.selinux_options.as_ref())?;
    check_apparmor(security.apparmor.as_ref())?;
    check_policy(security.supplemental_groups_policy)?;
    if let Some(profile) = &security.seccomp {
        seccomp::known(profile)?;
    }
    if pod.windows.is_some() {
        return Err(unsupported("windows", "pods are Linux"));
    }
    for limits in linux.resources.iter().chain(&linux.overhead) {
        resource::check_pod(limits)?;
        resource::limits(limits)?;
    }
    for (name, value) in &linux.sysctls {
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
        if name.is_empty() || !name.chars().all(plain) || name.contains("..") {
            return Err(invalid(
                "sysctls",
                format!("{name:?} is no sysctl (value {value:?})"),
            ));
        }
    }
    Ok(())
}

fn check_namespaces(options: &cri::NamespaceOption) -> Result<(), SpecError> {
    let modes = [
        ("namespace_options.network", options.network),
        ("namespace_options.pid", options.pid),
        ("namespace_options.ipc", options.ipc),
    ];
    for (field, mode) in modes {
        if cri::NamespaceMode::try_from(mode).is_err() {
            return Err(invalid(field, format!("{mode} is no mode the CRI knows")));
        }
    }
    let host = "a pod in a VM has no part in the host's namespaces";
    if options.network() == cri::NamespaceMode::Node {
        return Err(unsupported(
            "namespace_options.network NODE (hostNetwork)",
            host,
        ));
    }
    if options.pid() == cri::NamespaceMode::Node {
        return Err(unsupported("namespace_options.pid NODE (hostPID)", host));
    }
    if options.ipc() == cri::NamespaceMode::Node {
        return Err(unsupported("namespace_options.ipc NODE (hostIPC)", host));
    }
    users::ranges(Some(options))?;
    Ok(())
}

/// Makes the plan of a container of `pod`.
pub fn plan(
    container: &cri::ContainerConfig,
    pod: &cri::PodSandboxConfig,
    image: &ImageDefaults,
) -> Result<Plan, SpecError> {
    let linux = container.linux.clone().unwrap_or_default();
    let security = linux.security_context.clone().unwrap_or_default();
    check_container(container, pod, &security)?;
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

    let mut process = process(container, pod, image, &security)?;
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

/// The process that `command` makes in a container whose own process is `container`, with a
/// terminal or without (CRI `ExecSyncRequest`, `ExecRequest`).
pub fn exec_process(
    container: &Process,
    command: &[String],
    terminal: bool,
) -> Result<Process, SpecError> {
    if command.is_empty() {
        return Err(invalid("cmd", "it is empty"));
    }
    let mut process = container.clone();
    process
        .set_args(Some(command.to_vec()))
        .set_terminal(Some(terminal));
    let mut environment = process.env().clone().unwrap_or_default();
    if terminal && !environment.iter().any(|entry| entry.starts_with("TERM=")) {
        environment.push(format!("TERM={TERMINAL}"));
        process.set_env(Some(environment));
    }
    Ok(process)
}

fn check_container(
    container: &cri::ContainerConfig,
    pod: &cri::PodSandboxConfig,
    security: &cri::LinuxContainerSecurityContext,
) -> Result<(), SpecError> {
    if let Some(options) = &security.namespace_options {
        check_namespaces(options)?;
    }
    let own = security.namespace_options.as_ref();
    let linux = pod.linux.as_ref();
    let of_pod = linux.and_then(|linux| linux.security_context.as_ref());
    let of_pod = of_pod.and_then(|security| security.namespace_options.as_ref());
    users::check_container(container, own, of_pod)?;
    if container.windows.is_some() {
        return Err(unsupported("windows", "containers are Linux"));
    }
    let pod = pod.linux.clone().unwrap_or_default();
    if security.privileged && !pod.security_context.unwrap_or_default().privileged {
        return Err(invalid(
            "security_context.privileged",
            "the pod was not made for privileged containers",
        ));
    }
    if let Some(device) = container.cdi_devices.first() {
        let reason = format!("the host's {} does not exist in the guest", device.name);
        return Err(unsupported("cdi_devices", reason));
    }
    if cri::Signal::try_from(container.stop_signal).is_err() {
        let reason = format!("{} is no signal the CRI knows", container.stop_signal);
        return Err(invalid("stop_signal", reason));
    }
    check_policy(security.supplemental_groups_policy)?;
    check_apparmor(security.apparmor.as_ref())?;
    // Deprecated, and still filled in by old kubelets.
    #[allow(deprecated)]
    let profile = security.apparmor_profile.as_str();
    if !["", "unconfined", "runtime/default"].contains(&profile) {
        let reason = format!("the guest has no {profile}");
        return Err(unsupported("apparmor_profile", reason));
    }
    check_labels(security.selinux_options.as_ref())
}

fn check_labels(labels: Option<&cri::SeLinuxOption>) -> Result<(), SpecError> {
    if labels.is_some_and(|labels| *labels != cri::SeLinuxOption::default()) {
        return Err(unsupported(
            "security_context.selinux_options",
            "the host's labels mean nothing in the guest",
        ));
    }
    Ok(())
}

fn check_policy(policy: i32) -> Result<(), SpecError> {
    match cri::SupplementalGroupsPolicy::try_from(policy) {
        Ok(_) => Ok(()),
        Err(_) => Err(invalid(
            "security_context.supplemental_groups_policy",
            format!("{policy} is no policy the CRI knows"),
        )),
    }
}

fn check_apparmor(profile: Option<&cri::SecurityProfile>) -> Result<(), SpecError> {
    use cri::security_profile::ProfileType;
    let Some(profile) = profile else {
        return Ok(());
    };
    let reason = match ProfileType::try_from(profile.profile_type) {
        Ok(ProfileType::RuntimeDefault | ProfileType::Unconfined) => return Ok(()),
        Ok(ProfileType::Localhost) => {
            format!("the guest has no profile {}", profile.localhost_ref)
        }
        Err(_) => format!("{} is no type of profile", profile.profile_type),
    };
    Err(unsupported("security_context.apparmor", reason))
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

fn process(
    container: &cri::ContainerConfig,
    pod: &cri::PodSandboxConfig,
    image: &ImageDefaults,
    security: &cri::LinuxContainerSecurityContext,
) -> Result<Process, SpecError> {
    let asked = security.capabilities.clone().unwrap_or_default();
    let open_files = PosixRlimitBuilder::default()
        .typ(PosixRlimitType::RlimitNofile)
        .hard(OPEN_FILES)
        .soft(OPEN_FILES)
        .build()
        .map_err(|error| invalid("rlimits", error.to_string()))?;
    let mut process = Process::default();
    process
        .set_terminal(Some(container.tty))
        .set_args(Some(arguments(container, image)?))
        .set_env(Some(environment(container, pod, image)?))
        .set_cwd(working_directory(container, image)?.into())
        .set_user(user(security, image)?)
        .set_capabilities(Some(capability::sets(&asked, security.privileged)?))
        .set_rlimits(Some(vec![open_files]))
        .set_no_new_privileges(Some(security.no_new_privs && !security.privileged));
    Ok(process)
}

/// `command` replaces the image's entrypoint and drops its cmd, `args` replaces its cmd.
fn arguments(
    container: &cri::ContainerConfig,
    image: &ImageDefaults,
) -> Result<Vec<String>, SpecError> {
    let mut line = container.command.clone();
    let mut rest = container.args.clone();
    if line.is_empty() {
        line = image.entrypoint.clone();
        if rest.is_empty() {
            rest = image.cmd.clone();
        }
    }
    line.extend(rest);
    match line.first() {
        None => Err(invalid(
            "command",
            "neither the container nor its image names a program",
        )),
        Some(program) if program.is_empty() => {
            Err(invalid("command", "the program's name is empty"))
        }
        Some(_) if line.iter().any(|word| word.contains('\0')) => {
            Err(invalid("command", "an argument contains a NUL"))
        }
        Some(_) => Ok(line),
    }
}

/// The image's environment, overlaid with the container's, in stable order.
fn environment(
    container: &cri::ContainerConfig,
    pod: &cri::PodSandboxConfig,
    image: &ImageDefaults,
) -> Result<Vec<String>, SpecError> {
    let mut order = Vec::new();
    let mut values = BTreeMap::new();
    let mut set = |name: &str, value: &str| {
        if values.insert(name.to_owned(), value.to_owned()).is_none() {
            order.push(name.to_owned());
        }
    };
    set("PATH", DEFAULT_PATH);
    if !pod.hostname.is_empty() {
        set("HOSTNAME", &pod.hostname);
    }
    if container.tty {
        set("TERM", TERMINAL);
    }
    for entry in &image.env {
        let (name, value) = entry.split_once('=').unwrap_or((entry, ""));
        set(name, value);
    }
    for entry in &container.envs {
        if entry.key.is_empty() || entry.key.contains(['=', '\0']) || entry.value.contains('\0') {
            return Err(invalid(
                "envs",
                format!("{:?} is no name of a variable", entry.key),
            ));
        }
        set(&entry.key, &entry.value);
    }
    Ok(order
        .into_iter()
        .filter_map(|name| values.get(&name).map(|value| format!("{name}={value}")))
        .collect())
}

fn working_directory(
    container: &cri::ContainerConfig,
    image: &ImageDefaults,
) -> Result<String, SpecError> {
    let asked = [&container.working_dir, &image.working_dir];
    let directory = asked.into_iter().find(|directory| !directory.is_empty());
    let directory = directory.map_or("/", String::as_str);
    if !directory.starts_with('/') {
        return Err(invalid(
            "working_dir",
            format!("{directory:?} is not absolute"),
        ));
    }
    Ok(directory.to_owned())
}

/// The user as `username` in the form of the image's `User` (`user[:group]`), which the guest
/// resolves; `uid` and `gid` already hold what was given as a number.
fn user(
    security: &cri::LinuxContainerSecurityContext,
    image: &ImageDefaults,
) -> Result<User, SpecError> {
    let group = security.run_as_group.as_ref().map(|group| group.value);
    let asked = match (&security.run_as_user, security.run_as_username.as_str()) {
        (Some(user), _) => Some(identifier(user.value, "run_as_user")?.to_string()),
        (None, "") => None,
        (None, name) => Some(name.to_owned()),
    };
    if group.is_some() && asked.is_none() {
        return Err(invalid(
            "run_as_group",
            "it needs run_as_user or run_as_username",
        ));
    }
    let mut name = match asked {
        Some(user) => user,
        None if image.user.is_empty() => "0".to_owned(),
        None => image.user.clone(),
    };
    if let Some(group) = group {
        name = format!("{name}:{}", identifier(group, "run_as_group")?);
    }
    let (user, group) = name.split_once(':').unwrap_or((&name, ""));
    let mut resolved = User::default();
    resolved.set_uid(user.parse().unwrap_or(0));
    resolved.set_gid(group.parse().unwrap_or(0));
    let additional = security
        .supplemental_groups
        .iter()
        .map(|&group| identifier(group, "supplemental_groups"))
        .collect::<Result<Vec<_>, _>>()?;
    resolved.set_additional_gids(Some(additional));
    resolved.set_username(Some(name));
    Ok(resolved)
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
mod tests;

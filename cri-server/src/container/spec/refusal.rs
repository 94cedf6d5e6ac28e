//! What no pod or container in a VM can have, refused by the name of its field. Pure.

use bulkhead_cri_api::v1 as cri;

use super::{SpecError, identifier, invalid, unsupported};
use crate::container::{resource, seccomp, users};
use crate::network::NO_SCTP;

/// `__NEW_UTS_LEN` of the kernel (include/uapi/linux/utsname.h), in bytes.
const LONGEST_HOSTNAME: usize = 64;

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
    check_ids(&security)?;
    check_names(pod)?;
    check_labels(security.selinux_options.as_ref())?;
    check_apparmor(security.apparmor.as_ref())?;
    check_policy(security.supplemental_groups_policy)?;
    if let Some(profile) = &security.seccomp {
        seccomp::known(profile)?;
    }
    if pod.windows.is_some() {
        return Err(unsupported("windows", "pods are Linux"));
    }
    // One without a port of the host says what the pod has, and asks for nothing.
    let mut wanted = pod.port_mappings.iter().filter(|port| port.host_port > 0);
    if wanted.any(|port| port.protocol() == cri::Protocol::Sctp) {
        return Err(unsupported("port_mappings.protocol SCTP", NO_SCTP));
    }
    for limits in linux.resources.iter().chain(&linux.overhead) {
        resource::check_pod(limits)?;
        resource::limits(limits)?;
    }
    for (name, value) in &linux.sysctls {
        check_sysctl(name, value)?;
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
    // The proto has modes of its own for none of these two: "Namespaces currently set by the
    // kubelet: POD, NODE". A pod's containers see one network and one IPC namespace.
    for (field, mode) in [
        ("namespace_options.network", options.network()),
        ("namespace_options.ipc", options.ipc()),
    ] {
        if mode != cri::NamespaceMode::Pod {
            let reason = format!("{}: a pod has one for all", mode.as_str_name());
            return Err(unsupported(field, reason));
        }
    }
    users::ranges(Some(options))?;
    Ok(())
}

/// The ids of a pod's own process, which it has none of: they are nobody's, but must be ids.
fn check_ids(security: &cri::LinuxSandboxSecurityContext) -> Result<(), SpecError> {
    if let Some(user) = &security.run_as_user {
        identifier(user.value, "security_context.run_as_user")?;
    }
    if let Some(group) = &security.run_as_group {
        let field = "security_context.run_as_group";
        identifier(group.value, field)?;
        if security.run_as_user.is_none() {
            return Err(invalid(field, "it needs run_as_user"));
        }
    }
    for group in &security.supplemental_groups {
        identifier(*group, "security_context.supplemental_groups")?;
    }
    Ok(())
}

/// What becomes lines of the pod's /etc/hosts, /etc/hostname and /etc/resolv.conf.
fn check_names(pod: &cri::PodSandboxConfig) -> Result<(), SpecError> {
    let hostname = &pod.hostname;
    if hostname.len() > LONGEST_HOSTNAME {
        let reason = format!(
            "{hostname:?} has {} bytes, and the kernel takes {LONGEST_HOSTNAME}",
            hostname.len()
        );
        return Err(invalid("hostname", reason));
    }
    let broken = |c: char| c.is_control() || c.is_whitespace();
    if hostname.contains(broken) {
        let reason = format!("{hostname:?} has a space or a control character in it");
        return Err(invalid("hostname", reason));
    }
    let dns = pod.dns_config.clone().unwrap_or_default();
    for (field, words) in [
        ("dns_config.servers", &dns.servers),
        ("dns_config.searches", &dns.searches),
        ("dns_config.options", &dns.options),
    ] {
        if let Some(word) = words.iter().find(|word| word.contains(char::is_control)) {
            let reason = format!("{word:?} has a control character in it");
            return Err(invalid(field, reason));
        }
    }
    Ok(())
}

fn check_sysctl(name: &str, value: &str) -> Result<(), SpecError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
    let reason = if name.is_empty() || !name.chars().all(plain) || name.contains("..") {
        format!("{name:?} is no sysctl (value {value:?})")
    } else if value.is_empty() {
        // Writing nothing changes nothing.
        format!("{name} has no value")
    } else if value.contains(|c: char| c.is_control() && c != '\t') {
        // The kernel reads a text to its first line break or NUL (kernel/sysctl.c).
        format!("{name} would not take all of {value:?}: a control character ends a value")
    } else {
        return Ok(());
    };
    Err(invalid("sysctls", reason))
}

/// A cover over the root would be above the root that processes have, and hide nothing.
fn check_paths(security: &cri::LinuxContainerSecurityContext) -> Result<(), SpecError> {
    for (field, paths, instead) in [
        ("security_context.masked_paths", &security.masked_paths, ""),
        (
            "security_context.readonly_paths",
            &security.readonly_paths,
            "; readonly_rootfs is for that",
        ),
    ] {
        if let Some(path) = paths.iter().find(|path| is_root(path)) {
            let reason = format!("{path:?} is the root itself{instead}");
            return Err(invalid(field, reason));
        }
    }
    Ok(())
}

/// Whether an absolute path leads to the root, links left aside.
fn is_root(path: &str) -> bool {
    let mut depth = 0usize;
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => depth = depth.saturating_sub(1),
            _ => depth += 1,
        }
    }
    path.starts_with('/') && depth == 0
}

/// Refuses what no container of `pod` can have, naming the field.
pub(super) fn check_container(
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
    check_paths(security)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_values_without_sense_are_refused_and_named() {
        type Set = fn(&mut cri::PodSandboxConfig, &mut cri::LinuxPodSandboxConfig);
        fn security(
            linux: &mut cri::LinuxPodSandboxConfig,
        ) -> &mut cri::LinuxSandboxSecurityContext {
            linux.security_context.get_or_insert_default()
        }
        fn sysctl(linux: &mut cri::LinuxPodSandboxConfig, value: &str) {
            linux.sysctls = [("kernel.msgmax".to_owned(), value.to_owned())].into();
        }
        let table: [(&str, &str, Set); 17] = [
            ("port_mappings", "SCTP", |pod, _| {
                pod.port_mappings = vec![cri::PortMapping {
                    protocol: cri::Protocol::Sctp.into(),
                    host_port: 80,
                    ..Default::default()
                }];
            }),
            ("apparmor", "no profile mine", |_, linux| {
                security(linux).apparmor = Some(cri::SecurityProfile {
                    profile_type: cri::security_profile::ProfileType::Localhost.into(),
                    localhost_ref: "mine".into(),
                });
            }),
            ("run_as_user", "-1", |_, linux| {
                security(linux).run_as_user = Some(cri::Int64Value { value: -1 });
            }),
            ("run_as_group", "-2", |_, linux| {
                security(linux).run_as_group = Some(cri::Int64Value { value: -2 });
            }),
            ("run_as_group", "run_as_user", |_, linux| {
                security(linux).run_as_group = Some(cri::Int64Value { value: 2 });
            }),
            ("supplemental_groups", "4294967295", |_, linux| {
                security(linux).supplemental_groups = vec![1, 4_294_967_295];
            }),
            ("hostname", "65 bytes", |pod, _| {
                pod.hostname = "h".repeat(65);
            }),
            ("hostname", "\\n", |pod, _| {
                pod.hostname = "a\n6.6.6.6 bank".into()
            }),
            ("hostname", "a b", |pod, _| pod.hostname = "a b".into()),
            ("hostname", "\\0", |pod, _| pod.hostname = "a\0".into()),
            ("dns_config.servers", "\\n", |pod, _| {
                pod.dns_config.get_or_insert_default().servers = vec!["1.1.1.1\nx".into()];
            }),
            ("dns_config.searches", "\\0", |pod, _| {
                pod.dns_config.get_or_insert_default().searches = vec!["a\0".into()];
            }),
            ("dns_config.options", "\\r", |pod, _| {
                pod.dns_config.get_or_insert_default().options = vec!["a\r".into()];
            }),
            ("kernel.msgmax", "no value", |_, linux| sysctl(linux, "")),
            ("kernel.msgmax", "\\n", |_, linux| sysctl(linux, "1\n2")),
            ("kernel.msgmax", "\\0", |_, linux| sysctl(linux, "1\0")),
            ("namespace_options.ipc", "TARGET", |_, linux| {
                let options = &mut security(linux).namespace_options;
                options
                    .get_or_insert_default()
                    .set_ipc(cri::NamespaceMode::Target);
            }),
        ];
        for (field, why, set) in table {
            let mut pod = cri::PodSandboxConfig::default();
            let mut linux = cri::LinuxPodSandboxConfig::default();
            set(&mut pod, &mut linux);
            pod.linux = Some(linux);
            let refusal = check_pod(&pod).unwrap_err().to_string();
            assert!(
                refusal.contains(field) && refusal.contains(why),
                "{refusal}"
            );
        }
    }

    #[test]
    fn a_pods_values_may_be_the_kernels_longest_and_have_tabs() {
        let linux = cri::LinuxPodSandboxConfig {
            sysctls: [("net.ipv4.ip_local_port_range".into(), "1024\t65535".into())].into(),
            security_context: Some(cri::LinuxSandboxSecurityContext {
                run_as_user: Some(cri::Int64Value { value: 65_535 }),
                run_as_group: Some(cri::Int64Value { value: 65_535 }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let pod = cri::PodSandboxConfig {
            hostname: "h".repeat(64),
            linux: Some(linux),
            ..Default::default()
        };
        assert_eq!(check_pod(&pod), Ok(()));
    }

    #[test]
    fn the_root_is_known_by_any_of_its_names() {
        for path in ["/", "//", "/.", "/proc/..", "/a/../../b/.."] {
            assert!(is_root(path), "{path}");
        }
        for path in ["/proc", "/proc/.", "/a/../b", "..", ""] {
            assert!(!is_root(path), "{path}");
        }
    }
}

//! Fields of a specification that are not carried out: each is refused by its name.

use serde_json::Value;

use super::PlanError;
use crate::container::spec::Spec;

/// Fields that are refused as soon as they hold anything, and why.
pub(super) const REFUSED: [(&str, &str); 18] = [
    (
        "process.apparmorProfile",
        "the guest has no AppArmor; its kernel is the confinement",
    ),
    (
        "process.selinuxLabel",
        "the guest has no SELinux; its kernel is the confinement",
    ),
    ("process.commandLine", "it is for Windows"),
    ("process.scheduler", "scheduling policies are not set"),
    ("process.ioPriority", "I/O priorities are not set"),
    ("process.execCPUAffinity", "affinities are not set"),
    ("hostname", "the pod's name is set by Prepare"),
    ("domainname", "the pod's name is set by Prepare"),
    (
        "linux.rootfsPropagation",
        "a container's mounts stay its own",
    ),
    ("linux.mountLabel", "the guest has no SELinux"),
    (
        "linux.cgroupsPath",
        "a container's group is below the pod's, by its id",
    ),
    ("linux.timeOffsets", "time namespaces are not made"),
    ("linux.intelRdt", "the guest has no cache to divide"),
    (
        "linux.personality",
        "programs choose their execution domain themselves",
    ),
    (
        "linux.netDevices",
        "the pod's devices are set up by Prepare",
    ),
    ("linux.memoryPolicy", "the guest has one memory node"),
    (
        "linux.resources.network",
        "cgroup v2 has no such controller",
    ),
    ("linux.resources.rdma", "the guest has no such devices"),
];

/// Refuses what the agent's own types do not read.
pub fn unread(spec: &Value) -> Result<(), PlanError> {
    for (field, why) in REFUSED {
        let pointer = format!("/{}", field.replace('.', "/"));
        if spec.pointer(&pointer).is_some_and(says_something) {
            return Err(PlanError::Refused { field, why });
        }
    }
    Ok(())
}

fn says_something(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        Value::Bool(true) | Value::Number(_) => true,
    }
}

/// Refuses what is read and not made.
pub fn unmade(spec: &Spec) -> Result<(), PlanError> {
    let refused = |field, why| Err(PlanError::Refused { field, why });
    if spec
        .hooks
        .iter()
        .flatten()
        .any(|(_, hooks)| hooks.as_array().is_none_or(|h| !h.is_empty()))
    {
        return refused("hooks", "programs of the host cannot run in the guest");
    }
    let Some(linux) = &spec.linux else {
        return Ok(());
    };
    for namespace in &linux.namespaces {
        if namespace.path.as_ref().is_some_and(|path| !path.is_empty()) {
            return refused(
                "linux.namespaces.path",
                "a container joins its pod's namespaces only",
            );
        }
        if matches!(namespace.kind.as_str(), "user" | "time") {
            return refused(
                "linux.namespaces",
                "a container makes no user or time namespace: the pod's is Prepare's",
            );
        }
    }
    if !linux.uid_mappings.is_empty() || !linux.gid_mappings.is_empty() {
        return refused(
            "linux.uidMappings",
            "the ids are the pod's, which Prepare maps",
        );
    }
    if !linux.sysctl.is_empty() {
        return refused("linux.sysctl", "sysctls belong to the pod, see Prepare");
    }
    Ok(())
}

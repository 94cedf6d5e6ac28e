//! Which system calls a container may make: CRI `SecurityProfile` to the specification's `seccomp`.

mod default;

use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use bulkhead_cri_api::v1 as cri;
use cri::security_profile::ProfileType;
use oci_spec::runtime::LinuxSeccomp;
use serde_json::Value;

use super::spec::SpecError;

pub use default::profile as default_profile;

const FIELD: &str = "security_context.seccomp";
/// The largest profile, in bytes. Its filter can have 4,096 instructions, so this is ample.
const LARGEST: u64 = 1 << 20;

/// The profile a container asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// None.
    Unconfined,
    /// The list of this runtime.
    Default,
    /// A file of the node, by its absolute path.
    File(PathBuf),
}

/// What a container asks for. A privileged one is not confined, whatever it asks for; one that says
/// nothing is not either.
pub fn asked(security: &cri::LinuxContainerSecurityContext) -> Result<Asked, SpecError> {
    if security.privileged {
        return Ok(Asked::Unconfined);
    }
    let Some(profile) = &security.seccomp else {
        return by_name(security);
    };
    match known(profile)? {
        ProfileType::RuntimeDefault => Ok(Asked::Default),
        ProfileType::Unconfined => Ok(Asked::Unconfined),
        ProfileType::Localhost => file(&profile.localhost_ref),
    }
}

/// The type of a profile, if it is one.
pub fn known(profile: &cri::SecurityProfile) -> Result<ProfileType, SpecError> {
    ProfileType::try_from(profile.profile_type)
        .map_err(|_| invalid(format!("{} is no type of profile", profile.profile_type)))
}

/// The form before Kubernetes 1.19: a word.
fn by_name(security: &cri::LinuxContainerSecurityContext) -> Result<Asked, SpecError> {
    #[allow(deprecated)]
    let name = security.seccomp_profile_path.as_str();
    match name {
        "" | "unconfined" => Ok(Asked::Unconfined),
        "runtime/default" | "docker/default" => Ok(Asked::Default),
        _ if name.starts_with(LOCALHOST) => file(name),
        _ => Err(invalid(format!("{name:?} names no profile"))),
    }
}

/// What some clients put before the path.
const LOCALHOST: &str = "localhost/";

fn file(reference: &str) -> Result<Asked, SpecError> {
    let path = reference.strip_prefix(LOCALHOST).unwrap_or(reference);
    if !path.starts_with('/') {
        return Err(invalid(format!(
            "the profile {reference:?} is not the absolute path of a file on the node"
        )));
    }
    Ok(Asked::File(path.into()))
}

/// Reads a profile of the node. Blocks.
pub fn read(path: &Path) -> Result<String, SpecError> {
    let failed = |why: &dyn std::fmt::Display| {
        invalid(format!(
            "the profile {} on the node cannot be read: {why}",
            path.display()
        ))
    };
    // Opening a FIFO or a device must neither wait nor do anything.
    let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOCTTY;
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path)
        .map_err(|error| failed(&error))?;
    if !file.metadata().map_err(|error| failed(&error))?.is_file() {
        return Err(failed(&"it is not a regular file"));
    }
    let mut text = String::new();
    file.take(LARGEST + 1)
        .read_to_string(&mut text)
        .map_err(|error| failed(&error))?;
    if text.len() as u64 > LARGEST {
        return Err(failed(&"it is larger than 1 MiB"));
    }
    Ok(text)
}

/// Makes a profile of the text of the file `path`: the specification's `linux.seccomp` as JSON.
///
/// What container engines add to that for profiles of their own is refused, as without it the
/// profile would say something else: rules for some architectures or capabilities would hold for
/// all. So is a field that is misspelt or there twice.
pub fn parse(path: &Path, text: &str) -> Result<LinuxSeccomp, SpecError> {
    let wrong = |why: &dyn std::fmt::Display| {
        invalid(format!(
            "the profile {} is not linux.seccomp of an OCI runtime specification: {why}",
            path.display()
        ))
    };
    let json: Value = serde_json::from_str(text).map_err(|error| wrong(&error))?;
    known_only(&json, &PROFILE).map_err(|why| wrong(&why))?;
    for rule in json["syscalls"].as_array().into_iter().flatten() {
        known_only(rule, &RULE).map_err(|why| wrong(&why))?;
        for argument in rule["args"].as_array().into_iter().flatten() {
            known_only(argument, &ARGUMENT).map_err(|why| wrong(&why))?;
        }
    }
    // Once more from the text, in which a field that is there twice is seen.
    serde_json::from_str(text).map_err(|error| wrong(&error))
}

/// Fields of `linux.seccomp` (config-linux.md "Seccomp"), and what engines write beside them.
const PROFILE: [&str; 10] = [
    "defaultAction",
    "defaultErrnoRet",
    "architectures",
    "flags",
    "listenerPath",
    "listenerMetadata",
    "syscalls",
    "archMap",
    "comment",
    "defaultErrno",
];
/// Fields of a rule, and what engines write beside them.
const RULE: [&str; 8] = [
    "names", "action", "errnoRet", "args", "comment", "includes", "excludes", "errno",
];
/// Fields of a condition.
const ARGUMENT: [&str; 4] = ["index", "value", "valueTwo", "op"];

/// Refuses what nobody would read: a field that is misspelt, and a field of an engine that means
/// something.
fn known_only(value: &Value, known: &[&str]) -> Result<(), String> {
    let Some(fields) = value.as_object() else {
        return Err(format!("invalid type: {value} is no object"));
    };
    for (name, value) in fields {
        let name = name.as_str();
        if !known.contains(&name) {
            return Err(format!("{name:?} is no field of it ({})", known.join(", ")));
        }
        let nothing = match value {
            Value::Null => true,
            Value::Array(items) => items.is_empty(),
            Value::Object(fields) => fields.is_empty(),
            // The name of a number that is there, too.
            Value::String(_) => fields.contains_key(&format!("{name}Ret")),
            _ => false,
        };
        let foreign = ["archMap", "includes", "excludes", "errno", "defaultErrno"];
        if foreign.contains(&name) && !nothing {
            return Err(format!("{name} is not part of that"));
        }
    }
    Ok(())
}

fn invalid(reason: String) -> SpecError {
    SpecError::Invalid {
        field: FIELD,
        reason,
    }
}

#[cfg(test)]
mod tests;

//! The process of a container, and those that join it. Pure.

use std::collections::BTreeMap;

use bulkhead_cri_api::v1 as cri;
use oci_spec::runtime::{PosixRlimitBuilder, PosixRlimitType, Process, User};

use super::{ImageDefaults, SpecError, identifier, invalid};
use crate::container::capability;

/// Where programs are looked for when nobody says (OCI image specification, and every runtime).
pub(super) const DEFAULT_PATH: &str =
    "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What programs are told of a terminal when nobody says more, as by containerd and docker.
const TERMINAL: &str = "xterm";
/// Open files a process may have; what container engines grant.
const OPEN_FILES: u64 = 1 << 20;

/// The process that `command` makes in a container whose own process is `container`, with a
/// terminal or without (CRI `ExecSyncRequest`, `ExecRequest`).
pub fn exec(container: &Process, command: &[String], terminal: bool) -> Result<Process, SpecError> {
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

/// The container's own.
pub(super) fn first(
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

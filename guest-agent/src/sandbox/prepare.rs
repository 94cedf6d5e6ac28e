//! What Prepare sets up: the clock, the pod's own namespaces if it has any, name, network, sysctls.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use bulkhead_agent_api::v1::PrepareRequest;
use tokio::sync::OnceCell;

use super::{Prepared, SandboxError, set_time, step};
use crate::container::LaunchError;
use crate::container::apart::Apart;
use crate::container::mapping::Mapping;
use crate::network;

/// Makes the pod ready for its first container. Blocks.
pub(super) fn prepare(request: PrepareRequest) -> Result<Prepared, SandboxError> {
    if request.wall_clock_nanoseconds != 0 {
        set_time(request.wall_clock_nanoseconds)?;
    }
    if !request.entropy.is_empty() {
        let device = step("open /dev/urandom", fs::File::open("/dev/urandom"))?;
        let fed = crate::sys::feed_random(device.as_fd(), &request.entropy);
        step("feed the random generator", fed)?;
    }
    let mapping = Mapping::read(&request.users, &request.groups).map_err(SandboxError::Invalid)?;
    let apart = match mapping {
        Some(mapping) => {
            let apart = Apart::make(mapping).map_err(|error| match error {
                LaunchError::Stage(words) => SandboxError::Invalid(words),
                other => other.into(),
            })?;
            for interface in &request.interfaces {
                network::hand_over(interface, apart.network.as_fd())?;
            }
            apart.inside(|| set_up(&request, Some(&apart.mapping)))?;
            Some(Arc::new(apart))
        }
        None => {
            set_up(&request, None)?;
            None
        }
    };
    if !request.resolv_conf.is_empty() {
        step(
            "write /etc/resolv.conf",
            fs::write("/etc/resolv.conf", &request.resolv_conf),
        )?;
    }
    if request.shm_bytes != 0 {
        let options = std::ffi::CString::new(format!("mode=1777,size={}", request.shm_bytes));
        let options = step("size /dev/shm", options.map_err(io::Error::from))?;
        let flags = rustix::mount::MountFlags::NOSUID | rustix::mount::MountFlags::NODEV;
        let sized = rustix::mount::mount_remount("/dev/shm", flags, options.as_c_str());
        step("size /dev/shm", sized)?;
    }
    Ok(Prepared {
        resolv_conf: request.resolv_conf,
        apart,
        pids: OnceCell::new(),
    })
}

/// What belongs to the pod's own namespaces, where it has them; the caller is inside.
fn set_up(request: &PrepareRequest, mapping: Option<&Mapping>) -> Result<(), SandboxError> {
    if !request.hostname.is_empty() {
        let set = rustix::system::sethostname(request.hostname.as_bytes());
        step(&format!("set the hostname {:?}", request.hostname), set)?;
    }
    if mapping.is_some() {
        step("bring loopback up", network::raise_loopback())?;
    }
    for interface in &request.interfaces {
        network::configure(interface, mapping.is_some())?;
    }
    let mut theirs = Vec::new();
    for (name, value) in &request.sysctls {
        match set_sysctl(name, value) {
            Err(SandboxError::Step { source, .. })
                if mapping.is_some() && source.kind() == io::ErrorKind::PermissionDenied =>
            {
                theirs.push((name, value));
            }
            done => allowed(name, done)?,
        }
    }
    // Those of a user namespace's IPC are its root's, who is nobody else.
    if let (Some(mapping), false) = (mapping, theirs.is_empty()) {
        step("act as the pod's root", crate::sys::act_as(mapping.user(0)))?;
        for (name, value) in theirs {
            allowed(name, set_sysctl(name, value))?;
        }
    }
    Ok(())
}

/// A sysctl that not even root may write can only be read.
fn allowed(name: &str, done: Result<(), SandboxError>) -> Result<(), SandboxError> {
    match done {
        Err(SandboxError::Step { source, .. })
            if source.kind() == io::ErrorKind::PermissionDenied =>
        {
            Err(SandboxError::Invalid(format!(
                "sysctl {name} cannot be set: {source}"
            )))
        }
        done => done,
    }
}

/// A sysctl's name is a path below /proc/sys, with dots or, as sysctl(8) allows, slashes.
fn set_sysctl(name: &str, value: &str) -> Result<(), SandboxError> {
    let invalid = |what: &str| SandboxError::Invalid(format!("sysctl {name} {what}"));
    let path = sysctl_path(name)
        .ok_or_else(|| SandboxError::Invalid(format!("sysctl {name:?} is no sysctl's name")))?;
    // The kernel reads a text to its first line break or NUL, and of nothing it takes no notice.
    if value.is_empty() || value.contains(['\n', '\0']) {
        return Err(invalid(&format!("cannot be set to all of {value:?}")));
    }
    let Err(error) = fs::write(&path, value) else {
        return Ok(());
    };
    match (error.kind(), error.raw_os_error()) {
        (io::ErrorKind::NotFound | io::ErrorKind::NotADirectory, _) => {
            Err(invalid("does not exist in the guest"))
        }
        (io::ErrorKind::IsADirectory, _) => Err(invalid("names a directory of sysctls, not one")),
        (_, Some(libc::EINVAL | libc::ERANGE)) => Err(invalid(&format!("does not take {value:?}"))),
        _ => step(&format!("set the sysctl {name}"), Err(error)),
    }
}

fn sysctl_path(name: &str) -> Option<String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '/' | '_' | '-');
    let relative = if name.contains('/') {
        name.to_owned()
    } else {
        name.replace('.', "/")
    };
    let sound = relative
        .split('/')
        .all(|part| !part.is_empty() && part != ".." && part != ".");
    (sound && name.chars().all(plain)).then(|| format!("/proc/sys/{relative}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sysctl_names_a_file_below_proc_sys_only() {
        let path = |name| sysctl_path(name);
        assert_eq!(
            path("net.core.somaxconn").as_deref(),
            Some("/proc/sys/net/core/somaxconn")
        );
        let dotted = "net/ipv4/conf/eth0.1/forwarding";
        assert_eq!(path(dotted), Some(format!("/proc/sys/{dotted}")));
        for name in ["", "net..core", "../../etc/passwd", "net/../x", "a b"] {
            assert_eq!(path(name), None, "{name}");
        }
    }
}

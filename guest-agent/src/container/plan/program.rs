//! The program of a process: a specification's `process`, checked.

use serde::{Deserialize, Serialize};

use super::{PlanError, absolute, invalid};
use crate::container::mapping::Mapping;
use crate::container::spec::Process;
use crate::container::terminal::Size;
use crate::container::{capability, option};

/// Most bytes of arguments and environment: the kernel's own limit is near 2 MiB.
const MOST_STRING_BYTES: usize = 1 << 20;

/// What the process becomes.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// The program and its arguments.
    pub arguments: Vec<String>,
    /// `NAME=value`.
    pub environment: Vec<String>,
    /// Absolute path in the container.
    pub directory: String,
    /// Its stdio is a terminal of this size.
    pub terminal: Option<Size>,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Permission bits new files do not get.
    pub umask: u32,
    /// Capability sets.
    pub capabilities: capability::Sets,
    /// (resource number of getrlimit(2), soft, hard).
    pub limits: Vec<(u32, u64, u64)>,
    /// Whether exec may not gain privileges.
    pub no_new_privileges: bool,
    /// For the OOM killer.
    pub oom_score_adj: i32,
}

/// Checks what a process is to become.
pub(super) fn program(process: &Process, mapping: Option<&Mapping>) -> Result<Program, PlanError> {
    if let Some(mapping) = mapping {
        let user = &process.user;
        let mut groups = user.additional_gids.iter().chain([&user.gid]);
        let stranger = groups.find(|gid| !mapping.has_group(**gid));
        let what = match stranger {
            _ if !mapping.has_user(user.uid) => Some(format!("user {}", user.uid)),
            Some(gid) => Some(format!("group {gid}")),
            None => None,
        };
        if let Some(what) = what {
            let what = format!("{what} is not in the ranges of the pod's user namespace");
            return Err(invalid("process.user", what));
        }
    }
    if process.args.first().is_none_or(String::is_empty) {
        return Err(invalid("process.args", "names no program"));
    }
    let strings = || process.args.iter().chain(&process.env);
    if strings().any(|string| string.contains('\0')) {
        return Err(invalid("process", "a NUL byte in an argument or variable"));
    }
    if strings().map(String::len).sum::<usize>() > MOST_STRING_BYTES {
        return Err(invalid(
            "process",
            "arguments and environment are longer than 1 MiB",
        ));
    }
    let directory = match process.cwd.as_str() {
        "" => "/",
        cwd => cwd,
    };
    absolute("process.cwd", directory)?;
    let limits = process
        .rlimits
        .iter()
        .map(|limit| {
            let kind = option::resource(&limit.kind).ok_or_else(|| {
                invalid("process.rlimits", format!("{:?} is unknown", limit.kind))
            })?;
            if limit.soft > limit.hard {
                return Err(invalid(
                    "process.rlimits",
                    format!("{}: soft above hard", limit.kind),
                ));
            }
            Ok((kind, limit.soft, limit.hard))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let terminal = match process.terminal {
        true => {
            let size = process.console_size.unwrap_or_default();
            let size = Size::new(size.width, size.height);
            Some(size.map_err(|what| invalid("process.consoleSize", what))?)
        }
        false => None,
    };
    let sets = process.capabilities.clone().unwrap_or_default();
    Ok(Program {
        arguments: process.args.clone(),
        environment: process.env.clone(),
        directory: directory.to_owned(),
        terminal,
        uid: process.user.uid,
        gid: process.user.gid,
        groups: process.user.additional_gids.clone(),
        umask: process.user.umask.unwrap_or(0o022) & 0o777,
        capabilities: capability::sets(&sets)
            .map_err(|name| invalid("process.capabilities", format!("{name:?} is unknown")))?,
        limits,
        no_new_privileges: process.no_new_privileges,
        oom_score_adj: process.oom_score_adj.unwrap_or(0).clamp(-1000, 1000),
    })
}

//! The system calls a container may make.
//!
//! Two filters lie over every process of a container: one of ours, the same for all, and the
//! specification's where it has one. They stay two, and the kernel joins them: of what several
//! filters answer it takes the strictest (seccomp(2)), so whatever a profile says, ours holds, and
//! each can be read by itself. A call that both allow whatever its arguments costs nothing more for
//! the second one: the kernel remembers such calls and runs neither.

mod assembly;
mod compile;
mod profile;
mod table;
mod vsock;

#[cfg(test)]
mod tests;

use std::io;

use serde::{Deserialize, Serialize};

use crate::container::plan::PlanError;
use crate::container::spec::Seccomp;
use crate::sys::{self, Instruction};

/// Offsets in struct seccomp_data.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
/// Of the first of six arguments, eight bytes each, least significant ones first.
const ARGUMENTS: u32 = 16;

const ARCHITECTURE_X86_64: u32 = 0xc000_003e;
const ARCHITECTURE_I386: u32 = 0x4000_0003;
/// Set in the numbers of the x32 calls, which have x86-64's architecture.
const X32: u32 = 0x4000_0000;

/// What a filter can answer, as in linux/seccomp.h.
mod answer {
    pub const KILL_PROCESS: u32 = 0x8000_0000;
    pub const KILL_THREAD: u32 = 0;
    pub const TRAP: u32 = 0x0003_0000;
    pub const ERRNO: u32 = 0x0005_0000;
    pub const TRACE: u32 = 0x7ff0_0000;
    pub const LOG: u32 = 0x7ffc_0000;
    pub const ALLOW: u32 = 0x7fff_0000;

    /// Without the low half, which holds an error or a tracer's number.
    pub const fn kind(answer: u32) -> u32 {
        answer & 0xffff_0000
    }
}

/// A specification's `linux.seccomp`, compiled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    /// `SECCOMP_FILTER_FLAG_*`.
    flags: u32,
    /// One instruction each: code, jt, jf and k from the highest bits down.
    program: Vec<u64>,
}

/// Compiles a profile, or says by the field's name why not.
pub fn filter(seccomp: &Seccomp) -> Result<Filter, PlanError> {
    let profile = profile::read(seccomp)?;
    let program = compile::program(&profile)?;
    let pack = |instruction: &Instruction| {
        u64::from(instruction.code) << 48
            | u64::from(instruction.jt) << 40
            | u64::from(instruction.jf) << 32
            | u64::from(instruction.k)
    };
    Ok(Filter {
        flags: profile.flags,
        program: program.iter().map(pack).collect(),
    })
}

impl Filter {
    fn instructions(&self) -> Vec<Instruction> {
        let unpack = |packed: &u64| Instruction {
            code: (packed >> 48) as u16,
            jt: (packed >> 40) as u8,
            jf: (packed >> 32) as u8,
            k: *packed as u32,
        };
        self.program.iter().map(unpack).collect()
    }
}

/// Puts both filters on. Needs CAP_SYS_ADMIN or no_new_privs.
///
/// Nothing may be left to do but execve(2): a profile need allow no call that only the agent makes.
pub fn install(filter: Option<&Filter>) -> io::Result<()> {
    let program = filter.map(|filter| (filter.instructions(), filter.flags));
    sys::install_filter(&vsock::PROGRAM, 0)?;
    match program {
        Some((program, flags)) => sys::install_filter(&program, flags),
        None => Ok(()),
    }
}

//! `linux.seccomp` (OCI runtime specification, config-linux.md, "Seccomp"), read and checked.
//!
//! Where the specification leaves something open this follows what libseccomp does for runc.

use super::answer;
use crate::container::plan::PlanError;
use crate::container::spec::{Seccomp, SeccompArgument};

/// A checked profile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    /// The answer to a call that no rule is about.
    pub default: u32,
    /// Whether 32-bit programs may run.
    pub x86: bool,
    /// Whether x32 programs may run.
    pub x32: bool,
    /// `SECCOMP_FILTER_FLAG_*`.
    pub flags: u32,
    /// By name of the call, in the profile's order.
    pub rules: Vec<(String, Rule)>,
}

/// What to answer to a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// The answer.
    pub answer: u32,
    /// All must hold.
    pub conditions: Vec<Condition>,
}

/// A comparison of an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Condition {
    /// 0 to 5.
    pub index: u32,
    /// How.
    pub operator: Operator,
    /// With what.
    pub value: u64,
}

/// How an argument is compared with a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operator {
    /// `SCMP_CMP_NE`.
    NotEqual,
    /// `SCMP_CMP_LT`.
    Less,
    /// `SCMP_CMP_LE`.
    NotGreater,
    /// `SCMP_CMP_EQ`.
    Equal,
    /// `SCMP_CMP_GE`.
    NotLess,
    /// `SCMP_CMP_GT`.
    Greater,
    /// `SCMP_CMP_MASKED_EQ`: only these bits of both are compared.
    MaskedEqual(u64),
}

fn invalid(field: &str, what: String) -> PlanError {
    PlanError::Invalid {
        field: format!("linux.seccomp.{field}"),
        what,
    }
}

/// Checks a profile; the error names the field.
pub fn read(seccomp: &Seccomp) -> Result<Profile, PlanError> {
    if !seccomp.listener_path.is_empty() || !seccomp.listener_metadata.is_empty() {
        return Err(PlanError::Refused {
            field: "linux.seccomp.listenerPath",
            why: "the node's sockets are not in the guest",
        });
    }
    let default = action(
        "defaultAction",
        &seccomp.default_action,
        seccomp.default_errno_ret,
    )?;
    let mut profile = Profile {
        default,
        x86: false,
        x32: false,
        flags: 0,
        rules: Vec::new(),
    };
    for name in &seccomp.architectures {
        match name.as_str() {
            "SCMP_ARCH_X86" => profile.x86 = true,
            "SCMP_ARCH_X32" => profile.x32 = true,
            // The guest's own counts always, and those of other machines never.
            _ if OTHER_ARCHITECTURES.contains(&name.as_str()) => {}
            _ => return Err(invalid("architectures", format!("{name:?} is unknown"))),
        }
    }
    for name in &seccomp.flags {
        profile.flags |= match name.as_str() {
            // For all threads: the filter comes to a process that has one.
            "SECCOMP_FILTER_FLAG_TSYNC" => 0,
            "SECCOMP_FILTER_FLAG_LOG" => 1 << 1,
            "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => 1 << 2,
            "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV" => {
                return Err(PlanError::Refused {
                    field: "linux.seccomp.flags SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
                    why: "it is for SCMP_ACT_NOTIFY, which is not either",
                });
            }
            _ => return Err(invalid("flags", format!("{name:?} is unknown"))),
        };
    }
    for syscall in &seccomp.syscalls {
        if syscall.names.is_empty() || syscall.names.iter().any(String::is_empty) {
            return Err(invalid("syscalls.names", "a name is missing".into()));
        }
        let answer = action("syscalls.action", &syscall.action, syscall.errno_ret)?;
        let conditions = syscall
            .args
            .iter()
            .map(condition)
            .collect::<Result<Vec<_>, _>>()?;
        for name in &syscall.names {
            let all = alternatives(&conditions);
            let rules = all
                .into_iter()
                .map(|conditions| Rule { answer, conditions });
            profile.rules.extend(rules.map(|rule| (name.clone(), rule)));
        }
    }
    Ok(profile)
}

const OTHER_ARCHITECTURES: [&str; 21] = [
    "SCMP_ARCH_X86_64",
    "SCMP_ARCH_ARM",
    "SCMP_ARCH_AARCH64",
    "SCMP_ARCH_MIPS",
    "SCMP_ARCH_MIPS64",
    "SCMP_ARCH_MIPS64N32",
    "SCMP_ARCH_MIPSEL",
    "SCMP_ARCH_MIPSEL64",
    "SCMP_ARCH_MIPSEL64N32",
    "SCMP_ARCH_PPC",
    "SCMP_ARCH_PPC64",
    "SCMP_ARCH_PPC64LE",
    "SCMP_ARCH_S390",
    "SCMP_ARCH_S390X",
    "SCMP_ARCH_PARISC",
    "SCMP_ARCH_PARISC64",
    "SCMP_ARCH_RISCV64",
    "SCMP_ARCH_LOONGARCH64",
    "SCMP_ARCH_M68K",
    "SCMP_ARCH_SH",
    "SCMP_ARCH_SHEB",
];

/// runc's reading of `args`: all have to hold, unless two are about the same argument; then any of
/// them is enough.
fn alternatives(conditions: &[Condition]) -> Vec<Vec<Condition>> {
    let twice = conditions.iter().enumerate().any(|(at, condition)| {
        let mut earlier = conditions[..at].iter();
        earlier.any(|other| other.index == condition.index)
    });
    if twice {
        conditions
            .iter()
            .map(|&condition| vec![condition])
            .collect()
    } else {
        vec![conditions.to_vec()]
    }
}

/// "When the action doesn't support an errno, the runtime MUST print and error and fail. If not
/// specified then its default value is EPERM."
fn action(field: &str, name: &str, errno: Option<u32>) -> Result<u32, PlanError> {
    let answer = match name {
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => answer::KILL_THREAD,
        "SCMP_ACT_KILL_PROCESS" => answer::KILL_PROCESS,
        "SCMP_ACT_TRAP" => answer::TRAP,
        "SCMP_ACT_ERRNO" => answer::ERRNO,
        "SCMP_ACT_TRACE" => answer::TRACE,
        "SCMP_ACT_LOG" => answer::LOG,
        "SCMP_ACT_ALLOW" => answer::ALLOW,
        "SCMP_ACT_NOTIFY" => {
            return Err(PlanError::Refused {
                field: "linux.seccomp SCMP_ACT_NOTIFY",
                why: "the node's sockets are not in the guest",
            });
        }
        _ => return Err(invalid(field, format!("{name:?} is unknown"))),
    };
    // MAX_ERRNO of the kernel, which would make a larger one this.
    let most = match answer {
        answer::ERRNO => 4095,
        answer::TRACE => 0xffff,
        _ if errno.is_none() => return Ok(answer),
        _ => return Err(invalid(field, format!("{name} takes no errnoRet"))),
    };
    match errno.unwrap_or(libc::EPERM as u32) {
        errno if errno <= most => Ok(answer | errno),
        errno => Err(invalid(field, format!("errnoRet {errno} is above {most}"))),
    }
}

fn condition(argument: &SeccompArgument) -> Result<Condition, PlanError> {
    let name = argument.op.as_str();
    let index = argument.index;
    if index > 5 {
        let what = format!("index {index}: a call has six arguments, counted from 0");
        return Err(invalid("syscalls.args", what));
    }
    let (operator, value) = match name {
        "SCMP_CMP_NE" => (Operator::NotEqual, argument.value),
        "SCMP_CMP_LT" => (Operator::Less, argument.value),
        "SCMP_CMP_LE" => (Operator::NotGreater, argument.value),
        "SCMP_CMP_EQ" => (Operator::Equal, argument.value),
        "SCMP_CMP_GE" => (Operator::NotLess, argument.value),
        "SCMP_CMP_GT" => (Operator::Greater, argument.value),
        "SCMP_CMP_MASKED_EQ" => (Operator::MaskedEqual(argument.value), argument.value_two),
        _ => return Err(invalid("syscalls.args.op", format!("{name:?} is unknown"))),
    };
    Ok(Condition {
        index,
        operator,
        value,
    })
}

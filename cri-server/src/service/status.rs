//! The one place where errors become gRPC codes.

use tonic::{Code, Status};

use crate::cgroup::CgroupError;
use crate::container::exec::ExecError;
use crate::container::file::FileError;
use crate::container::spec::SpecError;
use crate::guest::GuestError;
use crate::network::{CniError, NetworkError};
use crate::sandbox::SandboxError;
use crate::vm::VmError;

/// The longest message, in bytes: it travels in a header.
const LONGEST: usize = 4096;

/// A pod's or container's error as a client sees it.
pub fn of_sandbox(error: &SandboxError) -> Status {
    Status::new(code(error), shortened(error.to_string()))
}

/// A message that is no longer than a header may be.
pub fn shortened(mut message: String) -> String {
    if message.len() > LONGEST {
        let end = (0..=LONGEST)
            .rev()
            .find(|&end| message.is_char_boundary(end));
        message.truncate(end.unwrap_or(0));
    }
    message
}

/// Whether a full disk of the host is behind it.
fn lacks_space(error: &SandboxError) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        let system = error.downcast_ref::<std::io::Error>();
        if system.is_some_and(|error| error.kind() == std::io::ErrorKind::StorageFull) {
            return true;
        }
        cause = error.source();
    }
    false
}

fn code(error: &SandboxError) -> Code {
    if lacks_space(error) {
        return Code::ResourceExhausted;
    }
    match error {
        SandboxError::NotFound { .. } => Code::NotFound,
        SandboxError::NameTaken { .. } => Code::AlreadyExists,
        SandboxError::Handler(_) => Code::InvalidArgument,
        SandboxError::Unavailable(_)
        | SandboxError::NotReady { .. }
        | SandboxError::WrongState { .. } => Code::FailedPrecondition,
        SandboxError::Slow { .. } | SandboxError::Unkillable(_) => Code::DeadlineExceeded,
        SandboxError::Gone(_) => Code::NotFound,
        // Not Unimplemented: clients take that for the call itself and never try it again.
        SandboxError::Spec(SpecError::Invalid { .. } | SpecError::Unsupported { .. })
        | SandboxError::Cgroup(CgroupError::Places { .. })
        | SandboxError::Mount(FileError::Read { .. } | FileError::Unsupported { .. }) => {
            Code::InvalidArgument
        }
        SandboxError::Network(error) => network(error),
        SandboxError::Image(error) => super::image::status(error).code(),
        SandboxError::Vm(error) => vm(error),
        SandboxError::Guest(error) => guest(error),
        SandboxError::Exec(ExecError::Late) => Code::DeadlineExceeded,
        SandboxError::Exec(ExecError::Guest(error)) => guest(error),
        SandboxError::Died { .. }
        | SandboxError::Random(_)
        | SandboxError::File { .. }
        | SandboxError::Broken(_)
        | SandboxError::Cgroup(_)
        | SandboxError::Mount(FileError::Back { .. })
        | SandboxError::Scratch(_)
        | SandboxError::Record(_)
        | SandboxError::Log(_)
        | SandboxError::Exec(ExecError::Describe(_) | ExecError::NoExit | ExecError::Gone) => {
            Code::Internal
        }
    }
}

fn network(error: &NetworkError) -> Code {
    match error {
        NetworkError::PodCidr(_)
        | NetworkError::HostPort(_)
        | NetworkError::Cni(CniError::Pod(_)) => Code::InvalidArgument,
        NetworkError::HostPortTaken { .. } | NetworkError::Cni(CniError::NoNetwork(_)) => {
            Code::FailedPrecondition
        }
        NetworkError::Exhausted { .. } => Code::ResourceExhausted,
        _ => Code::Internal,
    }
}

fn vm(error: &VmError) -> Code {
    match error {
        VmError::Late(_) => Code::DeadlineExceeded,
        VmError::Ended(_) => Code::FailedPrecondition,
        VmError::Launch(_)
        | VmError::File { .. }
        | VmError::Refused { .. }
        | VmError::WrongAnswer(_) => Code::Internal,
    }
}

/// What a guest says is not believed further than to a few codes that clients act upon.
fn guest(error: &GuestError) -> Code {
    match (error, error.code()) {
        (GuestError::Late(_), _) => Code::DeadlineExceeded,
        (_, Some(code @ (Code::InvalidArgument | Code::NotFound | Code::FailedPrecondition))) => {
            code
        }
        (_, Some(Code::ResourceExhausted)) => Code::ResourceExhausted,
        (_, Some(Code::Unimplemented)) => Code::Unimplemented,
        (_, Some(Code::Unavailable)) => Code::Unavailable,
        _ => Code::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_code_is_passed_on_only_where_clients_act_upon_it() {
        let refused = |status| {
            of_sandbox(&SandboxError::Guest(GuestError::Refused {
                call: "prepare the sandbox",
                status,
            }))
        };
        let named = refused(Status::invalid_argument("no sysctl x.y"));
        assert_eq!(named.code(), Code::InvalidArgument);
        assert!(named.message().contains("x.y"));
        assert_eq!(refused(Status::ok("?")).code(), Code::Internal);
    }

    #[test]
    fn a_message_is_no_longer_than_a_header_may_be() {
        let error = SandboxError::Broken("é".repeat(LONGEST));
        assert!(of_sandbox(&error).message().len() <= LONGEST);
    }
}

//! The filter every container lives under: no AF_VSOCK, so that no process of a container can
//! dial the host's port as the agent does.
//!
//! A filter sees a call's arguments only, not memory. So two calls go as a whole: the i386
//! `socketcall` for making a socket, whose family lies in memory (C libraries have used `socket`
//! itself since Linux 4.3), and `io_uring_setup`, whose rings make sockets unseen.

use super::assembly::{self, load, when};
use super::{ARCHITECTURE, ARCHITECTURE_I386, ARCHITECTURE_X86_64, ARGUMENTS, NUMBER, X32, answer};
use crate::sys::Instruction;

const SOCKET_X86_64: u32 = 41;
const SOCKET_I386: u32 = 359;
const SOCKETCALL_I386: u32 = 102;
/// The same number for both.
const IO_URING_SETUP: u32 = 425;
/// SYS_SOCKET of socketcall(2).
const MAKE_SOCKET: u32 = 1;
const AF_VSOCK: u32 = 40;

const NO_FAMILY: u32 = answer::ERRNO | libc::EAFNOSUPPORT as u32;
const NO_CALL: u32 = answer::ERRNO | libc::ENOSYS as u32;

/// The program. Each jump counts the instructions it skips.
pub const PROGRAM: [Instruction; 20] = [
    load(ARCHITECTURE),
    when(ARCHITECTURE_X86_64, 2, 0),
    when(ARCHITECTURE_I386, 5, 0),
    assembly::answer(answer::KILL_PROCESS),
    // x86-64 and x32
    load(NUMBER),
    assembly::mask(!X32),
    when(SOCKET_X86_64, 8, 0),
    when(IO_URING_SETUP, 10, 11),
    // i386
    load(NUMBER),
    when(SOCKET_I386, 5, 0),
    when(IO_URING_SETUP, 7, 0),
    when(SOCKETCALL_I386, 0, 7),
    load(ARGUMENTS),
    when(MAKE_SOCKET, 4, 5),
    assembly::answer(answer::KILL_PROCESS),
    // socket
    load(ARGUMENTS),
    when(AF_VSOCK, 0, 2),
    assembly::answer(NO_FAMILY),
    assembly::answer(NO_CALL),
    assembly::answer(answer::ALLOW),
];

#[cfg(test)]
mod tests {
    use super::*;

    use super::super::tests::{Call, run};
    use super::answer::{ALLOW, KILL_PROCESS};

    /// The answer to a call whose first argument is given.
    fn ask(architecture: u32, number: u32, argument: u32) -> u32 {
        let call = Call {
            architecture,
            number,
            arguments: [argument.into(), 0, 0, 0, 0, 0],
        };
        run(&PROGRAM, &call)
    }

    #[test]
    fn vsock_is_denied_by_every_way_to_a_socket() {
        for number in [41, X32 | 41] {
            assert_eq!(ask(ARCHITECTURE_X86_64, number, AF_VSOCK), NO_FAMILY);
            assert_eq!(ask(ARCHITECTURE_X86_64, number, 2), ALLOW);
        }
        assert_eq!(ask(ARCHITECTURE_I386, 359, AF_VSOCK), NO_FAMILY);
        assert_eq!(ask(ARCHITECTURE_I386, 359, 1), ALLOW);
        assert_eq!(ask(ARCHITECTURE_I386, 102, MAKE_SOCKET), NO_CALL);
        assert_eq!(ask(ARCHITECTURE_I386, 102, 3), ALLOW);
        for architecture in [ARCHITECTURE_X86_64, ARCHITECTURE_I386] {
            assert_eq!(ask(architecture, 425, 8), NO_CALL);
        }
    }

    #[test]
    fn numbers_mean_what_they_mean_on_their_architecture() {
        // 41 is dup on i386, 359 is unused and 102 is getuid on x86-64.
        assert_eq!(ask(ARCHITECTURE_I386, 41, AF_VSOCK), ALLOW);
        assert_eq!(ask(ARCHITECTURE_X86_64, 102, MAKE_SOCKET), ALLOW);
        assert_eq!(ask(0x4000_0028, 1, 1), KILL_PROCESS);
    }
}

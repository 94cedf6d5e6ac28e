//! The filter every container lives under: no AF_VSOCK, so that no process of a container can
//! dial the host's port as the agent does.
//!
//! A filter sees a call's arguments only, not memory. So two calls go as a whole: the i386
//! `socketcall` for making a socket, whose family lies in memory (C libraries have used `socket`
//! itself since Linux 4.3), and `io_uring_setup`, whose rings make sockets unseen.

use std::io;

use crate::sys::{self, Instruction};

const ARCHITECTURE_X86_64: u32 = 0xc000_003e;
const ARCHITECTURE_I386: u32 = 0x4000_0003;
/// Set in the numbers of the x32 calls.
const X32: u32 = 0x4000_0000;

const SOCKET_X86_64: u32 = 41;
const SOCKET_I386: u32 = 359;
const SOCKETCALL_I386: u32 = 102;
/// The same number for both.
const IO_URING_SETUP: u32 = 425;
/// SYS_SOCKET of socketcall(2).
const MAKE_SOCKET: u32 = 1;
const AF_VSOCK: u32 = 40;

/// Offsets in struct seccomp_data.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const FIRST_ARGUMENT: u32 = 16;

const ALLOW: u32 = 0x7fff_0000;
const KILL: u32 = 0x8000_0000;

const fn deny(errno: i32) -> u32 {
    0x0005_0000 | errno as u32
}

const fn load(offset: u32) -> Instruction {
    // BPF_LD | BPF_W | BPF_ABS
    Instruction {
        code: 0x20,
        jt: 0,
        jf: 0,
        k: offset,
    }
}

/// Skips `yes` instructions when the loaded word is `value`, else `no`.
const fn when(value: u32, yes: u8, no: u8) -> Instruction {
    // BPF_JMP | BPF_JEQ | BPF_K
    Instruction {
        code: 0x15,
        jt: yes,
        jf: no,
        k: value,
    }
}

const fn clear(bits: u32) -> Instruction {
    // BPF_ALU | BPF_AND | BPF_K
    Instruction {
        code: 0x54,
        jt: 0,
        jf: 0,
        k: !bits,
    }
}

const fn answer(action: u32) -> Instruction {
    // BPF_RET | BPF_K
    Instruction {
        code: 0x06,
        jt: 0,
        jf: 0,
        k: action,
    }
}

/// The program. Each jump counts the instructions it skips.
const PROGRAM: [Instruction; 20] = [
    load(ARCHITECTURE),
    when(ARCHITECTURE_X86_64, 2, 0),
    when(ARCHITECTURE_I386, 5, 0),
    answer(KILL),
    // x86-64 and x32
    load(NUMBER),
    clear(X32),
    when(SOCKET_X86_64, 8, 0),
    when(IO_URING_SETUP, 10, 11),
    // i386
    load(NUMBER),
    when(SOCKET_I386, 5, 0),
    when(IO_URING_SETUP, 7, 0),
    when(SOCKETCALL_I386, 0, 7),
    load(FIRST_ARGUMENT),
    when(MAKE_SOCKET, 4, 5),
    answer(KILL),
    // socket
    load(FIRST_ARGUMENT),
    when(AF_VSOCK, 0, 2),
    answer(deny(libc::EAFNOSUPPORT)),
    answer(deny(libc::ENOSYS)),
    answer(ALLOW),
];

/// Puts the filter on. Needs CAP_SYS_ADMIN, as no_new_privs must stay the container's choice.
pub fn deny_vsock() -> io::Result<()> {
    sys::install_filter(&PROGRAM)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program on a call as the kernel would.
    fn run(architecture: u32, number: u32, argument: u32) -> u32 {
        let (mut at, mut word) = (0, 0);
        loop {
            let instruction = PROGRAM[at];
            at += 1;
            match instruction.code {
                0x20 => {
                    word = match instruction.k {
                        NUMBER => number,
                        ARCHITECTURE => architecture,
                        FIRST_ARGUMENT => argument,
                        other => panic!("loads offset {other}"),
                    }
                }
                0x54 => word &= instruction.k,
                0x15 if word == instruction.k => at += usize::from(instruction.jt),
                0x15 => at += usize::from(instruction.jf),
                0x06 => return instruction.k,
                other => panic!("code {other:#x}"),
            }
        }
    }

    #[test]
    fn vsock_is_denied_by_every_way_to_a_socket() {
        let no_family = deny(libc::EAFNOSUPPORT);
        for number in [41, X32 | 41] {
            assert_eq!(run(ARCHITECTURE_X86_64, number, AF_VSOCK), no_family);
            assert_eq!(run(ARCHITECTURE_X86_64, number, 2), ALLOW);
        }
        assert_eq!(run(ARCHITECTURE_I386, 359, AF_VSOCK), no_family);
        assert_eq!(run(ARCHITECTURE_I386, 359, 1), ALLOW);
        assert_eq!(run(ARCHITECTURE_I386, 102, MAKE_SOCKET), deny(libc::ENOSYS));
        assert_eq!(run(ARCHITECTURE_I386, 102, 3), ALLOW);
        for architecture in [ARCHITECTURE_X86_64, ARCHITECTURE_I386] {
            assert_eq!(run(architecture, 425, 8), deny(libc::ENOSYS));
        }
    }

    #[test]
    fn numbers_mean_what_they_mean_on_their_architecture() {
        // 41 is dup on i386, 359 is unused and 102 is getuid on x86-64.
        assert_eq!(run(ARCHITECTURE_I386, 41, AF_VSOCK), ALLOW);
        assert_eq!(run(ARCHITECTURE_X86_64, 102, MAKE_SOCKET), ALLOW);
        assert_eq!(run(0x4000_0028, 1, 1), KILL);
    }

    #[test]
    fn the_kernel_takes_the_program() {
        let probe = std::thread::spawn(|| {
            rustix::thread::set_no_new_privs(true).unwrap();
            deny_vsock().unwrap();
            let family = rustix::net::AddressFamily::VSOCK;
            rustix::net::socket(family, rustix::net::SocketType::STREAM, None).unwrap_err()
        });
        assert_eq!(probe.join().unwrap(), rustix::io::Errno::AFNOSUPPORT);
    }
}

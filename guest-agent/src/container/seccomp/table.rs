//! The kernel's names of system calls.

use std::collections::BTreeMap;

/// Numbers of a call; where there is none the architecture does not have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Numbers {
    /// Of x86-64.
    pub x86_64: Option<u32>,
    /// Of x32, without its bit.
    pub x32: Option<u32>,
    /// Of i386.
    pub i386: Option<u32>,
}

/// A function that i386 programs may also reach through another call, whose first argument says
/// which function is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Multiplexed {
    /// The call's number.
    pub call: u32,
    /// Which bits of the argument count: ipc(2) has a version above them.
    pub mask: u64,
    /// The function.
    pub function: u64,
}

/// All calls.
pub fn calls() -> BTreeMap<&'static str, Numbers> {
    include_str!("x86.tbl")
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| {
            let mut words = line.split(' ');
            let name = words.next()?;
            let mut number = || words.next().and_then(|word| word.parse().ok());
            let numbers = Numbers {
                x86_64: number(),
                x32: number(),
                i386: number(),
            };
            Some((name, numbers))
        })
        .collect()
}

/// By which i386 call a function can be reached besides its own, see socketcall(2) and ipc(2).
pub fn multiplexed(name: &str) -> Option<Multiplexed> {
    const SOCKETCALL: [&str; 20] = [
        "socket",
        "bind",
        "connect",
        "listen",
        "accept",
        "getsockname",
        "getpeername",
        "socketpair",
        "send",
        "recv",
        "sendto",
        "recvfrom",
        "shutdown",
        "setsockopt",
        "getsockopt",
        "sendmsg",
        "recvmsg",
        "accept4",
        "recvmmsg",
        "sendmmsg",
    ];
    const IPC: [(&str, u64); 12] = [
        ("semop", 1),
        ("semget", 2),
        ("semctl", 3),
        ("semtimedop", 4),
        ("msgsnd", 11),
        ("msgrcv", 12),
        ("msgget", 13),
        ("msgctl", 14),
        ("shmat", 21),
        ("shmdt", 22),
        ("shmget", 23),
        ("shmctl", 24),
    ];
    let socket = SOCKETCALL.iter().position(|known| *known == name);
    let ipc = IPC.iter().find(|(known, _)| *known == name);
    match (socket, ipc) {
        (Some(at), _) => Some(Multiplexed {
            call: 102,
            mask: 0xffff_ffff,
            function: at as u64 + 1,
        }),
        (_, Some((_, function))) => Some(Multiplexed {
            call: 117,
            mask: 0xffff,
            function: *function,
        }),
        _ => None,
    }
}

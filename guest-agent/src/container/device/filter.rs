//! Rules as a program of the kernel (BPF_PROG_TYPE_CGROUP_DEVICE), asked at each open and mknod.

use std::fs;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{Mode, OFlags};

use super::{Kind, Rule};
use crate::sys;

/// `linux/bpf.h`: BPF_DEVCG_DEV_*; the accesses are in the upper half of the word, the kind in the
/// lower.
const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;

/// The kernel's bits of an access.
fn access(ours: u8) -> i32 {
    let bit = |which: u8, theirs: i32| if ours & which != 0 { theirs } else { 0 };
    bit(super::MAKE, 1) | bit(super::READ, 2) | bit(super::WRITE, 4)
}

/// Registers: the answer, the context, and what is loaded of it.
const ANSWER: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
/// What no rule has decided yet.
const OPEN: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

/// An instruction in the form of struct bpf_insn.
const fn instruction(code: u8, to: u8, from: u8, offset: i16, value: i32) -> u64 {
    let [low, high] = offset.to_le_bytes();
    let [a, b, c, d] = value.to_le_bytes();
    u64::from_le_bytes([code, from << 4 | to, low, high, a, b, c, d])
}

const fn load(to: u8, offset: i16) -> u64 {
    instruction(0x61, to, CONTEXT, offset, 0)
}
const fn copy(to: u8, from: u8) -> u64 {
    instruction(0xbf, to, from, 0, 0)
}
const fn set(to: u8, value: i32) -> u64 {
    instruction(0xb7, to, 0, 0, value)
}
const fn and(to: u8, value: i32) -> u64 {
    instruction(0x57, to, 0, 0, value)
}
const fn shift_right(to: u8, bits: i32) -> u64 {
    instruction(0x77, to, 0, 0, bits)
}
const fn skip(count: i16) -> u64 {
    instruction(0x05, 0, 0, count, 0)
}
const fn skip_unless_equal(register: u8, value: i32, count: i16) -> u64 {
    instruction(0x55, register, 0, count, value)
}
const fn skip_if_any(register: u8, bits: i32, count: i16) -> u64 {
    instruction(0x45, register, 0, count, bits)
}
const EXIT: u64 = instruction(0x95, 0, 0, 0, 0);

/// The program: from the last rule to the first, as the later decides. An allowing rule takes its
/// accesses off what is open, and when none is left the answer is yes; a denying one that meets an
/// open access answers no; what nobody speaks of is denied.
fn program(rules: &[Rule]) -> Vec<u64> {
    let mut program = vec![
        load(KIND, 0),
        copy(OPEN, KIND),
        shift_right(OPEN, 16),
        and(KIND, 0xffff),
        load(MAJOR, 4),
        load(MINOR, 8),
    ];
    for rule in rules.iter().rev() {
        let mut wanted = Vec::new();
        match rule.kind {
            None => {}
            Some(Kind::Character) => wanted.push((KIND, CHARACTER)),
            Some(Kind::Block) => wanted.push((KIND, BLOCK)),
            // Anybody makes those.
            Some(Kind::Fifo) => continue,
        }
        // At most 20 bits, see where rules are made.
        wanted.extend(rule.major.map(|number| (MAJOR, number.cast_signed())));
        wanted.extend(rule.minor.map(|number| (MINOR, number.cast_signed())));
        let bits = access(rule.access);
        let decision = match rule.allow {
            true => vec![
                and(OPEN, !bits),
                skip_unless_equal(OPEN, 0, 2),
                set(ANSWER, 1),
                EXIT,
            ],
            false => vec![skip_if_any(OPEN, bits, 1), skip(2), set(ANSWER, 0), EXIT],
        };
        for (at, (register, value)) in (0..).zip(&wanted) {
            // Over the comparisons that follow and the decision of four instructions.
            let rest = wanted.len() as i16 - at - 1;
            program.push(skip_unless_equal(*register, *value, rest + 4));
        }
        program.extend(decision);
    }
    program.extend([set(ANSWER, 0), EXIT]);
    program
}

/// Major numbers of the pod's disks: those of virtio disks, and of partitions beyond the 16th.
pub(super) fn disk_majors(devices: &str) -> Vec<u32> {
    let blocks = devices.lines().skip_while(|line| *line != "Block devices:");
    blocks
        .filter_map(|line| line.trim().split_once(' '))
        .filter(|(_, name)| ["virtblk", "blkext"].contains(&name.trim()))
        .filter_map(|(major, _)| major.parse().ok())
        .collect()
}

/// Binds the processes of the cgroup at `path`, and of those below it, to the rules. No rule can
/// open the pod's disks.
pub fn confine(path: &str, rules: &[Rule]) -> io::Result<()> {
    let mut rules = rules.to_vec();
    for major in disk_majors(&fs::read_to_string("/proc/devices")?) {
        rules.push(Rule {
            allow: false,
            kind: Some(Kind::Block),
            major: Some(major),
            minor: None,
            access: super::READ | super::WRITE,
        });
    }
    let group = rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    sys::attach_device_program(group.as_fd(), &program(&rules))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::device::{MAKE, READ, WRITE, rules};
    use crate::container::spec::DeviceRule;

    /// Runs the program as the kernel would.
    fn run(program: &[u64], kind: i32, wanted: u8, major: i64, minor: i64) -> bool {
        let mut registers = [0_i64; 6];
        let context = [i64::from(access(wanted) << 16 | kind), major, minor];
        let mut at = 0_usize;
        loop {
            let [code, names, low, high, a, b, c, d] = program[at].to_le_bytes();
            let offset = i16::from_le_bytes([low, high]);
            let value = i64::from(i32::from_le_bytes([a, b, c, d]));
            let (to, from) = (usize::from(names & 15), usize::from(names >> 4));
            at += 1;
            let mut jump = |when: bool| at += if when { offset as usize } else { 0 };
            match code {
                0x61 => registers[to] = context[offset as usize / 4],
                0xbf => registers[to] = registers[from],
                0xb7 => registers[to] = value,
                0x57 => registers[to] &= value,
                0x77 => registers[to] >>= value,
                0x05 => jump(true),
                0x55 => jump(registers[to] != value),
                0x45 => jump(registers[to] & value != 0),
                0x95 => return registers[0] == 1,
                other => panic!("code {other:#x}"),
            }
        }
    }

    fn listed(allow: bool, kind: &str, major: Option<i64>, access: &str) -> DeviceRule {
        DeviceRule {
            allow,
            kind: Some(kind.into()),
            major,
            minor: None,
            access: Some(access.into()),
        }
    }

    #[test]
    fn nothing_but_the_default_devices_is_allowed() {
        let program = program(&rules(&[]).unwrap());
        assert!(run(&program, CHARACTER, READ | WRITE, 1, 3));
        assert!(run(&program, CHARACTER, READ | WRITE, 136, 7));
        assert!(!run(&program, CHARACTER, READ, 1, 11));
        assert!(!run(&program, BLOCK, READ, 1, 3));
        assert!(run(&program, BLOCK, MAKE, 254, 0));
        assert!(!run(&program, BLOCK, MAKE | READ, 254, 0));
    }

    #[test]
    fn the_last_rule_that_speaks_of_an_access_decides_it() {
        let asked = [
            listed(true, "c", Some(10), "r"),
            listed(true, "c", Some(10), "w"),
            listed(true, "a", None, "r"),
            listed(false, "b", Some(7), "r"),
        ];
        let program = program(&rules(&asked).unwrap());
        assert!(run(&program, CHARACTER, READ | WRITE, 10, 5));
        assert!(run(&program, BLOCK, READ, 8, 0));
        assert!(!run(&program, BLOCK, READ | WRITE, 8, 0));
        assert!(!run(&program, BLOCK, READ, 7, 0));
        assert!(run(&program, CHARACTER, READ, 7, 0));
    }

    #[test]
    fn disks_of_the_pod_are_known_by_their_major_numbers() {
        let devices = "Character devices:\n  1 mem\n254 virtblk\n\n\
                       Block devices:\n  7 loop\n253 virtblk\n259 blkext\n";
        assert_eq!(disk_majors(devices), [253, 259]);
    }
}

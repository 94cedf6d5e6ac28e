use std::collections::BTreeMap;
use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::json;

use super::answer::{ALLOW, ERRNO, KILL_PROCESS, LOG, TRACE};
use super::profile::{Operator, Profile};
use super::*;

const NO_CALL: u32 = ERRNO | libc::ENOSYS as u32;
const NOT_PERMITTED: u32 = ERRNO | libc::EPERM as u32;

/// A system call as the kernel shows it to a filter.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    pub architecture: u32,
    pub number: u32,
    pub arguments: [u64; 6],
}

impl Call {
    fn word(&self, offset: u32) -> u32 {
        match offset {
            NUMBER => self.number,
            ARCHITECTURE => self.architecture,
            _ => {
                let (at, half) = ((offset - ARGUMENTS) / 8, (offset - ARGUMENTS) % 8);
                (self.arguments[at as usize] >> (8 * half)) as u32
            }
        }
    }
}

/// Runs a program on a call as the kernel would.
pub fn run(program: &[Instruction], call: &Call) -> u32 {
    let (mut at, mut word) = (0, 0);
    loop {
        let Instruction { code, jt, jf, k } = program[at];
        at += 1;
        let mut jump = |taken: bool| at += usize::from(if taken { jt } else { jf });
        match code {
            0x20 => word = call.word(k),
            0x54 => word &= k,
            0x05 => at += k as usize,
            0x15 => jump(word == k),
            0x25 => jump(word > k),
            0x35 => jump(word >= k),
            0x06 => return k,
            other => panic!("code {other:#x}"),
        }
    }
}

/// What a profile says to a call, worked out without compiling it.
fn judge(profile: &Profile, call: &Call) -> u32 {
    let x32 = call.architecture == ARCHITECTURE_X86_64 && call.number & X32 != 0;
    let i386 = call.architecture == ARCHITECTURE_I386;
    let skipped = call.number == u32::MAX;
    let runs = match call.architecture {
        ARCHITECTURE_X86_64 => !x32 || profile.x32 || skipped,
        ARCHITECTURE_I386 => profile.x86,
        _ => false,
    };
    if !runs {
        return KILL_PROCESS;
    }
    static CALLS: LazyLock<BTreeMap<&str, table::Numbers>> = LazyLock::new(table::calls);
    // Those about this call, and the highest number that is named.
    let mut about = Vec::new();
    let mut highest = None;
    for (name, rule) in &profile.rules {
        let numbers = CALLS.get(name.as_str());
        let own = numbers.and_then(|numbers| match (i386, x32 && profile.x32) {
            (true, _) => numbers.i386,
            (_, true) => numbers.x32.map(|number| number | X32),
            _ => numbers.x86_64,
        });
        let other = table::multiplexed(name).filter(|_| i386 && rule.conditions.is_empty());
        highest = highest.max(own).max(other.map(|by| by.call));
        let meant = |by: &table::Multiplexed| {
            by.call == call.number && call.arguments[0] & by.mask == by.function
        };
        if own == Some(call.number) || other.as_ref().is_some_and(meant) {
            about.push((rule, own == Some(call.number) && rule.conditions.is_empty()));
        }
    }
    let permissive = [ALLOW, LOG, TRACE].contains(&answer::kind(profile.default));
    if highest.is_some_and(|highest| call.number > highest) && !permissive {
        return NO_CALL;
    }
    about.retain(|(rule, _)| rule.answer != profile.default);
    if let Some((rule, _)) = about.iter().find(|(_, always)| *always) {
        return rule.answer;
    }
    let holds = |(rule, _): &&(&profile::Rule, bool)| {
        rule.conditions.iter().all(|condition| {
            let kept = |value: u64| match i386 || x32 {
                true => value & 0xffff_ffff,
                false => value,
            };
            let argument = kept(call.arguments[condition.index as usize]);
            let value = kept(condition.value);
            match condition.operator {
                Operator::NotEqual => argument != value,
                Operator::Less => argument < value,
                Operator::NotGreater => argument <= value,
                Operator::Equal => argument == value,
                Operator::NotLess => argument >= value,
                Operator::Greater => argument > value,
                Operator::MaskedEqual(bits) => argument & bits == value & bits,
            }
        })
    };
    about
        .iter()
        .find(holds)
        .map_or(profile.default, |(rule, _)| rule.answer)
}

fn read(profile: &serde_json::Value) -> Result<Profile, PlanError> {
    profile::read(&serde_json::from_value(profile.clone()).unwrap())
}

/// The answer of a compiled profile to a call of x86-64.
fn native(profile: &serde_json::Value, number: libc::c_long, arguments: [u64; 6]) -> u32 {
    let program = compile::program(&read(profile).unwrap()).unwrap();
    let call = Call {
        architecture: ARCHITECTURE_X86_64,
        number: number as u32,
        arguments,
    };
    run(&program, &call)
}

/// Calls that some architectures have and some have not, alone and through others.
const NAMES: [&str; 12] = [
    "read",
    "clone",
    "socket",
    "connect",
    "recv",
    "shmat",
    "ioctl",
    "arch_prctl",
    "mseal",
    "waitpid",
    "execveat",
    "no_such_call",
];
/// Values at which comparisons turn.
const VALUES: [u64; 9] = [
    0,
    1,
    3,
    22,
    0x7fff_ffff,
    0xffff_ffff,
    0x1_0000_0000,
    0x1_0000_0001,
    u64::MAX,
];

fn rules() -> impl Strategy<Value = Vec<(String, profile::Rule)>> {
    let values = || prop::sample::select(VALUES.as_slice());
    let operators = prop_oneof![
        Just(Operator::NotEqual),
        Just(Operator::Less),
        Just(Operator::NotGreater),
        Just(Operator::Equal),
        Just(Operator::NotLess),
        Just(Operator::Greater),
        values().prop_map(Operator::MaskedEqual),
    ];
    let condition =
        (0..2u32, operators, values()).prop_map(|(index, operator, value)| profile::Condition {
            index,
            operator,
            value,
        });
    let answers = prop::sample::select(vec![ALLOW, NOT_PERMITTED, ERRNO | 5, LOG, KILL_PROCESS]);
    let rule = (answers, prop::collection::vec(condition, 0..3))
        .prop_map(|(answer, conditions)| profile::Rule { answer, conditions });
    let named = (prop::sample::select(NAMES.as_slice()), rule);
    prop::collection::vec(
        named.prop_map(|(name, rule)| (name.to_owned(), rule)),
        0..24,
    )
}

fn calls() -> impl Strategy<Value = Call> {
    let known = |numbers: fn(&table::Numbers) -> Option<u32>, bit: u32| {
        let calls = table::calls();
        let all: Vec<u32> = NAMES
            .iter()
            .filter_map(|name| calls.get(name).and_then(numbers))
            .chain([102, 117, 600])
            .map(|number| number | bit)
            .collect();
        prop::sample::select(all)
    };
    let numbers = prop_oneof![
        (
            Just(ARCHITECTURE_X86_64),
            known(|numbers| numbers.x86_64, 0)
        ),
        (Just(ARCHITECTURE_X86_64), known(|numbers| numbers.x32, X32)),
        (Just(ARCHITECTURE_I386), known(|numbers| numbers.i386, 0)),
        (Just(ARCHITECTURE_X86_64), Just(u32::MAX)),
        (any::<u32>(), 0..600u32),
    ];
    let argument = || prop::sample::select(VALUES.as_slice());
    (numbers, argument(), argument()).prop_map(|((architecture, number), first, second)| Call {
        architecture,
        number,
        arguments: [first, second, 0, 0, 0, 0],
    })
}

proptest! {
    #[test]
    fn a_program_answers_what_its_profile_says(
        default in prop::sample::select(vec![ALLOW, NOT_PERMITTED, LOG, KILL_PROCESS]),
        (x86, x32) in any::<(bool, bool)>(),
        rules in rules(),
        calls in prop::collection::vec(calls(), 64),
    ) {
        let profile = Profile { default, x86, x32, flags: 0, rules };
        let program = compile::program(&profile).unwrap();
        for call in calls {
            prop_assert_eq!(run(&program, &call), judge(&profile, &call), "{:?}", call);
        }
    }
}

#[test]
fn a_profile_of_one_call_through_another_has_calls_beyond_it() {
    // i386 has no call of its own for it, only socketcall.
    let rule = profile::Rule {
        answer: ALLOW,
        conditions: Vec::new(),
    };
    let profile = Profile {
        default: NOT_PERMITTED,
        x86: true,
        x32: false,
        flags: 0,
        rules: vec![("recv".to_owned(), rule)],
    };
    let call = Call {
        architecture: ARCHITECTURE_I386,
        number: 462,
        arguments: [0; 6],
    };
    let program = compile::program(&profile).unwrap();
    assert_eq!(run(&program, &call), ERRNO | libc::ENOSYS as u32);
    assert_eq!(judge(&profile, &call), ERRNO | libc::ENOSYS as u32);
}

#[test]
fn a_program_longer_than_its_jumps_reach_answers_right() {
    // Far more than 255 instructions between the tree and what it leads to.
    let rules = |name: &str, index: u32| {
        let values = (0..400).map(move |value| profile::Condition {
            index,
            operator: Operator::Equal,
            value,
        });
        let rule = |condition: profile::Condition| profile::Rule {
            answer: ERRNO | (condition.value as u32 + 1),
            conditions: vec![condition],
        };
        values
            .map(|value| (name.to_owned(), rule(value)))
            .collect::<Vec<_>>()
    };
    let profile = Profile {
        default: ALLOW,
        x86: false,
        x32: false,
        flags: 0,
        rules: [rules("personality", 0), rules("ioctl", 1)].concat(),
    };
    let program = compile::program(&profile).unwrap();
    assert!(program.len() > 3000, "{}", program.len());
    for number in [libc::SYS_personality, libc::SYS_ioctl, libc::SYS_read] {
        for value in [0, 1, 200, 399, 400, 1 << 32] {
            let call = Call {
                architecture: ARCHITECTURE_X86_64,
                number: number as u32,
                arguments: [value, value, 0, 0, 0, 0],
            };
            assert_eq!(run(&program, &call), judge(&profile, &call), "{call:?}");
        }
    }
}

#[test]
fn a_profile_longer_than_the_kernel_takes_is_refused() {
    let rule = |value: u32| {
        json!({"names": ["personality"], "action": "SCMP_ACT_ALLOW",
               "args": [{"index": 0, "value": value, "op": "SCMP_CMP_EQ"}]})
    };
    let rules: Vec<_> = (0..2000).map(rule).collect();
    let profile = json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules});
    let refused = compile::program(&read(&profile).unwrap()).unwrap_err();
    assert!(refused.to_string().contains("4096"), "{refused}");
}

#[test]
fn a_filter_is_what_was_compiled() {
    let profile = json!({"defaultAction": "SCMP_ACT_KILL", "flags": ["SECCOMP_FILTER_FLAG_LOG"],
        "syscalls": [{"names": ["read", "write"], "action": "SCMP_ACT_ALLOW"}]});
    let seccomp: Seccomp = serde_json::from_value(profile.clone()).unwrap();
    let filter = filter(&seccomp).unwrap();
    assert_eq!(filter.flags, 2);
    let compiled = compile::program(&read(&profile).unwrap()).unwrap();
    let same = |(one, two): (&Instruction, &Instruction)| {
        (one.code, one.jt, one.jf, one.k) == (two.code, two.jt, two.jf, two.k)
    };
    let instructions = filter.instructions();
    assert!(instructions.len() == compiled.len() && instructions.iter().zip(&compiled).all(same));
}

#[test]
fn conditions_about_one_argument_are_alternatives_and_others_go_together() {
    let rule = |indices: [u32; 2]| {
        let arg = |index, value| json!({"index": index, "value": value, "op": "SCMP_CMP_EQ"});
        json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{
            "names": ["dup2"], "action": "SCMP_ACT_ALLOW",
            "args": [arg(indices[0], 1), arg(indices[1], 2)]}]})
    };
    let ask = |indices, arguments| native(&rule(indices), libc::SYS_dup2, arguments);
    assert_eq!(ask([0, 0], [1, 0, 0, 0, 0, 0]), ALLOW);
    assert_eq!(ask([0, 0], [2, 0, 0, 0, 0, 0]), ALLOW);
    assert_eq!(ask([0, 1], [1, 0, 0, 0, 0, 0]), NOT_PERMITTED);
    assert_eq!(ask([0, 1], [1, 2, 0, 0, 0, 0]), ALLOW);
}

#[test]
fn calls_newer_than_a_list_of_allowed_ones_are_missing_not_forbidden() {
    let profile = json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [
        {"names": ["read", "openat2"], "action": "SCMP_ACT_ALLOW"}]});
    assert_eq!(native(&profile, libc::SYS_openat2, [0; 6]), ALLOW);
    assert_eq!(native(&profile, libc::SYS_write, [0; 6]), NOT_PERMITTED);
    assert_eq!(native(&profile, libc::SYS_openat2 + 1, [0; 6]), NO_CALL);
    assert_eq!(native(&profile, -1, [0; 6]), NO_CALL);
}

#[test]
fn each_action_is_the_kernels() {
    for (name, errno, expected) in [
        ("SCMP_ACT_KILL", None, 0),
        ("SCMP_ACT_KILL_THREAD", None, 0),
        ("SCMP_ACT_KILL_PROCESS", None, 0x8000_0000),
        ("SCMP_ACT_TRAP", None, 0x0003_0000),
        ("SCMP_ACT_ERRNO", None, 0x0005_0001),
        ("SCMP_ACT_ERRNO", Some(0), 0x0005_0000),
        ("SCMP_ACT_ERRNO", Some(38), 0x0005_0026),
        ("SCMP_ACT_TRACE", Some(0xffff), 0x7ff0_ffff),
        ("SCMP_ACT_LOG", None, 0x7ffc_0000),
    ] {
        let profile = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["read"], "action": name, "errnoRet": errno}]});
        assert_eq!(native(&profile, libc::SYS_read, [0; 6]), expected, "{name}");
        assert_eq!(native(&profile, libc::SYS_write, [0; 6]), ALLOW);
    }
}

#[test]
fn what_a_profile_cannot_mean_is_refused_by_name() {
    let syscall = |field: &str, value: serde_json::Value| {
        let mut rule = json!({"names": ["read"], "action": "SCMP_ACT_ALLOW"});
        rule[field] = value;
        json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [rule]})
    };
    let arg = |index: u32, op: &str| json!([{"index": index, "value": 0, "op": op}]);
    let act = |name: &str| json!({"defaultAction": name});
    let with = |field: &str, value: serde_json::Value| {
        let mut profile = act("SCMP_ACT_ALLOW");
        profile[field] = value;
        profile
    };
    for (profile, word) in [
        (json!({}), "defaultAction"),
        (act("SCMP_ACT_FLY"), "SCMP_ACT_FLY"),
        (act("SCMP_ACT_NOTIFY"), "SCMP_ACT_NOTIFY"),
        (with("defaultErrnoRet", json!(1)), "errnoRet"),
        (
            with("architectures", json!(["SCMP_ARCH_Z80"])),
            "SCMP_ARCH_Z80",
        ),
        (with("flags", json!(["SECCOMP_FILTER_FLAG_X"])), "FLAG_X"),
        (
            with("flags", json!(["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"])),
            "WAIT_KILLABLE_RECV",
        ),
        (with("listenerPath", json!("/run/x")), "listenerPath"),
        (with("listenerMetadata", json!("x")), "listenerPath"),
        (
            syscall("action", json!("SCMP_ACT_NOTIFY")),
            "SCMP_ACT_NOTIFY",
        ),
        (syscall("action", json!("")), "syscalls.action"),
        (syscall("errnoRet", json!(5)), "errnoRet"),
        (syscall("names", json!([])), "syscalls.names"),
        (syscall("names", json!([""])), "syscalls.names"),
        (syscall("args", arg(6, "SCMP_CMP_EQ")), "index 6"),
        (syscall("args", arg(0, "SCMP_CMP_IS")), "SCMP_CMP_IS"),
    ] {
        let refused = read(&profile).unwrap_err().to_string();
        assert!(refused.contains(word), "{profile}: {refused}");
    }
    let large = json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 4096});
    assert!(read(&large).unwrap_err().to_string().contains("4096"));
}

#[test]
fn the_table_has_the_kernels_numbers() {
    let calls = table::calls();
    for (name, number) in [
        ("read", libc::SYS_read),
        ("execveat", libc::SYS_execveat),
        ("mseal", libc::SYS_mseal),
    ] {
        assert_eq!(calls[name].x86_64, Some(number as u32), "{name}");
    }
    let numbers = calls["execve"];
    assert_eq!((numbers.x32, numbers.i386), (Some(520), Some(11)));
    assert_eq!(calls["waitpid"].x86_64, None);
}

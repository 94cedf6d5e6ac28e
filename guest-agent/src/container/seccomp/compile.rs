//! From a profile to a program of classic BPF, as a search tree over ranges of call numbers.

use std::collections::BTreeMap;

use super::assembly::{Assembly, EQUAL, GREATER, NOT_LESS, Target, load, mask};
use super::profile::{Condition, Operator, Profile, Rule};
use super::table::{self, Numbers};
use super::{ARCHITECTURE, ARCHITECTURE_I386, ARCHITECTURE_X86_64, ARGUMENTS, NUMBER, X32, answer};
use crate::container::plan::PlanError;
use crate::sys::Instruction;

/// BPF_MAXINSNS.
pub const LONGEST: usize = 4096;

/// What to do about a number and those that follow, up to the next one in the list.
type Ranges = Vec<(u32, Target)>;

/// Compiles a profile. Names that the kernel does not know have no effect, as with runc.
pub fn program(profile: &Profile) -> Result<Vec<Instruction>, PlanError> {
    let calls = table::calls();
    let mut writer = Writer::default();

    let x86_64 = Calls::of(profile, &calls, |numbers| numbers.x86_64);
    let mut ranges = writer.ranges(&x86_64, profile, true)?;
    if profile.x32 {
        let x32 = Calls::of(profile, &calls, |numbers| numbers.x32);
        let above = writer.ranges(&x32, profile, false)?;
        ranges.extend(above.into_iter().map(|(from, to)| (X32 | from, to)));
    } else {
        put(&mut ranges, X32, Target::Answer(answer::KILL_PROCESS));
        // A tracer's way to skip a call, and no x32 call.
        put(&mut ranges, u32::MAX, Target::Answer(x86_64.beyond));
    }
    let native = writer.numbers(&ranges);

    // Programs of an architecture that is not named do not run. libseccomp kills the thread only,
    // which would leave the rest of a program waiting for it.
    let mut other = Target::Answer(answer::KILL_PROCESS);
    if profile.x86 {
        let mut i386 = Calls::of(profile, &calls, |numbers| numbers.i386);
        i386.multiplex(profile);
        let ranges = writer.ranges(&i386, profile, false)?;
        let tree = writer.numbers(&ranges);
        other = writer
            .assembly
            .branch(EQUAL, ARCHITECTURE_I386, tree, other);
    }
    let first = writer
        .assembly
        .branch(EQUAL, ARCHITECTURE_X86_64, native, other);
    writer.assembly.step(load(ARCHITECTURE), first);
    writer.check()?;
    Ok(writer.assembly.finish())
}

/// The rules of one architecture, by number.
struct Calls {
    rules: BTreeMap<u32, Vec<Rule>>,
    /// The highest number the profile speaks of.
    highest: Option<u32>,
    /// The answer to calls above that.
    beyond: u32,
}

impl Calls {
    fn of(
        profile: &Profile,
        calls: &BTreeMap<&str, Numbers>,
        number: fn(&Numbers) -> Option<u32>,
    ) -> Self {
        let mut rules: BTreeMap<u32, Vec<Rule>> = BTreeMap::new();
        for (name, rule) in &profile.rules {
            if let Some(number) = calls.get(name.as_str()).and_then(number) {
                rules.entry(number).or_default().push(rule.clone());
            }
        }
        let highest = rules.keys().next_back().copied();
        Self {
            rules,
            highest,
            beyond: Self::beyond(highest, profile),
        }
    }

    /// A profile that allows what it names was written before the kernel got the calls above the
    /// highest. Programs go on without them only when told that they are missing, so runc does so
    /// too.
    fn beyond(highest: Option<u32>, profile: &Profile) -> u32 {
        let permissive = matches!(
            answer::kind(profile.default),
            answer::ALLOW | answer::LOG | answer::TRACE
        );
        match highest {
            Some(_) if !permissive => answer::ERRNO | libc::ENOSYS as u32,
            _ => profile.default,
        }
    }

    /// Adds socketcall(2) and ipc(2). Rules with conditions cannot reach so far: the arguments lie
    /// in memory there, which a filter does not see.
    fn multiplex(&mut self, profile: &Profile) {
        for (name, rule) in &profile.rules {
            let Some(by) = table::multiplexed(name).filter(|_| rule.conditions.is_empty()) else {
                continue;
            };
            let condition = Condition {
                index: 0,
                operator: Operator::MaskedEqual(by.mask),
                value: by.function,
            };
            self.rules.entry(by.call).or_default().push(Rule {
                answer: rule.answer,
                conditions: vec![condition],
            });
            self.highest = self.highest.max(Some(by.call));
        }
        self.beyond = Self::beyond(self.highest, profile);
    }
}

/// Appends to ranges, joining those that do the same.
fn put(ranges: &mut Ranges, from: u32, target: Target) {
    if ranges.last().is_some_and(|last| last.0 == from) {
        ranges.pop();
    }
    if ranges.last().is_none_or(|last| last.1 != target) {
        ranges.push((from, target));
    }
}

#[derive(Default)]
struct Writer {
    assembly: Assembly,
    /// Where rules with conditions are carried out: many calls share theirs.
    bodies: Vec<(Vec<Rule>, bool, Target)>,
}

impl Writer {
    fn check(&self) -> Result<(), PlanError> {
        if self.assembly.len() <= LONGEST {
            return Ok(());
        }
        Err(PlanError::Invalid {
            field: "linux.seccomp.syscalls".into(),
            what: format!(
                "the profile makes more than {LONGEST} instructions, the most the kernel takes; \
                 name fewer calls with args"
            ),
        })
    }

    /// Of one architecture, its numbers from 0 on. `wide` where arguments have 64 bits.
    fn ranges(
        &mut self,
        calls: &Calls,
        profile: &Profile,
        wide: bool,
    ) -> Result<Ranges, PlanError> {
        let default = Target::Answer(profile.default);
        let mut ranges = vec![(0, default)];
        for (&number, rules) in &calls.rules {
            let target = self.call(rules, profile.default, wide);
            self.check()?;
            put(&mut ranges, number, target);
            put(&mut ranges, number + 1, default);
        }
        let beyond = calls.highest.map_or(0, |highest| highest + 1);
        put(&mut ranges, beyond, Target::Answer(calls.beyond));
        Ok(ranges)
    }

    /// What to do about one call. As libseccomp has it: a rule that answers what the profile
    /// answers anyway is none, and one without conditions goes before those with. Of the others
    /// the profile's first that holds counts.
    fn call(&mut self, rules: &[Rule], default: u32, wide: bool) -> Target {
        let rules = rules.iter().filter(|rule| rule.answer != default);
        if let Some(rule) = rules.clone().find(|rule| rule.conditions.is_empty()) {
            return Target::Answer(rule.answer);
        }
        let rules: Vec<Rule> = rules.cloned().collect();
        let mut bodies = self.bodies.iter();
        if let Some(body) = bodies.find(|body| body.0 == rules && body.1 == wide) {
            return body.2;
        }
        let mut next = Target::Answer(default);
        for rule in rules.iter().rev() {
            let holds = Target::Answer(rule.answer);
            let conditions = rule.conditions.iter().rev();
            next = conditions.fold(holds, |holds, condition| {
                self.condition(condition, wide, holds, next)
            });
        }
        self.bodies.push((rules, wide, next));
        next
    }

    /// Compares an argument. Of 32-bit programs only the lower half counts, also of the value.
    fn condition(&mut self, condition: &Condition, wide: bool, yes: Target, no: Target) -> Target {
        let low = ARGUMENTS + 8 * condition.index;
        let high = low + 4;
        let value = condition.value;
        let (code, yes, no) = match condition.operator {
            Operator::Equal => return self.equal(low, wide, u64::MAX, value, yes, no),
            Operator::NotEqual => return self.equal(low, wide, u64::MAX, value, no, yes),
            Operator::MaskedEqual(bits) => {
                return self.equal(low, wide, bits, value & bits, yes, no);
            }
            Operator::NotLess => (NOT_LESS, yes, no),
            Operator::Less => (NOT_LESS, no, yes),
            Operator::Greater => (GREATER, yes, no),
            Operator::NotGreater => (GREATER, no, yes),
        };
        let assembly = &mut self.assembly;
        let lower = assembly.branch(code, value as u32, yes, no);
        let lower = assembly.step(load(low), lower);
        if !wide {
            return lower;
        }
        let upper = (value >> 32) as u32;
        let same = assembly.branch(EQUAL, upper, lower, no);
        let more = assembly.branch(GREATER, upper, yes, same);
        assembly.step(load(high), more)
    }

    /// The lower half comes first, as it is the one that differs.
    fn equal(
        &mut self,
        low: u32,
        wide: bool,
        bits: u64,
        value: u64,
        yes: Target,
        no: Target,
    ) -> Target {
        let mut half = |offset, bits: u32, value: u32, yes| {
            let mut at = self.assembly.branch(EQUAL, value, yes, no);
            if bits != u32::MAX {
                at = self.assembly.step(mask(bits), at);
            }
            self.assembly.step(load(offset), at)
        };
        let mut upper = yes;
        if wide && bits >> 32 != 0 {
            upper = half(low + 4, (bits >> 32) as u32, (value >> 32) as u32, yes);
        }
        half(low, bits as u32, value as u32, upper)
    }

    /// Finds the range of the call's number.
    fn numbers(&mut self, ranges: &[(u32, Target)]) -> Target {
        let tree = self.tree(ranges);
        self.assembly.step(load(NUMBER), tree)
    }

    fn tree(&mut self, ranges: &[(u32, Target)]) -> Target {
        if let [(_, target)] = ranges {
            return *target;
        }
        let (below, from) = ranges.split_at(ranges.len() / 2);
        let Some((first, _)) = from.first() else {
            return Target::Answer(answer::KILL_PROCESS);
        };
        let from = self.tree(from);
        let below = self.tree(below);
        self.assembly.branch(NOT_LESS, *first, from, below)
    }
}

//! Classic BPF, written from its end to its beginning: jumps go forward only, so what a jump leads
//! to is always there already.
//!
//! Only what the kernel can follow without running it is used (loads, jumps, AND, answers), so that
//! it finds out which calls are allowed whatever their arguments.

use std::collections::BTreeMap;

use crate::sys::Instruction;

/// BPF_JMP | BPF_K with BPF_JEQ, BPF_JGT, BPF_JGE.
pub const EQUAL: u16 = 0x15;
pub const GREATER: u16 = 0x25;
pub const NOT_LESS: u16 = 0x35;

/// The farthest a conditional jump reaches, in instructions skipped.
const REACH: usize = u8::MAX as usize;

const fn plain(code: u16, k: u32) -> Instruction {
    Instruction {
        code,
        jt: 0,
        jf: 0,
        k,
    }
}

/// Loads the word at an offset of struct seccomp_data: BPF_LD | BPF_W | BPF_ABS.
pub const fn load(offset: u32) -> Instruction {
    plain(0x20, offset)
}

/// Keeps these bits of the loaded word: BPF_ALU | BPF_AND | BPF_K.
pub const fn mask(bits: u32) -> Instruction {
    plain(0x54, bits)
}

/// Ends with an answer: BPF_RET | BPF_K.
pub const fn answer(answer: u32) -> Instruction {
    plain(0x06, answer)
}

/// Skips `yes` instructions when the loaded word is `value`, else `no`.
pub const fn when(value: u32, yes: u8, no: u8) -> Instruction {
    Instruction {
        code: EQUAL,
        jt: yes,
        jf: no,
        k: value,
    }
}

/// Where to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The end, with this answer.
    Answer(u32),
    /// The instruction that is this far from the end; the last one is 1.
    At(usize),
}

/// A program in the making.
#[derive(Debug, Default)]
pub struct Assembly {
    /// The last instruction first.
    reversed: Vec<Instruction>,
    /// For each answer the instruction nearest to the beginning that gives it.
    answers: BTreeMap<u32, usize>,
}

impl Assembly {
    /// Instructions so far.
    pub fn len(&self) -> usize {
        self.reversed.len()
    }

    fn push(&mut self, instruction: Instruction) -> usize {
        self.reversed.push(instruction);
        self.reversed.len()
    }

    /// A place that a jump reaches which stands `before` instructions before the next one.
    fn near(&mut self, target: Target, before: usize) -> usize {
        let reaches = |at: usize| self.reversed.len() + before - at <= REACH;
        match target {
            Target::Answer(value) => match self.answers.get(&value) {
                Some(&at) if reaches(at) => at,
                _ => {
                    let at = self.push(answer(value));
                    self.answers.insert(value, at);
                    at
                }
            },
            Target::At(at) if reaches(at) => at,
            // BPF_JMP | BPF_JA, whose reach has no bound. A program is far shorter than 2^32.
            Target::At(at) => self.push(plain(0x05, (self.reversed.len() - at) as u32)),
        }
    }

    /// Compares the loaded word with `value`.
    pub fn branch(&mut self, code: u16, value: u32, yes: Target, no: Target) -> Target {
        let yes = self.near(yes, 1);
        let no = self.near(no, 0);
        let skipped = |at: usize| (self.reversed.len() - at) as u8;
        let instruction = Instruction {
            code,
            jt: skipped(yes),
            jf: skipped(no),
            k: value,
        };
        Target::At(self.push(instruction))
    }

    /// An instruction that goes on to `next`.
    pub fn step(&mut self, instruction: Instruction, next: Target) -> Target {
        let at = self.near(next, 0);
        let between = self.reversed.len() - at;
        if between > 0 {
            self.push(plain(0x05, between as u32));
        }
        Target::At(self.push(instruction))
    }

    /// The program, which begins with what was written last.
    pub fn finish(mut self) -> Vec<Instruction> {
        self.reversed.reverse();
        self.reversed
    }
}

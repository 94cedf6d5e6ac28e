//! A guest of a few instructions that shows whether KVM can run a kernel.
//!
//! Some machines offer a /dev/kvm that answers every call, yet interprets guests instruction by
//! instruction and knows only some of them; Linux dies there in its first self tests. So the
//! guest does what kernels do: a breakpoint through the IDT, xsave and xrstor, cmpxchg16b, and a
//! loop that is timed. It runs in a process of its own, which can be killed when it hangs.

use std::fmt;
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_segment};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use serde::{Deserialize, Serialize};

use super::sys::{Memory, Program, program};

/// The argument of `bulkhead doctor` with which the child is started.
const ARGUMENT: &str = "--micro-guest";

const TIME_LIMIT: Duration = Duration::from_secs(10);
/// As often as the program's loop turns.
const TURNS: f64 = 100_000.0;
/// A processor takes less than a nanosecond, an emulated one with KVM inside some ten.
const SLOWEST_NANOSECONDS: f64 = 200.0;

/// Guest addresses; the program knows those from 0x10000 on.
const MEMORY_BYTES: usize = 0x20000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const GDT: u64 = 0x4000;
const IDT: u64 = 0x5000;
const CODE: u64 = 0x8000;
const STACK_TOP: u64 = 0xf000;

/// How the micro guest ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Outcome {
    /// All steps passed.
    Passed {
        /// Time of one turn of the loop (two instructions), in nanoseconds.
        nanoseconds: f64,
    },
    /// KVM did not even start it.
    Refused {
        /// Which call failed, and how.
        reason: String,
    },
    /// It ended otherwise than it should.
    Failed {
        /// In which step.
        step: Step,
        /// How it ended.
        reason: String,
        /// Time of one turn of the loop, in nanoseconds, if that step passed.
        nanoseconds: Option<f64>,
    },
    /// It did not end.
    Hung,
}

/// The program's steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// Its first instruction.
    Entry,
    /// The timed loop.
    Loop,
    /// int3.
    Breakpoint,
    /// xsave and xrstor.
    Xsave,
    /// cmpxchg16b.
    Exchange,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Entry => "the first instruction",
            Self::Loop => "a loop in ring 0",
            Self::Breakpoint => "int3 through an IDT",
            Self::Xsave => "xsave and xrstor",
            Self::Exchange => "cmpxchg16b",
        })
    }
}

/// Whether loops of this speed mean that KVM interprets its guests.
pub fn is_interpreted(nanoseconds: f64) -> bool {
    nanoseconds > SLOWEST_NANOSECONDS
}

/// Runs the micro guest in a child of this program and waits for its end, or ends it.
pub fn run() -> Outcome {
    let refused = |reason: String| Outcome::Refused { reason };
    let child = std::env::current_exe().and_then(|program| {
        Command::new(program)
            .args(["doctor", ARGUMENT])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
    });
    let mut child = match child {
        Ok(child) => child,
        Err(error) => return refused(format!("its process does not start: {error}")),
    };
    let Some(mut output) = child.stdout.take() else {
        return refused("its process has no output".to_owned());
    };
    let (sender, receiver) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        let read = output.by_ref().take(64 << 10).read_to_end(&mut text);
        let _ = sender.send(read.map(|_| text));
    });
    let text = receiver.recv_timeout(TIME_LIMIT);
    // Ended or not, it is of no more use; it can be in the kernel for good, so it is not awaited
    // before it is killed.
    let _ = child.kill();
    let status = child.wait();
    let _ = reader.join();
    match text {
        Err(_) => Outcome::Hung,
        Ok(Err(error)) => refused(format!("its process cannot be read: {error}")),
        Ok(Ok(text)) => serde_json::from_slice(&text).unwrap_or_else(|_| {
            let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
            refused(format!("its process ended without a word ({status})"))
        }),
    }
}

/// What the child does: runs the guest here, however long that takes.
pub fn run_here() -> Outcome {
    match guest() {
        Ok(outcome) => outcome,
        Err(reason) => Outcome::Refused { reason },
    }
}

fn guest() -> Result<Outcome, String> {
    let failed = |call: &'static str| move |error| format!("{call}: {error}");
    // Before the VM, so that it is unmapped after the VM is closed.
    let mut memory = Memory::new(MEMORY_BYTES).map_err(|error| format!("mmap: {error}"))?;
    fill(&mut memory, &program()).map_err(|error| format!("guest memory: {error}"))?;
    let kvm = Kvm::new().map_err(failed("open /dev/kvm"))?;
    let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
    // Needed by older Intel processors, harmless elsewhere.
    vm.set_tss_address(0xfffb_d000)
        .map_err(failed("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
    memory
        .give(&vm)
        .map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(failed("KVM_CREATE_VCPU"))?;
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
    vcpu.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
    enter(&vcpu).map_err(failed("KVM_SET_SREGS"))?;
    Ok(watch(&mut vcpu))
}

/// Runs the guest to its end, from step to step.
fn watch(vcpu: &mut VcpuFd) -> Outcome {
    let mut step = Step::Entry;
    let mut nanoseconds = None;
    let mut since = Instant::now();
    let reason = loop {
        let told = match vcpu.run() {
            Ok(VcpuExit::IoOut(0x80, [told])) => *told,
            Ok(exit) => break format!("KVM stopped the guest: {exit:?}"),
            Err(error) => break format!("KVM_RUN: {error}"),
        };
        let took = since.elapsed();
        step = match (told, step) {
            (1, Step::Entry) => Step::Loop,
            (2, Step::Loop) => {
                nanoseconds = Some(took.as_nanos() as f64 / TURNS);
                Step::Breakpoint
            }
            (3, Step::Breakpoint) => Step::Xsave,
            (4, Step::Xsave) => Step::Exchange,
            (0x7f, Step::Exchange) => match nanoseconds {
                Some(nanoseconds) => return Outcome::Passed { nanoseconds },
                None => break "it was not timed".to_owned(),
            },
            (0x7e, _) => break "its result is wrong".to_owned(),
            (0x7d, _) => break "the guest got an exception".to_owned(),
            (told, _) => break format!("the guest said {told:#x} out of turn"),
        };
        since = Instant::now();
    };
    Outcome::Failed {
        step,
        reason,
        nanoseconds,
    }
}

/// Page tables, descriptor tables, program.
fn fill(memory: &mut Memory, program: &Program) -> std::io::Result<()> {
    // Intel SDM 3A §4.5: present, writable; one page of 2 MiB maps all there is to itself.
    let entry =
        |memory: &mut Memory, at: u64, value: u64| memory.write(at as usize, &value.to_le_bytes());
    entry(memory, PML4, PDPT | 3)?;
    entry(memory, PDPT, DIRECTORY | 3)?;
    entry(memory, DIRECTORY, 0x83)?;
    // §3.4.5: 64-bit code, then data, both ring 0.
    entry(memory, GDT + 8, 0x00af_9b00_0000_ffff)?;
    entry(memory, GDT + 16, 0x00cf_9300_0000_ffff)?;
    for vector in 0..32_u64 {
        let handler = if vector == 3 {
            program.breakpoint
        } else {
            program.exception
        };
        let address = CODE + handler;
        // §6.14.1: interrupt gate, ring 0, code segment 8.
        let low = (address & 0xffff) | 8 << 16 | 0x8e00 << 32 | (address >> 16 & 0xffff) << 48;
        entry(memory, IDT + vector * 16, low)?;
        entry(memory, IDT + vector * 16 + 8, address >> 32)?;
    }
    memory.write(CODE as usize, program.code)
}

/// 64-bit mode at the program's start.
fn enter(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut special = vcpu.get_sregs()?;
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 8,
        type_: 11,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..kvm_segment::default()
    };
    let data = kvm_segment {
        selector: 16,
        type_: 3,
        l: 0,
        db: 1,
        ..code
    };
    special.cs = code;
    (special.ds, special.es, special.ss, special.fs, special.gs) = (data, data, data, data, data);
    special.gdt.base = GDT;
    special.gdt.limit = 23;
    special.idt.base = IDT;
    special.idt.limit = 32 * 16 - 1;
    special.cr3 = PML4;
    // PE, MP, ET, NE, WP, PG; PAE, OSFXSR, OSXMMEXCPT, OSXSAVE; LME, LMA.
    special.cr0 = 0x8001_0033;
    special.cr4 = 0x0004_0620;
    special.efer = 0x500;
    vcpu.set_sregs(&special)?;
    let mut general = vcpu.get_regs()?;
    general.rip = CODE;
    general.rsp = STACK_TOP;
    general.rflags = 2;
    vcpu.set_regs(&general)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[ignore = "needs a KVM that boots kernels: runs in the bed"]
    fn a_kvm_that_boots_kernels_passes_every_step() {
        let Outcome::Passed { nanoseconds } = run_here() else {
            panic!("{:?}", run_here())
        };
        assert!(!is_interpreted(nanoseconds), "{nanoseconds} ns");
    }

    #[test]
    fn the_handlers_lie_in_the_program() {
        let program = program();
        assert!(program.breakpoint < program.exception);
        assert!((program.exception as usize) < program.code.len());
    }
}

//! PID 1 of a pod's guest, see `ARCHITECTURE.md`.

mod boot;
mod console;
mod container;
mod control;
mod dial;
mod disk;
mod mount;
mod network;
mod operations;
mod reap;
mod sandbox;
mod service;
mod stats;
mod stdio;
mod sys;
mod usage;

use std::process::ExitCode;

/// The argument by which the agent calls itself for a process that is to become a container's.
const STAGE: &str = "stage";
/// As [`STAGE`], for the first process of a shared PID namespace.
const PAUSE: &str = "pause";
/// As [`STAGE`], for the process that makes the namespaces of a pod with user ids of its own.
const APART: &str = "apart";

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some(STAGE) => return container::stage::main(),
        Some(PAUSE) => return container::pause::main(),
        Some(APART) => return container::apart::main(),
        _ => {}
    }
    if std::process::id() != 1 {
        eprintln!("bulkhead-agent is the first process of a Bulkhead guest; it does nothing here");
        return ExitCode::FAILURE;
    }
    sys::use_one_heap();
    match boot::boot().and_then(|boot| Ok(control::run(boot)?)) {
        Ok(never) => match never {},
        Err(error) => {
            console::say(&format!("the guest cannot start: {error}"));
            // The kernel's panic on the end of PID 1 resets the machine, which ends the VM.
            ExitCode::FAILURE
        }
    }
}

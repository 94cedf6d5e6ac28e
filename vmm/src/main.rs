//! `bulkhead-vmm`: one KVM virtual machine, one process.
//!
//! It takes no arguments: see [`bulkhead_vmm_api`] for what it inherits, and ARCHITECTURE.md for
//! what it does.

mod arch;
mod confine;
mod control;
mod device;
mod files;
mod journal;
mod machine;
mod record;
mod sys;

use std::fs::File;
use std::process::ExitCode;

use bulkhead_vmm_api::{ExitReason, VmConfig};

use device::console::Console;
use files::Files;
use record::Record;

fn main() -> ExitCode {
    match live() {
        Ok(ExitReason::Shutdown | ExitReason::GuestReset) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            journal::write(format_args!("{error:#}."));
            ExitCode::FAILURE
        }
    }
}

/// Lives through one VM. Fails only where there is no exit record to write to.
fn live() -> anyhow::Result<ExitReason> {
    let (config, mut files) = files::inherit()?;
    let copy = config
        .console
        .map(|fd| files.take(fd, "console"))
        .transpose()?;
    let console = Console::new(copy.map(File::from));
    let record = Record::new(
        files.take(config.exit_record, "exit record")?,
        console.clone(),
    );
    end_on_panic(record.clone());
    let reason = match start(&config, files, console) {
        Ok(machine) => machine.run(),
        Err(error) => {
            journal::write(format_args!(
                "The VM of pod {} did not start: {error}.",
                config.id
            ));
            ExitReason::StartFailed(error.to_string())
        }
    };
    record.write(reason.clone());
    Ok(reason)
}

/// Confines the process first: nothing below needs more than the descriptors.
fn start(
    config: &VmConfig,
    mut files: Files,
    console: Console,
) -> anyhow::Result<machine::Machine> {
    let cgroup = config
        .cgroup_procs
        .map(|fd| files.take(fd, "cgroup"))
        .transpose()?;
    confine::enter(cgroup)?;
    Ok(machine::start(config, files, console)?)
}

/// A VMM in a state that nobody thought of must not go on.
fn end_on_panic(record: Record) {
    std::panic::set_hook(Box::new(move |info| {
        journal::write(format_args!("{info}"));
        record.write(ExitReason::Failed(format!("a defect of the VMM: {info}")));
        std::process::abort();
    }));
}

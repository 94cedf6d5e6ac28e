//! `cargo xtask`: the project's own commands.
//!
//! Progress is told on standard error; what a caller may want to use (a path, a command's output)
//! goes to standard output. Everything that takes long is cached under `$XDG_CACHE_HOME/bulkhead`
//! (`~/.cache/bulkhead`), never in the checkout.

mod artefacts;
mod assets;
mod bed;
mod bench;
mod cpio;
mod demo;
mod fuzz;
mod ground;
mod kernel;
mod packages;
mod place;
mod process;
#[cfg(test)]
mod rules;
mod suites;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The project's own commands.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Build everything a pod needs and print the directory it is in
    Build(artefacts::Arguments),
    /// Build the guest kernel (or find it in the cache) and print the path of its ELF
    Kernel(kernel::Arguments),
    /// Run a command as root in the nested test machine, with this machine's files visible
    Bed(bed::Arguments),
    /// Build everything, then run all tests, where they can run
    Test(suites::Arguments),
    /// Restart containers and run commands very often, and see that nothing grows
    Soak(suites::Soak),
    /// Run a real image as a pod in a virtual machine
    Demo(demo::Arguments),
    /// Send the streaming server's parsers what nobody thought of
    Fuzz(fuzz::Arguments),
    /// Measure, and print the figures as a table
    Bench(bench::Arguments),
}

fn main() -> ExitCode {
    let done = match Arguments::parse().task {
        Task::Build(arguments) => artefacts::command(&arguments),
        Task::Kernel(arguments) => kernel::command(&arguments),
        Task::Bed(arguments) => bed::command(arguments),
        Task::Test(arguments) => suites::command(&arguments),
        Task::Soak(arguments) => suites::soak(&arguments),
        Task::Demo(arguments) => demo::command(&arguments),
        Task::Fuzz(arguments) => fuzz::command(&arguments),
        Task::Bench(arguments) => bench::command(&arguments),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

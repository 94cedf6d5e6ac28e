//! `bulkhead`: the CRI server and its command line.

mod cgroup;
mod cli;
mod config;
mod container;
mod deadline;
mod doctor;
mod guest;
mod image;
mod metrics;
mod network;
mod numbers;
mod pulls;
mod replace;
mod sandbox;
mod service;
mod stats;
mod streaming;
mod vm;

fn main() -> std::process::ExitCode {
    cli::run()
}

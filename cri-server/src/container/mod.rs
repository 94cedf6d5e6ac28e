//! One container of a pod: CRI configuration to OCI spec, output to log, exec.

pub mod attach;
pub mod capability;
pub mod device;
pub mod exec;
pub mod file;
pub mod log;
pub mod mount;
pub mod output;
pub mod resource;
pub mod seccomp;
pub mod signal;
pub mod spec;
pub mod users;

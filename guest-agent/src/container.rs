//! Containers: from an OCI runtime specification to processes.

pub mod apart;
mod capability;
pub mod cgroup;
pub mod device;
mod launch;
pub mod layer;
pub mod mapping;
mod message;
mod option;
mod owner;
pub mod pause;
pub mod plan;
mod process;
mod rootfs;
mod seccomp;
pub mod spec;
pub mod stage;
mod terminal;
mod tree;
pub mod user;

pub use cgroup::{Cgroup, CgroupError};
pub use launch::LaunchError;
pub use owner::{
    Container, NewContainer, NewExec, State, Surroundings, Target, discard, off, remove,
};
pub use plan::PlanError;
pub use process::{Endpoint, Exit, Which};
pub use terminal::Size;

/// Why something about a container is not done.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// The specification.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The control group.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The process could not be made.
    #[error("{0}")]
    Launch(#[from] LaunchError),
    /// The program could not be executed.
    #[error("{0}")]
    Start(LaunchError),
    /// No such container or exec.
    #[error("{0}")]
    NotFound(String),
    /// There is one already.
    #[error("{0}")]
    Exists(String),
    /// Not in this state.
    #[error("{0}")]
    State(String),
    /// A bound of the agent.
    #[error("{0}")]
    Exhausted(String),
    /// The guest itself.
    #[error("{0}")]
    Internal(String),
}

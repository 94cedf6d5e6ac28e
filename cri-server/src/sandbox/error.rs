//! Why a pod or container is not as it was asked for.

use std::path::PathBuf;

use super::boot::Stage;
use super::record::RecordError;
use super::scratch::ScratchError;
use crate::cgroup::CgroupError;
use crate::container::exec::ExecError;
use crate::container::file::FileError;
use crate::container::log::LogError;
use crate::container::spec::SpecError;
use crate::guest::GuestError;
use crate::image::ImageError;
use crate::network::NetworkError;
use crate::vm::VmError;

/// Why a pod or container is not as it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// There is no such thing.
    #[error("There is no {kind} {id:?}")]
    NotFound {
        /// "pod sandbox" or "container".
        kind: &'static str,
        /// As asked for.
        id: String,
    },
    /// Another one has the name.
    #[error("The name {name} is taken by {holder}; remove that first or raise the attempt")]
    NameTaken {
        /// The name with its attempt.
        name: String,
        /// The id of the one that has it.
        holder: String,
    },
    /// A runtime handler that is not ours.
    #[error("There is no runtime handler {0:?}; this runtime's is \"bulkhead\"")]
    Handler(String),
    /// This machine cannot run pods.
    #[error("This machine cannot run pods: {0}")]
    Unavailable(String),
    /// The pod is not running.
    #[error("The pod {id} is not ready: {reason}")]
    NotReady {
        /// The pod.
        id: String,
        /// Why.
        reason: String,
    },
    /// The container is in another state than the call needs.
    #[error("The container {id} is {state}; it has to be {needed}")]
    WrongState {
        /// The container.
        id: String,
        /// Its state.
        state: &'static str,
        /// What the call needs.
        needed: &'static str,
    },
    /// The VM ended during its boot.
    #[error("The guest ended {stage}: {reason}. The end of its console:\n{console}")]
    Died {
        /// How far it had come.
        stage: Stage,
        /// Why the VM ended.
        reason: String,
        /// What it last showed.
        console: String,
    },
    /// The guest was not ready in time.
    #[error(
        "The guest was not ready in time; it stopped {stage}. The end of its console:\n{console}"
    )]
    Slow {
        /// How far it had come.
        stage: Stage,
        /// What it last showed.
        console: String,
    },
    /// The container did not end when it was killed.
    #[error("The container {0} did not end although it was killed")]
    Unkillable(String),
    /// The pod was removed meanwhile.
    #[error("The pod {0} is being removed")]
    Gone(String),
    /// The machine has no random numbers.
    #[error("No random numbers can be had: {0}")]
    Random(String),
    /// A file of the pod failed.
    #[error("{path}: {source}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A mistake in this server.
    #[error("A task of this server broke down: {0}")]
    Broken(String),
    /// The request cannot be met.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A mount cannot be copied.
    #[error(transparent)]
    Mount(#[from] FileError),
    /// The image cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The network could not be made or taken down.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The cgroup could not be made or taken down.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The scratch disk could not be made.
    #[error(transparent)]
    Scratch(#[from] ScratchError),
    /// The record could not be written.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The log could not be written.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The VMM failed.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The guest refused.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The command has no result.
    #[error(transparent)]
    Exec(#[from] ExecError),
}

impl SandboxError {
    /// The pod `id` is being removed.
    pub fn gone(id: &str) -> Self {
        Self::Gone(id.to_owned())
    }

    /// There is no container `id`.
    pub fn no_container(id: &str) -> Self {
        Self::NotFound {
            kind: "container",
            id: id.to_owned(),
        }
    }
}

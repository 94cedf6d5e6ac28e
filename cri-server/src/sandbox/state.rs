//! The states of pods and containers, each with what only it has.

use serde::{Deserialize, Serialize};

use crate::network::PodNetwork;
use crate::vm::Process;

/// The life of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PodState {
    /// Between its record and READY. Nobody outside knows the pod yet.
    Starting,
    /// The guest answers.
    Ready {
        /// Its VMM.
        vmm: Process,
        /// What the agent drew at boot: another answer is another guest.
        agent: String,
        /// Its network.
        network: PodNetwork,
    },
    /// It was stopped or has broken down.
    NotReady {
        /// Why, for the operator.
        reason: String,
    },
}

impl PodState {
    /// The pod's addresses, the main one first; none of a pod that is not ready.
    pub fn addresses(&self) -> Vec<String> {
        let Self::Ready { network, .. } = self else {
            return Vec::new();
        };
        let interfaces = network.interfaces.iter();
        let addresses = interfaces.flat_map(|interface| &interface.addresses);
        addresses
            .map(|address| address.address.to_string())
            .collect()
    }
}

/// The life of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContainerState {
    /// The guest may or may not have it. Nobody outside knows the container yet.
    Creating,
    /// Its process is held before its program.
    Created,
    /// Its program runs.
    Running {
        /// Nanoseconds since 1970.
        started_at: i64,
    },
    /// It is over.
    Exited(Exit),
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Nanoseconds since 1970; 0 if it never ran.
    pub started_at: i64,
    /// Nanoseconds since 1970, not before `started_at`.
    pub finished_at: i64,
    /// The exit status, or 128 + n after signal n.
    pub code: i32,
    /// One CamelCase word, as the kubelet shows it.
    pub reason: String,
    /// Details for people; may be empty.
    pub message: String,
}

/// The exit status of a container whose VM ended under it.
const LOST: i32 = 255;
/// The exit status of a container that never ran its program.
const NEVER_RAN: i32 = 128;

impl ContainerState {
    /// Whether the guest has a process for it.
    pub fn lives(&self) -> bool {
        !matches!(self, Self::Exited(_))
    }

    /// The program has ended by itself or by a signal.
    pub fn exit(&mut self, finished_at: i64, code: i32, oom_killed: bool, message: String) {
        let reason = match code {
            _ if oom_killed => "OOMKilled",
            0 => "Completed",
            _ => "Error",
        };
        self.end(finished_at, code, reason, message);
    }

    /// The program could not be run.
    pub fn fail_to_start(&mut self, finished_at: i64, message: String) {
        self.end(finished_at, NEVER_RAN, "StartError", message);
    }

    /// Its VM is gone.
    pub fn lose(&mut self, finished_at: i64, message: String) {
        self.end(finished_at, LOST, "Error", message);
    }

    fn end(&mut self, finished_at: i64, code: i32, reason: &str, message: String) {
        let started_at = match self {
            // The first end counts.
            Self::Exited(_) => return,
            Self::Running { started_at } => *started_at,
            Self::Creating | Self::Created => 0,
        };
        *self = Self::Exited(Exit {
            started_at,
            // The guest's clock may lag behind the host's.
            finished_at: finished_at.max(started_at),
            code,
            reason: reason.to_owned(),
            message,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(code: i32, oom_killed: bool) -> Exit {
        let mut state = ContainerState::Running { started_at: 10 };
        state.exit(20, code, oom_killed, String::new());
        match state {
            ContainerState::Exited(exit) => exit,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn reasons_are_the_words_users_know() {
        assert_eq!(exit(0, false).reason, "Completed");
        assert_eq!(exit(3, false).reason, "Error");
        assert_eq!(exit(137, true).reason, "OOMKilled");
    }

    #[test]
    fn the_first_end_counts_and_is_never_before_the_start() {
        let mut state = ContainerState::Running { started_at: 10 };
        state.exit(5, 1, false, String::new());
        let first = state.clone();
        state.lose(99, "later".into());
        assert_eq!(state, first);
        assert!(matches!(first, ContainerState::Exited(exit) if exit.finished_at == 10));
    }
}

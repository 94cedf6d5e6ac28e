//! The steps that made a pod, and their undoing.
//!
//! A step is written down before its effect, so whatever happened is known after a crash; undoing
//! tolerates a step that never happened or is undone already.

use std::future::Future;

use serde::{Deserialize, Serialize};

/// One step of making a pod, in the order in which they are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// The pod's directory for sockets.
    RunDirectory,
    /// Namespace, link and tap.
    Network,
    /// The pod's cgroup on the host.
    Cgroup,
    /// The disk containers write to.
    Scratch,
    /// The VMM process.
    Vmm,
}

/// The steps that are to be undone, oldest first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UndoList(Vec<Step>);

/// What a list of steps is about.
pub trait Undo {
    /// Why something failed.
    type Error;

    /// Writes the list down, durably.
    fn keep(&mut self, list: &UndoList) -> impl Future<Output = Result<(), Self::Error>> + Send;

    /// Takes back the effect of a step, if it is there.
    fn undo(&mut self, step: Step) -> impl Future<Output = Result<(), Self::Error>> + Send;
}

impl UndoList {
    /// To be called before the effect of `step`.
    pub async fn before<U: Undo>(&mut self, step: Step, pod: &mut U) -> Result<(), U::Error> {
        self.0.push(step);
        pod.keep(self).await
    }

    /// Undoes every step, the newest first. A step that fails stays in the list and does not keep
    /// the others from being undone; the first failure is returned. That a shorter list cannot be
    /// written, for want of space perhaps, is none: what is undone may be undone again.
    pub async fn unwind<U: Undo>(&mut self, pod: &mut U) -> Result<(), U::Error> {
        let mut failure = None;
        for at in (0..self.0.len()).rev() {
            let Some(&step) = self.0.get(at) else {
                continue;
            };
            match pod.undo(step).await {
                Ok(()) => {
                    self.0.remove(at);
                    let _ = pod.keep(self).await;
                }
                Err(error) => drop(failure.get_or_insert(error)),
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// Whether nothing is left to undo.
    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    const ALL: [Step; 5] = [
        Step::RunDirectory,
        Step::Network,
        Step::Cgroup,
        Step::Scratch,
        Step::Vmm,
    ];

    /// A machine with a disk that survives a crash.
    #[derive(Default)]
    struct Machine {
        disk: UndoList,
        effects: HashSet<Step>,
        broken: Option<Step>,
        /// Operations until the power fails.
        power: usize,
        /// Nothing can be written.
        full: bool,
    }

    impl Machine {
        fn operate(&mut self) -> Result<(), Step> {
            self.power = self.power.checked_sub(1).ok_or(Step::Vmm)?;
            Ok(())
        }

        fn make(&mut self, step: Step) -> Result<(), Step> {
            self.operate()?;
            self.effects.insert(step);
            Ok(())
        }
    }

    impl Undo for Machine {
        type Error = Step;

        async fn keep(&mut self, list: &UndoList) -> Result<(), Step> {
            self.operate()?;
            if self.full {
                return Err(Step::RunDirectory);
            }
            self.disk = list.clone();
            Ok(())
        }

        async fn undo(&mut self, step: Step) -> Result<(), Step> {
            self.operate()?;
            if self.broken == Some(step) {
                return Err(step);
            }
            self.effects.remove(&step);
            Ok(())
        }
    }

    async fn build(machine: &mut Machine) -> Result<(), Step> {
        let mut list = UndoList::default();
        for step in ALL {
            list.before(step, machine).await?;
            machine.make(step)?;
        }
        Ok(())
    }

    #[tokio::test]
    async fn whenever_the_power_fails_nothing_is_left_in_the_end() {
        // Two operations a step to build and two to undo: cut at each of them, twice.
        for first in 0..=2 * ALL.len() {
            for second in 0..=2 * ALL.len() {
                let mut machine = Machine {
                    power: first,
                    ..Default::default()
                };
                let _ = build(&mut machine).await;
                for power in [second, usize::MAX] {
                    machine.power = power;
                    let mut list = machine.disk.clone();
                    let _ = list.unwind(&mut machine).await;
                }
                assert!(machine.effects.is_empty(), "cut at {first} and {second}");
                assert!(machine.disk.is_empty());
            }
        }
    }

    #[tokio::test]
    async fn a_step_that_cannot_be_undone_is_kept_and_the_others_are_undone() {
        let mut machine = Machine {
            power: usize::MAX,
            broken: Some(Step::Network),
            ..Default::default()
        };
        build(&mut machine).await.unwrap();
        let mut list = machine.disk.clone();
        assert_eq!(list.unwind(&mut machine).await, Err(Step::Network));
        assert_eq!(machine.effects, HashSet::from([Step::Network]));
        machine.broken = None;
        list.unwind(&mut machine).await.unwrap();
        assert!(machine.effects.is_empty());
    }

    #[tokio::test]
    async fn a_full_disk_keeps_nothing_from_being_undone() {
        let mut machine = Machine {
            power: usize::MAX,
            ..Default::default()
        };
        build(&mut machine).await.unwrap();
        let mut list = machine.disk.clone();
        machine.full = true;
        assert_eq!(list.unwind(&mut machine).await, Ok(()));
        assert!(machine.effects.is_empty() && list.is_empty());
    }
}

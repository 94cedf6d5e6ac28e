//! Remembers what mutating calls answered, so that a repeated call does nothing twice.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tonic::Status;

/// How many finished operations are remembered.
const REMEMBERED: usize = 256;
/// Longest operation id, in bytes.
const LONGEST_ID: usize = 128;

/// An answer as bytes, so that one memory serves all calls.
type Answer = Result<Vec<u8>, Status>;

/// The memory.
#[derive(Debug, Default)]
pub struct Operations {
    // Held only to look up and insert, never across an await.
    memory: Arc<Mutex<Memory>>,
}

#[derive(Debug, Default)]
struct Memory {
    answers: HashMap<Arc<str>, Operation>,
    order: VecDeque<Arc<str>>,
}

#[derive(Debug)]
struct Operation {
    call: &'static str,
    progress: Progress,
}

/// A channel is many times as large as an answer, so a finished operation has none.
#[derive(Debug, Clone)]
enum Progress {
    Running(watch::Receiver<Option<Answer>>),
    Done(Answer),
}

impl Operations {
    /// Runs `work` in a task of its own, or waits for the answer of the operation with this id.
    /// The work runs to its end even when the caller goes away.
    pub async fn once<T, W>(&self, call: &'static str, id: &str, work: W) -> Result<T, Status>
    where
        T: prost::Message + Default,
        W: Future<Output = Result<T, Status>> + Send + 'static,
    {
        let known = match self.enter(call, id, work)? {
            Progress::Done(answer) => answer,
            Progress::Running(mut answer) => {
                let known = answer.wait_for(Option::is_some).await;
                known
                    .map_or(None, |known| known.clone())
                    .ok_or_else(|| Status::internal(format!("{call}: the operation died")))?
            }
        };
        T::decode(known?.as_slice())
            .map_err(|_| Status::internal(format!("{call}: the answer was lost")))
    }

    fn enter<T, W>(&self, call: &'static str, id: &str, work: W) -> Result<Progress, Status>
    where
        T: prost::Message + Default,
        W: Future<Output = Result<T, Status>> + Send + 'static,
    {
        if id.is_empty() || id.len() > LONGEST_ID {
            return Err(Status::invalid_argument(format!(
                "{call}: operation_id must have 1 to {LONGEST_ID} bytes"
            )));
        }
        let mut memory = lock(&self.memory);
        if let Some(known) = memory.answers.get(id) {
            if known.call != call {
                return Err(Status::invalid_argument(format!(
                    "{call}: operation {id} was a {}",
                    known.call
                )));
            }
            return Ok(known.progress.clone());
        }
        let (sender, answer) = watch::channel(None);
        let (id, all): (Arc<str>, _) = (id.into(), Arc::clone(&self.memory));
        memory.remember(&id, call, answer.clone());
        tokio::spawn(async move {
            let done = work.await.map(|answer| answer.encode_to_vec());
            if let Some(operation) = lock(&all).answers.get_mut(&id) {
                operation.progress = Progress::Done(done.clone());
            }
            sender.send_replace(Some(done));
        });
        Ok(Progress::Running(answer))
    }
}

fn lock(memory: &Mutex<Memory>) -> MutexGuard<'_, Memory> {
    memory.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Memory {
    fn remember(
        &mut self,
        id: &Arc<str>,
        call: &'static str,
        answer: watch::Receiver<Option<Answer>>,
    ) {
        while self.order.len() >= REMEMBERED {
            // One still running goes to the back: its caller may ask again.
            let Some(oldest) = self.order.pop_front() else {
                break;
            };
            let known = self.answers.get(&oldest);
            if known.is_some_and(|known| matches!(known.progress, Progress::Running(_))) {
                self.order.push_back(oldest);
                break;
            }
            self.answers.remove(&oldest);
        }
        self.order.push_back(Arc::clone(id));
        let progress = Progress::Running(answer);
        self.answers
            .insert(Arc::clone(id), Operation { call, progress });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_agent_api::v1::StartContainerResponse;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicI64, Ordering};

    fn started(at: i64) -> StartContainerResponse {
        StartContainerResponse {
            started_at_nanoseconds: at,
        }
    }

    #[tokio::test]
    async fn a_repeated_operation_answers_the_same_and_does_nothing() {
        let operations = Operations::default();
        let count = Arc::new(AtomicI64::new(0));
        for _ in 0..3 {
            let count = Arc::clone(&count);
            let answer: StartContainerResponse = operations
                .once("Start", "a", async move {
                    Ok(started(count.fetch_add(1, Ordering::Relaxed)))
                })
                .await
                .unwrap();
            assert_eq!(answer, started(0));
        }
        assert_eq!(count.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn a_failure_is_remembered_and_another_attempt_is_made_anew() {
        let operations = Operations::default();
        for message in ["first", "second"] {
            let work = async move { Err::<StartContainerResponse, _>(Status::not_found(message)) };
            let status = operations.once("Start", "a", work).await.unwrap_err();
            assert_eq!(status.message(), "first");
        }
        let anew = operations.once("Start", "b", async { Ok(started(7)) });
        assert_eq!(anew.await.unwrap(), started(7));
    }

    #[tokio::test]
    async fn an_id_belongs_to_one_call() {
        let operations = Operations::default();
        let _ = operations
            .once("Start", "a", async { Ok(started(1)) })
            .await;
        let other = operations
            .once("Signal", "a", async { Ok(started(1)) })
            .await;
        assert_eq!(other.unwrap_err().code(), tonic::Code::InvalidArgument);
        let empty = operations
            .once("Signal", "", async { Ok(started(1)) })
            .await;
        assert_eq!(empty.unwrap_err().code(), tonic::Code::InvalidArgument);
    }

    #[tokio::test]
    async fn work_outlives_its_caller() {
        let operations = Operations::default();
        let (go, gate) = tokio::sync::oneshot::channel::<()>();
        let first = operations.enter("Start", "a", async move {
            let _ = gate.await;
            Ok(started(5))
        });
        drop(first.unwrap());
        go.send(()).unwrap();
        let again = operations.once("Start", "a", async { Ok(started(6)) });
        assert_eq!(again.await.unwrap(), started(5));
    }

    #[tokio::test]
    async fn memory_is_bounded() {
        let operations = Operations::default();
        for id in 0..REMEMBERED + 100 {
            let id = id.to_string();
            operations
                .once("Start", &id, async { Ok(started(1)) })
                .await
                .unwrap();
        }
        assert_eq!(operations.memory.lock().unwrap().answers.len(), REMEMBERED);
    }
}

//! Execs of a container, each in a cgroup of its own.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use tokio::sync::oneshot;

use super::{Command, NewExec, Owner, Reply, State, Surroundings, adopt, off};
use crate::container::ContainerError;
use crate::container::apart::Apart;
use crate::container::cgroup::Cgroup;
use crate::container::launch::{self, Held};
use crate::container::plan;
use crate::container::process::{self, Ending, Process};
use crate::container::seccomp::Filter;
use crate::container::spec;
use crate::container::user;

/// Most execs of a container at a time, those over but not removed among them.
const MOST_EXECS: usize = 256;

/// An exec as its container's owner knows it.
pub(super) enum Exec {
    Starting,
    /// It is to be removed, but is still being started.
    Unwanted(Reply<()>),
    There(Process, Cgroup),
}

impl Owner {
    pub(super) fn exec(&mut self, new: NewExec, reply: Reply<i32>) {
        let NewExec { id, process, stdin } = new;
        let refused = match self.state() {
            State::Running if self.execs.contains_key(&id) => {
                Some(ContainerError::Exists(format!("exec {id} exists")))
            }
            State::Running if self.execs.len() >= MOST_EXECS => Some(ContainerError::Exhausted(
                format!("container {} has {MOST_EXECS} execs", self.id),
            )),
            State::Running => None,
            _ => Some(self.not("must run for an exec")),
        };
        if let Some(error) = refused {
            return drop(reply.send(Err(error)));
        }
        self.execs.insert(id.clone(), Exec::Starting);
        let beside = Beside {
            id: id.clone(),
            process,
            stdin,
            init: self.init.descriptor(),
            cgroup: self.cgroup.clone(),
            image: self.image.clone(),
            filter: self.filter.clone(),
            apart: self.apart.clone(),
        };
        let surroundings = self.surroundings.clone();
        let commands = self.commands.clone();
        tokio::spawn(async move {
            let done = execute(beside, surroundings).await;
            if let Some(commands) = commands.upgrade() {
                let _ = commands.send(Command::Executed(id, done, reply)).await;
            }
        });
    }

    pub(super) fn executed(
        &mut self,
        id: String,
        done: Result<(Process, Held, Cgroup), ContainerError>,
        reply: Reply<i32>,
    ) {
        let unwanted = match self.execs.remove(&id) {
            Some(Exec::Unwanted(remover)) => Some(remover),
            _ => None,
        };
        let (process, held, cgroup) = match (done, unwanted) {
            (Ok(done), None) => done,
            (Err(error), unwanted) => {
                let _ = reply.send(Err(error));
                return drop(unwanted.map(|remover| remover.send(Ok(()))));
            }
            (Ok((process, held, cgroup)), Some(remover)) => {
                // Closing what holds it ends it before its program runs.
                drop(held);
                let what = format!("exec {id} was removed before it had started");
                let _ = reply.send(Err(ContainerError::State(what)));
                return end_exec(process, cgroup, remover);
            }
        };
        // The exec waits for its own entry here, so that its streams can be opened by the time
        // the caller hears of it.
        let pid = process.pid;
        self.execs.insert(id.clone(), Exec::There(process, cgroup));
        let commands = self.commands.clone();
        tokio::spawn(async move {
            let started = held.start().await;
            let started = started.map(|()| pid).map_err(ContainerError::Start);
            // One that never ran is not kept for its exit.
            if let (Err(_), Some(commands)) = (&started, commands.upgrade()) {
                let (ignored, _) = oneshot::channel();
                let _ = commands.send(Command::RemoveExec(id, ignored)).await;
            }
            let _ = reply.send(started);
        });
    }

    pub(super) fn remove_exec(&mut self, id: &str, reply: Reply<()>) {
        let (process, cgroup) = match self.execs.remove(id) {
            Some(Exec::There(process, cgroup)) => (process, cgroup),
            Some(Exec::Starting) => {
                // What holds it up may last, as a frozen group does.
                let _ = self.cgroup.exec(id).kill();
                self.execs.insert(id.to_owned(), Exec::Unwanted(reply));
                return;
            }
            unknown => {
                // Somebody else is removing it already.
                if let Some(unwanted) = unknown {
                    self.execs.insert(id.to_owned(), unwanted);
                }
                let what = format!("no exec {id}");
                return drop(reply.send(Err(ContainerError::NotFound(what))));
            }
        };
        end_exec(process, cgroup, reply);
    }

    /// The server is gone, and with it all for whom execs ran.
    pub(super) fn end_execs(&mut self) {
        let ids: Vec<String> = self.execs.keys().cloned().collect();
        for id in ids {
            let (nobody, _) = oneshot::channel();
            self.remove_exec(&id, nobody);
        }
    }
}

/// Ends an exec with all it has started, and its group. What one that is over has left behind goes
/// on: it may be a daemon.
fn end_exec(process: Process, cgroup: Cgroup, reply: Reply<()>) {
    let over = process.exit().borrow().is_some();
    if !over {
        // A container with the rights to do so may have moved it out of its group. One that ends just
        // now is left alone.
        let _ = process.signal(libc::SIGKILL);
    }
    drop(process);
    tokio::spawn(async move {
        let mut killed = Ok(());
        if !over {
            killed = cgroup.kill();
            process::emptied(&cgroup).await;
        }
        let _ = off(move || cgroup.dissolve()).await;
        let _ = reply.send(killed.map_err(ContainerError::from));
    });
}

/// An exec and what it needs of its container.
struct Beside {
    id: String,
    process: spec::Process,
    stdin: bool,
    init: Arc<OwnedFd>,
    cgroup: Cgroup,
    image: String,
    filter: Option<Filter>,
    apart: Option<Arc<Apart>>,
}

async fn execute(
    beside: Beside,
    surroundings: Surroundings,
) -> Result<(Process, Held, Cgroup), ContainerError> {
    let since = surroundings.reaper.now();
    let (begun, cgroup) = off(move || -> Result<_, ContainerError> {
        let mut process = beside.process;
        user::resolve(&mut process.user, &beside.image, true)?;
        let cgroup = beside.cgroup.make_exec(&beside.id)?;
        let apart = beside.apart.as_deref();
        let mapping = apart.map(|apart| &apart.mapping);
        let begun = plan::exec(&process, &cgroup.path(), beside.filter, mapping)
            .map_err(ContainerError::from)
            .and_then(|plan| {
                let init = Some(beside.init.as_fd());
                Ok(launch::begin(&plan, apart, init, beside.stdin)?)
            });
        Ok((begun, cgroup))
    })
    .await??;
    let launched = match begun {
        Ok(begun) => begun.ready().await.map_err(ContainerError::from),
        Err(error) => Err(error),
    };
    let launched = match launched {
        Ok(launched) => launched,
        Err(error) => {
            let _ = cgroup.kill();
            process::emptied(&cgroup).await;
            let _ = off(move || cgroup.dissolve()).await;
            return Err(error);
        }
    };
    let ending = Ending {
        code: surroundings.reaper.exit(launched.pid, since),
        cgroup: cgroup.clone(),
        last: false,
        attended: surroundings.attended,
    };
    let (process, held) = adopt(launched, ending)?;
    Ok((process, held, cgroup))
}

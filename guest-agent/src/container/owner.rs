//! The task that owns a container: all that changes it goes through here, in order.

mod exec;

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot, watch};

use crate::container::ContainerError;
use crate::container::apart::Apart;
use crate::container::cgroup::Cgroup;
use crate::container::launch::{self, Held, LaunchError, Launched};
use crate::container::layer;
use crate::container::plan::Plan;
use crate::container::process::{self, Ending, Endpoint, Exit, Process, Which};
use crate::container::seccomp::Filter;
use crate::container::spec;
use crate::container::terminal::Size;
use crate::reap::Reaper;
use crate::sandbox::{Copied, now_nanoseconds};

use exec::Exec;

type Reply<T> = oneshot::Sender<Result<T, ContainerError>>;

/// A container's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Held before its exec.
    Created,
    /// Its program runs.
    Running,
    /// Over.
    Exited(Exit),
}

/// To whom a signal goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// The container's init.
    Init,
    /// An exec.
    Exec(String),
    /// Every process of the container.
    All,
}

/// What a container needs of its surroundings.
#[derive(Debug, Clone)]
pub struct Surroundings {
    /// Tells exits.
    pub reaper: Reaper,
    /// Whether a server is there to fetch output.
    pub attended: watch::Receiver<bool>,
}

/// A container, from the outside.
#[derive(Debug, Clone)]
pub struct Container {
    commands: mpsc::Sender<Command>,
    copies: Arc<[Copied]>,
}

#[derive(Debug)]
enum Command {
    Start(Reply<i64>),
    Started(Result<(), LaunchError>, Reply<i64>),
    Signal(Target, i32, Reply<()>),
    Wait(Option<String>, Reply<watch::Receiver<Option<Exit>>>),
    Exec(Box<NewExec>, Reply<i32>),
    Executed(
        String,
        Result<(Process, Held, Cgroup), ContainerError>,
        Reply<i32>,
    ),
    RemoveExec(String, Reply<()>),
    Endpoint(Option<String>, Which, Reply<Endpoint>),
    Update(Box<spec::Resources>, Option<i32>, Reply<()>),
    Resize(Option<String>, Size, Reply<()>),
    State(Reply<(State, i32)>),
    Init(Reply<Arc<OwnedFd>>),
    Remove(Reply<()>),
}

/// An exec to be made.
#[derive(Debug)]
pub struct NewExec {
    /// Its id.
    pub id: String,
    /// The specification's `process`.
    pub process: spec::Process,
    /// Whether stdin stays open.
    pub stdin: bool,
}

/// A container to be made, its files and limits already worked out.
#[derive(Debug)]
pub struct NewContainer {
    /// Its id.
    pub id: String,
    /// What the stage is to do.
    pub plan: Plan,
    /// Its group, made.
    pub cgroup: Cgroup,
    /// Its image's directory in the guest.
    pub image: String,
    /// The pod's own namespaces, if it has any.
    pub apart: Option<Arc<Apart>>,
    /// The pod's PID namespace, when it is shared.
    pub pids: Option<Arc<OwnedFd>>,
    /// Whether stdin stays open.
    pub stdin: bool,
    /// Files of the host that it may write.
    pub copies: Vec<Copied>,
}

/// Runs blocking work on a thread for it.
pub async fn off<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ContainerError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| ContainerError::Internal("a thread of the agent died".into()))
}

impl Container {
    /// Makes the container's process, held before its exec. On failure the caller removes group
    /// and directories.
    pub async fn create(
        new: NewContainer,
        surroundings: Surroundings,
    ) -> Result<(Self, i32), ContainerError> {
        let since = surroundings.reaper.now();
        let NewContainer {
            id,
            plan,
            cgroup,
            image,
            apart,
            pids,
            stdin,
            copies,
        } = new;
        let filter = plan.filter.clone();
        let with = apart.clone();
        let begun = off(move || {
            let pids = pids.as_ref().map(|pids| pids.as_fd());
            launch::begin(&plan, with.as_deref(), pids, stdin)
        });
        let launched = begun.await??.ready().await?;
        let code = surroundings.reaper.exit(launched.pid, since);
        let ending = Ending {
            code,
            cgroup: cgroup.clone(),
            last: true,
            attended: surroundings.attended.clone(),
        };
        let (init, held) = adopt(launched, ending)?;
        let pid = init.pid;
        let (commands, incoming) = mpsc::channel(16);
        let owner = Owner {
            id,
            cgroup,
            image,
            filter,
            apart,
            surroundings,
            commands: commands.downgrade(),
            phase: Phase::Created(held),
            init,
            execs: HashMap::new(),
        };
        tokio::spawn(owner.run(incoming));
        let copies = copies.into();
        Ok((Self { commands, copies }, pid))
    }

    /// Files of the host that it may write.
    pub fn copies(&self) -> &[Copied] {
        &self.copies
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, ContainerError> {
        let (reply, answer) = oneshot::channel();
        let gone = || ContainerError::NotFound("the container was removed".into());
        let sent = self.commands.send(command(reply)).await;
        sent.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Lets the program run; answers when it began, in nanoseconds since 1970.
    pub async fn start(&self) -> Result<i64, ContainerError> {
        self.ask(Command::Start).await
    }

    /// Sends a signal.
    pub async fn signal(&self, target: Target, signal: i32) -> Result<(), ContainerError> {
        self.ask(|reply| Command::Signal(target, signal, reply))
            .await
    }

    /// Waits for the end of the container's init or of an exec.
    pub async fn wait(&self, exec: Option<String>) -> Result<Exit, ContainerError> {
        let mut exit = self.ask(|reply| Command::Wait(exec, reply)).await?;
        let gone = || ContainerError::NotFound("the process was removed".into());
        let exit = exit.wait_for(Option::is_some).await.map_err(|_| gone())?;
        exit.clone().ok_or_else(gone)
    }

    /// Starts a further process; answers its number.
    pub async fn exec(&self, new: NewExec) -> Result<i32, ContainerError> {
        self.ask(|reply| Command::Exec(Box::new(new), reply)).await
    }

    /// Forgets an exec, killing it first with all it has started when it is not over.
    pub async fn remove_exec(&self, id: String) -> Result<(), ContainerError> {
        self.ask(|reply| Command::RemoveExec(id, reply)).await
    }

    /// Where a stream to the host is handed in.
    pub async fn endpoint(
        &self,
        exec: Option<String>,
        which: Which,
    ) -> Result<Endpoint, ContainerError> {
        self.ask(|reply| Command::Endpoint(exec, which, reply))
            .await
    }

    /// Changes its limits, and how readily the OOM killer takes its processes.
    pub async fn update(
        &self,
        resources: spec::Resources,
        oom_score: Option<i32>,
    ) -> Result<(), ContainerError> {
        let resources = Box::new(resources);
        self.ask(|reply| Command::Update(resources, oom_score, reply))
            .await
    }

    /// Gives a process's terminal a size.
    pub async fn resize(&self, exec: Option<String>, size: Size) -> Result<(), ContainerError> {
        self.ask(|reply| Command::Resize(exec, size, reply)).await
    }

    /// Its state and its init's number.
    pub async fn state(&self) -> Result<(State, i32), ContainerError> {
        self.ask(Command::State).await
    }

    /// Its init, which runs: a descriptor to join its namespaces by.
    pub async fn init(&self) -> Result<Arc<OwnedFd>, ContainerError> {
        self.ask(Command::Init).await
    }

    /// Ends a container that does not run and removes what is its own. Can be repeated after a
    /// failure.
    pub async fn remove(&self) -> Result<(), ContainerError> {
        self.ask(Command::Remove).await
    }
}

fn adopt(launched: Launched, ending: Ending) -> Result<(Process, Held), ContainerError> {
    let process = launched.process.try_clone();
    Process::adopt(launched, ending).map_err(|source| {
        if let Ok(process) = process {
            let _ = crate::sys::signal_process(process.as_fd(), libc::SIGKILL);
        }
        ContainerError::Internal(format!("cannot watch the process: {source}"))
    })
}

enum Phase {
    Created(Held),
    Starting,
    Running,
    /// It was not seen to start, and is killed.
    Failed,
}

struct Owner {
    id: String,
    cgroup: Cgroup,
    image: String,
    filter: Option<Filter>,
    /// The pod's own namespaces, if it has any.
    apart: Option<Arc<Apart>>,
    surroundings: Surroundings,
    /// To hear of its own tasks; not counted, so that the last user's going ends the owner.
    commands: mpsc::WeakSender<Command>,
    phase: Phase,
    init: Process,
    execs: HashMap<String, Exec>,
}

impl Owner {
    async fn run(mut self, mut incoming: mpsc::Receiver<Command>) {
        let mut attended = self.surroundings.attended.clone();
        loop {
            let command = tokio::select! {
                command = incoming.recv() => command,
                Ok(()) = attended.changed() => {
                    if !*attended.borrow_and_update() {
                        self.end_execs();
                    }
                    continue;
                }
            };
            let Some(command) = command else { return };
            match command {
                Command::Start(reply) => self.start(reply),
                Command::Started(done, reply) => self.started(done, reply),
                Command::Signal(target, signal, reply) => {
                    drop(reply.send(self.signal(&target, signal)));
                }
                Command::Wait(exec, reply) => {
                    drop(reply.send(self.process(exec.as_deref()).map(Process::exit)));
                }
                Command::Exec(new, reply) => self.exec(*new, reply),
                Command::Executed(id, done, reply) => self.executed(id, done, reply),
                Command::RemoveExec(id, reply) => self.remove_exec(&id, reply),
                Command::Endpoint(exec, which, reply) => {
                    drop(reply.send(self.endpoint(exec.as_deref(), which)));
                }
                Command::Update(resources, oom_score, reply) => {
                    self.update(resources, oom_score, reply);
                }
                Command::Resize(exec, size, reply) => {
                    drop(reply.send(self.resize(exec.as_deref(), size)));
                }
                Command::Init(reply) => drop(reply.send(match self.state() {
                    State::Running => Ok(self.init.descriptor()),
                    _ => Err(self.not("must run for its PID namespace to be joined")),
                })),
                Command::State(reply) => drop(reply.send(Ok((self.state(), self.init.pid)))),
                Command::Remove(reply) => {
                    let removed = self.remove().await;
                    let done = removed.is_ok();
                    let _ = reply.send(removed);
                    if done {
                        return;
                    }
                }
            }
        }
    }

    fn state(&self) -> State {
        match (&*self.init.exit().borrow(), &self.phase) {
            (Some(exit), _) => State::Exited(exit.clone()),
            (None, Phase::Running) => State::Running,
            (None, _) => State::Created,
        }
    }

    fn start(&mut self, reply: Reply<i64>) {
        let held = match (
            self.state(),
            std::mem::replace(&mut self.phase, Phase::Starting),
        ) {
            (State::Created, Phase::Created(held)) => held,
            (State::Exited(exit), phase @ Phase::Created(_)) => {
                self.phase = phase;
                let _ = reply.send(Err(ContainerError::State(format!(
                    "container {} ended (code {}) before it was started: it was killed, as is every \
                     process when the first of its PID namespace ends",
                    self.id, exit.code
                ))));
                return;
            }
            (_, phase) => {
                self.phase = phase;
                let _ = reply.send(Err(self.not("can be started only once")));
                return;
            }
        };
        let commands = self.commands.clone();
        tokio::spawn(async move {
            let done = held.start().await;
            if let Some(commands) = commands.upgrade() {
                let _ = commands.send(Command::Started(done, reply)).await;
            }
        });
    }

    fn started(&mut self, done: Result<(), LaunchError>, reply: Reply<i64>) {
        let answer = match done {
            Ok(()) => {
                self.phase = Phase::Running;
                Ok(now_nanoseconds())
            }
            Err(error) => {
                self.phase = Phase::Failed;
                // One that said why ends by itself, with its own code. Any other may only be slow,
                // and must not run after it was said to have failed.
                if !matches!(error, LaunchError::Stage(_))
                    && let Err(error) = self.cgroup.kill()
                {
                    crate::console::say(&error.to_string());
                }
                Err(ContainerError::Start(error))
            }
        };
        let _ = reply.send(answer);
    }

    fn not(&self, what: &str) -> ContainerError {
        let state = match self.state() {
            State::Created => "created",
            State::Running => "running",
            State::Exited(_) => "exited",
        };
        ContainerError::State(format!("container {} is {state}: it {what}", self.id))
    }

    fn process(&self, exec: Option<&str>) -> Result<&Process, ContainerError> {
        let Some(id) = exec else {
            return Ok(&self.init);
        };
        match self.execs.get(id) {
            Some(Exec::There(process, _)) => Ok(process),
            _ => Err(ContainerError::NotFound(format!(
                "container {} has no exec {id}",
                self.id
            ))),
        }
    }

    fn signal(&self, target: &Target, signal: i32) -> Result<(), ContainerError> {
        let failed = |source: std::io::Error| {
            let id = &self.id;
            ContainerError::Internal(format!("cannot signal container {id}: {source}"))
        };
        match target {
            Target::All if signal == libc::SIGKILL => Ok(self.cgroup.kill()?),
            Target::All => self.cgroup.signal(signal).map_err(failed),
            Target::Init => self.init.signal(signal).map_err(failed),
            Target::Exec(id) => self.process(Some(id))?.signal(signal).map_err(failed),
        }
    }

    /// A lower memory limit can take long to be reached, and the container must be able to be
    /// killed meanwhile.
    fn update(&self, resources: Box<spec::Resources>, oom_score: Option<i32>, reply: Reply<()>) {
        if let State::Exited(_) = self.state() {
            return drop(reply.send(Err(self.not("has no limits any more"))));
        }
        let cgroup = self.cgroup.clone();
        tokio::spawn(async move {
            let done = off(move || {
                cgroup.update(&resources)?;
                oom_score.map_or(Ok(()), |score| cgroup.adjust_oom_score(score))
            });
            let done = done.await.and_then(|done| Ok(done?));
            let _ = reply.send(done);
        });
    }

    fn endpoint(&self, exec: Option<&str>, which: Which) -> Result<Endpoint, ContainerError> {
        self.process(exec)?.endpoint(which).ok_or_else(|| {
            let stream = format!("{which:?}").to_lowercase();
            ContainerError::State(format!("the process was made without {stream}"))
        })
    }

    fn resize(&self, exec: Option<&str>, size: Size) -> Result<(), ContainerError> {
        match self.process(exec)?.resize(size) {
            Some(Ok(())) => Ok(()),
            Some(Err(error)) => Err(ContainerError::Internal(format!(
                "cannot set the terminal's size: {error}"
            ))),
            None => Err(ContainerError::State("the process has no terminal".into())),
        }
    }

    async fn remove(&mut self) -> Result<(), ContainerError> {
        match (self.state(), &self.phase) {
            (State::Running, _) | (State::Created, Phase::Starting) => {
                return Err(self.not("must end before it is removed"));
            }
            _ => {}
        }
        self.execs.clear();
        discard(self.cgroup.clone(), self.id.clone()).await
    }
}

/// Ends what is in the group of container `id`, and removes it and what the container has written.
pub async fn discard(cgroup: Cgroup, id: String) -> Result<(), ContainerError> {
    cgroup.kill()?;
    process::emptied(&cgroup).await;
    off(move || remove(&cgroup, &id)).await?
}

/// Removes a container's group and what it has written; what is already gone is no error. Both are
/// tried, the first failure is told.
pub fn remove(cgroup: &Cgroup, id: &str) -> Result<(), ContainerError> {
    let removed = cgroup.remove().map_err(ContainerError::from);
    let emptied = layer::remove(id).map_err(|error| {
        ContainerError::Internal(format!(
            "cannot remove what container {id} has written: {error}"
        ))
    });
    removed.and(emptied)
}

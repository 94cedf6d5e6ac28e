//! A process of a container while it runs and after: its stdio and its exit.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_agent_api::RING_BYTES;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::container::cgroup::Cgroup;
use crate::container::launch::{Ends, Launched};
use crate::container::terminal::Size;
use crate::dial::Stream;
use crate::reap::ExitCode;
use crate::sandbox::now_nanoseconds;
use crate::stdio::{Closing, End, Input, Opening, Output, Progress};

/// How long output may lie without the host taking any, before the exit is told without it.
const DRAIN: Duration = Duration::from_secs(10);
/// How long killed processes may take to be gone.
const DYING: Duration = Duration::from_secs(5);

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// Exit status, or 128 + n after signal n.
    pub code: ExitCode,
    /// Nanoseconds since 1970.
    pub finished_at: i64,
    /// Whether the OOM killer took a process of the container.
    pub oom_killed: bool,
    /// Output nobody fetched in time.
    pub lost_bytes: u64,
}

/// Which of a process's streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// To the process.
    Stdin,
    /// From it.
    Stdout,
    /// From it.
    Stderr,
}

/// Where a stream to the host is handed in.
#[derive(Debug, Clone)]
pub enum Endpoint {
    /// Of an output.
    Output(Opening),
    /// Of stdin.
    Input(mpsc::Sender<Stream>),
}

/// What belongs to the end of a process.
#[derive(Debug)]
pub struct Ending {
    /// Tells its exit code.
    pub code: oneshot::Receiver<ExitCode>,
    /// Its container's group.
    pub cgroup: Cgroup,
    /// Whether the rest of the group ends with it, as with a container's init.
    pub last: bool,
    /// Whether a server is there to fetch output.
    pub attended: watch::Receiver<bool>,
}

/// A process. Dropping it ends its streams, not the process.
#[derive(Debug)]
pub struct Process {
    /// Its number in the guest.
    pub pid: i32,
    process: Arc<OwnedFd>,
    stdin: Option<Input>,
    stdout: Output,
    /// None of a process with a terminal.
    stderr: Option<Output>,
    terminal: Option<End>,
    exit: watch::Receiver<Option<Exit>>,
}

impl Process {
    /// Takes over a launched process's ends.
    pub fn adopt(launched: Launched, ending: Ending) -> io::Result<(Self, Held)> {
        let Launched {
            pid,
            process,
            held,
            ends,
        } = launched;
        let (stdin, stdout, stderr, terminal) = match ends {
            Ends::Pipes {
                stdin,
                stdout,
                stderr,
            } => {
                let stdin = stdin.map(End::new).transpose()?.map(Input::pipe);
                (stdin, End::new(stdout)?, Some(End::new(stderr)?), None)
            }
            Ends::Terminal(master) => {
                let master = End::new(master)?;
                let stdin = Input::terminal(master.clone());
                (Some(stdin), master.clone(), None, Some(master))
            }
        };
        let stdout = Output::start(stdout, RING_BYTES);
        let stderr = stderr.map(|stderr| Output::start(stderr, RING_BYTES));
        let (told, exit) = watch::channel(None);
        let outputs = (stdout.progress(), stderr.as_ref().map(Output::progress));
        let all = std::iter::once(&stdout).chain(&stderr);
        let closings = all.map(Output::closing).collect();
        tokio::spawn(async move {
            let exit = end(ending, outputs, closings).await;
            told.send_replace(Some(exit));
        });
        let process = Self {
            pid,
            process: Arc::new(process),
            stdin,
            stdout,
            stderr,
            terminal,
            exit,
        };
        Ok((process, held))
    }

    /// Its end, when it comes.
    pub fn exit(&self) -> watch::Receiver<Option<Exit>> {
        self.exit.clone()
    }

    /// A descriptor of the process.
    pub fn descriptor(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.process)
    }

    /// Sends a signal; one that is over is left alone.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        match crate::sys::signal_process(self.process.as_fd(), signal) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            done => done,
        }
    }

    /// Gives its terminal a size; `None` when it has none.
    pub fn resize(&self, size: Size) -> Option<io::Result<()>> {
        self.terminal.as_ref().map(|end| size.apply(end.as_fd()))
    }

    /// Where a stream to the host is handed in; `None` for one it does not have.
    pub fn endpoint(&self, which: Which) -> Option<Endpoint> {
        match which {
            Which::Stdin => self
                .stdin
                .as_ref()
                .map(|stdin| Endpoint::Input(stdin.opening())),
            Which::Stdout => Some(Endpoint::Output(self.stdout.opening())),
            Which::Stderr => self
                .stderr
                .as_ref()
                .map(|stderr| Endpoint::Output(stderr.opening())),
        }
    }
}

pub use crate::container::launch::Held;

/// What comes out of a process: standard output, and standard error where it is apart.
type Outputs = (watch::Receiver<Progress>, Option<watch::Receiver<Progress>>);

async fn end(mut ending: Ending, mut outputs: Outputs, closings: Vec<Closing>) -> Exit {
    // The reaper lives as long as the agent.
    let code = ending.code.await.unwrap_or(128);
    let finished_at = now_nanoseconds();
    if ending.last {
        if let Err(error) = ending.cgroup.kill() {
            crate::console::say(&error.to_string());
        }
        emptied(&ending.cgroup).await;
    }
    let oom_killed = ending.last && ending.cgroup.oom_kills() > 0;
    let mut lost_bytes = drained(&mut outputs, &mut ending.attended, ending.last).await;
    if ending.last && !ended(&outputs) {
        // Nobody of the container is left: another of the pod holds its output open, and could
        // keep the container from ending. What an exec has left behind may write on.
        for closing in closings {
            closing.close().await;
        }
        lost_bytes = drained(&mut outputs, &mut ending.attended, true).await;
    }
    Exit {
        code,
        finished_at,
        oom_killed,
        lost_bytes,
    }
}

/// Waits until the last process of a group is gone, within bounds.
pub async fn emptied(cgroup: &Cgroup) {
    let deadline = Instant::now() + DYING;
    while !cgroup.is_empty() && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn ended((first, second): &Outputs) -> bool {
    let mut all = std::iter::once(first).chain(second);
    all.all(|output| output.borrow().ended)
}

/// Waits until the host has all output, and says how much it does not have.
///
/// Time counts only while a server is there; each acknowledgement starts it anew, once nobody
/// can write any more. What is written is given up only if `hurried`: others wait for the end of a
/// container, and only its own client, who may read slowly, for that of an exec.
async fn drained(
    (first, second): &mut Outputs,
    attended: &mut watch::Receiver<bool>,
    hurried: bool,
) -> u64 {
    let mut deadline = Instant::now() + DRAIN;
    let mut taken = 0;
    loop {
        let mut now = vec![*first.borrow_and_update()];
        now.extend(second.as_mut().map(|second| *second.borrow_and_update()));
        if now.iter().all(Progress::is_complete) {
            return 0;
        }
        let acknowledged = now.iter().map(|progress| progress.acknowledged).sum();
        if acknowledged > taken && now.iter().all(|progress| progress.ended) {
            deadline = Instant::now() + DRAIN;
        }
        taken = acknowledged;
        let there = *attended.borrow_and_update();
        let lost = now
            .iter()
            .map(|progress| progress.read - progress.acknowledged)
            .sum();
        tokio::select! {
            changed = first.changed() => if changed.is_err() { return lost },
            changed = news(second) => if changed.is_err() { return lost },
            changed = attended.changed() => match changed {
                Ok(()) => deadline = Instant::now() + DRAIN,
                Err(_) => return lost,
            },
            () = tokio::time::sleep_until(deadline), if there && (hurried || lost == 0) => return lost,
        }
    }
}

async fn news(
    output: &mut Option<watch::Receiver<Progress>>,
) -> Result<(), watch::error::RecvError> {
    match output {
        Some(output) => output.changed().await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(ended: bool, read: u64, acknowledged: u64) -> Progress {
        Progress {
            ended,
            read,
            acknowledged,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn output_that_nobody_takes_is_counted_as_lost() {
        let (_out, first) = watch::channel(progress(true, 10, 4));
        let (_err, second) = watch::channel(progress(true, 0, 0));
        let (_there, mut attended) = watch::channel(true);
        let mut outputs = (first, Some(second));
        assert_eq!(drained(&mut outputs, &mut attended, true).await, 6);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_lost_while_no_server_is_there() {
        let (out, first) = watch::channel(progress(true, 10, 4));
        let (_err, second) = watch::channel(progress(true, 0, 0));
        let (there, mut attended) = watch::channel(false);
        let mut outputs = (first, Some(second));
        let drain = tokio::spawn(async move { drained(&mut outputs, &mut attended, true).await });
        tokio::time::sleep(DRAIN * 100).await;
        there.send_replace(true);
        out.send_replace(progress(true, 10, 10));
        assert_eq!(drain.await.unwrap(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pipe_held_open_delays_the_exit_for_a_bounded_time() {
        let (_out, first) = watch::channel(progress(false, 10, 10));
        let (_err, second) = watch::channel(progress(true, 0, 0));
        let (_there, mut attended) = watch::channel(true);
        let mut outputs = (first, Some(second));
        assert_eq!(drained(&mut outputs, &mut attended, true).await, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_client_of_an_exec_loses_nothing() {
        let (out, first) = watch::channel(progress(true, 10, 4));
        let (_there, mut attended) = watch::channel(true);
        let mut outputs = (first, None);
        let drain = tokio::spawn(async move { drained(&mut outputs, &mut attended, false).await });
        tokio::time::sleep(DRAIN * 100).await;
        out.send_replace(progress(true, 10, 10));
        assert_eq!(drain.await.unwrap(), 0);
    }
}

//! Starts a stage and talks to it, see [`crate::container::stage`].

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::fs::MemfdFlags;
use rustix::net::sockopt::Timeout;
use rustix::process::{Pid, PidfdFlags};
use tokio::io::unix::AsyncFd;

use crate::container::apart::Apart;
use crate::container::message::{self, Message};
use crate::container::plan::Plan;

/// How long a stage may take for a step: mounts and an exec, on a slow disk.
const PATIENCE: Duration = Duration::from_secs(30);

/// A message with its descriptors; nothing where the other end is closed.
type Heard = Option<(Message, Vec<OwnedFd>)>;

/// Why a process is not there.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The agent's own part failed.
    #[error("cannot {what}: {source}")]
    Step {
        /// The step, as the rest of a sentence.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The stage's own words.
    #[error("{0}")]
    Stage(String),
    /// The stage's own words: there may be no more processes.
    #[error("{0}")]
    Full(String),
    /// It ended without a word: killed, most likely for want of memory.
    #[error("the process ended before it was ready; its memory limit may be too low")]
    Ended,
}

fn step<T, E: Into<io::Error>>(what: &'static str, done: Result<T, E>) -> Result<T, LaunchError> {
    done.map_err(|source| LaunchError::Step {
        what,
        source: source.into(),
    })
}

/// A process that is ready but for its exec.
#[derive(Debug)]
pub struct Held {
    socket: AsyncFd<OwnedFd>,
}

/// A process on its way to be held.
#[derive(Debug)]
pub struct Begun {
    held: Held,
    /// Unless they come with the process.
    ends: Option<Ends>,
}

/// The agent's ends of a process.
#[derive(Debug)]
pub struct Launched {
    /// Its number in the guest.
    pub pid: i32,
    /// It, whatever becomes of the number.
    pub process: OwnedFd,
    /// What holds it.
    pub held: Held,
    /// Its stdio.
    pub ends: Ends,
}

/// The agent's ends of a process's stdio.
#[derive(Debug)]
pub enum Ends {
    /// A pipe each.
    Pipes {
        /// Present when asked for.
        stdin: Option<OwnedFd>,
        /// To read.
        stdout: OwnedFd,
        /// To read.
        stderr: OwnedFd,
    },
    /// The master of a terminal.
    Terminal(OwnedFd),
}

/// Begins to start a process as planned; [`Begun::ready`] goes on. Blocks, but for nothing that a
/// container can hold up.
pub fn begin(
    plan: &Plan,
    apart: Option<&Apart>,
    other: Option<BorrowedFd<'_>>,
    stdin: bool,
) -> Result<Begun, LaunchError> {
    let paper = step("write the plan", paper(plan))?;
    let pipes = match plan.program.terminal {
        None => Some(pipes(stdin)?),
        Some(_) => None,
    };
    let socket = step("start a stage", start(crate::STAGE))?;
    let theirs = pipes.iter().flat_map(|(_, theirs)| theirs);
    let mut with = vec![paper.as_fd()];
    with.extend(theirs.map(AsFd::as_fd));
    with.extend(apart.iter().flat_map(|apart| apart.descriptors()));
    with.extend(other);
    step(
        "send the plan",
        message::send(socket.as_fd(), &Message::Plan, &with),
    )?;
    // Only the process holds its own ends from here on.
    let ends = pipes.map(|(ours, _)| ours);
    let held = step("watch the stage", Held::new(socket))?;
    Ok(Begun { held, ends })
}

impl Begun {
    /// Waits until the process is ready but for its exec.
    pub async fn ready(self) -> Result<Launched, LaunchError> {
        let Self { held, ends } = self;
        let pid = number(held.hear("wait for the stage").await?)?;
        // Its parent being the agent, the number is free for others only after the reaper took it.
        let opened = Pid::from_raw(pid)
            .ok_or(rustix::io::Errno::SRCH)
            .and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()));
        let process = match opened {
            Ok(process) => process,
            Err(rustix::io::Errno::SRCH) => return Err(held.last_words().await),
            Err(error) => return step("open the process", Err(error)),
        };
        let master = |with: Vec<OwnedFd>| with.into_iter().next().map(Ends::Terminal);
        let ready = held.hear("wait for the process").await;
        let ready = ready.and_then(|said| match said {
            Some((Message::Ready, with)) => ends.or_else(|| master(with)).ok_or(LaunchError::Ended),
            Some((Message::Failed(words), _)) => Err(LaunchError::Stage(words)),
            _ => Err(LaunchError::Ended),
        });
        match ready {
            Ok(ends) => Ok(Launched {
                pid,
                process,
                held,
                ends,
            }),
            Err(error) => {
                let _ = crate::sys::signal_process(process.as_fd(), libc::SIGKILL);
                Err(error)
            }
        }
    }
}

/// The agent's and the process's ends of new pipes.
fn pipes(stdin: bool) -> Result<(Ends, [OwnedFd; 3]), LaunchError> {
    let (stdin, stdin_there) = match stdin {
        true => {
            let (read, write) = step("make a pipe", pipe())?;
            (Some(write), read)
        }
        false => (
            None,
            step("open /dev/null", File::open("/dev/null"))?.into(),
        ),
    };
    let (stdout, stdout_there) = step("make a pipe", pipe())?;
    let (stderr, stderr_there) = step("make a pipe", pipe())?;
    let ours = Ends::Pipes {
        stdin,
        stdout,
        stderr,
    };
    Ok((ours, [stdin_there, stdout_there, stderr_there]))
}

impl Held {
    fn new(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self {
            socket: crate::sys::watch(socket)?,
        })
    }

    /// Lets the process exec; waits until that is done or has failed.
    pub async fn start(self) -> Result<(), LaunchError> {
        match message::send(self.socket.get_ref().as_fd(), &Message::Go, &[]) {
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {
                return Err(LaunchError::Ended);
            }
            sent => step("start the process", sent)?,
        }
        match self.hear("wait for the program").await? {
            None => Ok(()),
            Some((Message::Failed(words), _)) => Err(LaunchError::Stage(words)),
            Some(_) => Err(LaunchError::Ended),
        }
    }

    /// The next message. Many may be waited for at once: a stage stands still as long as its
    /// container's group is frozen, and takes no thread for that.
    async fn hear(&self, what: &'static str) -> Result<Heard, LaunchError> {
        let heard = async {
            loop {
                let mut ready = self.socket.readable().await?;
                if let Ok(done) = ready.try_io(|socket| message::receive(socket.as_fd())) {
                    return done;
                }
            }
        };
        let heard = tokio::time::timeout(PATIENCE, heard).await;
        step(what, heard.unwrap_or_else(|late| Err(late.into())))
    }

    async fn last_words(&self) -> LaunchError {
        match self.hear("wait for the process").await {
            Ok(Some((Message::Failed(words), _))) => LaunchError::Stage(words),
            _ => LaunchError::Ended,
        }
    }
}

/// Calls the agent anew in a role; its standard input is the other end of the socket.
pub fn start(role: &str) -> io::Result<OwnedFd> {
    let (here, there) = message::pair()?;
    rustix::net::sockopt::set_socket_timeout(&here, Timeout::Recv, Some(PATIENCE))?;
    // The link to the program works whatever the root is. The reaper takes the exit.
    Command::new("/proc/self/exe")
        .arg(role)
        .env_clear()
        .stdin(Stdio::from(there))
        .spawn()?;
    Ok(here)
}

/// The number of the process that a stage has made. Blocks.
pub fn process(socket: BorrowedFd<'_>) -> Result<i32, LaunchError> {
    number(step("wait for the stage", message::receive(socket))?)
}

fn number(said: Heard) -> Result<i32, LaunchError> {
    match said {
        Some((Message::Process(pid), _)) => Ok(pid),
        Some((Message::Failed(words), _)) => Err(LaunchError::Stage(words)),
        Some((Message::Full(words), _)) => Err(LaunchError::Full(words)),
        _ => Err(LaunchError::Ended),
    }
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?)
}

/// The plan in memory of its own, read from its beginning.
fn paper(plan: &Plan) -> io::Result<OwnedFd> {
    let mut paper = File::from(rustix::fs::memfd_create("plan", MemfdFlags::CLOEXEC)?);
    paper.write_all(&serde_json::to_vec(plan)?)?;
    io::Seek::rewind(&mut paper)?;
    Ok(paper.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_start_ends_with_the_stages_word_its_end_or_its_time() {
        let held = || {
            let (here, there) = message::pair().unwrap();
            (Held::new(here).unwrap(), there)
        };
        let (started, there) = held();
        let begun = tokio::spawn(started.start());
        tokio::task::yield_now().await;
        let said = message::receive(there.as_fd()).unwrap().unwrap().0;
        assert_eq!(said, Message::Go);
        drop(there);
        assert!(begun.await.unwrap().is_ok());
        let (refused, there) = held();
        let words = Message::Failed("no such program".into());
        message::send(there.as_fd(), &words, &[]).unwrap();
        let error = refused.start().await.unwrap_err();
        assert_eq!(error.to_string(), "no such program");
        let (slow, _there) = held();
        let error = slow.start().await.unwrap_err().to_string();
        assert!(error.starts_with("cannot wait for the program"), "{error}");
    }
}

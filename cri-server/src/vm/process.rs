//! A VMM as a process: known by pid and start time, watched by pidfd.

use std::io::{Error, ErrorKind, Result};
use std::os::fd::OwnedFd;

use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

use super::sys::{Watched, watch};
use super::tail::{end_of_file, tail};
use super::{Ended, Files, exit_record};

/// A process that is not taken for a later one with the same pid.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its pid.
    pub pid: u32,
    /// When it started, in clock ticks since boot (proc_pid_stat(5), field 22).
    pub start_time: u64,
}

impl Process {
    /// The process that has `pid` now.
    pub fn of(pid: u32) -> Result<Self> {
        Ok(Self {
            pid,
            start_time: start_time(pid)?,
        })
    }

    /// A pidfd of this process; `None` if it has ended.
    pub fn open(&self) -> Result<Option<OwnedFd>> {
        let Some(pid) = pid(self.pid) else {
            return Ok(None);
        };
        let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK) {
            Ok(pidfd) => pidfd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // Looked at with the pidfd in hand: the pid cannot be given away unseen.
        match start_time(self.pid) {
            Ok(start) if start == self.start_time => Ok(Some(pidfd)),
            Ok(_) => Ok(None),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Kills it if it still runs.
    pub fn kill(&self) {
        match self.open() {
            Ok(Some(pidfd)) => {
                // It may have ended by itself just now.
                let _ = rustix::process::pidfd_send_signal(&pidfd, Signal::KILL);
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(pid = self.pid, %error, "cannot kill a VMM"),
        }
    }
}

/// Waits for one VMM's end.
pub struct Watch {
    pidfd: AsyncFd<Watched<OwnedFd>>,
    child: Option<bulkhead_vmm_api::Vmm>,
    files: Files,
}

impl Watch {
    /// Watches the process of `pidfd`, which is `child` if this server has started it.
    pub fn new(pidfd: OwnedFd, child: Option<bulkhead_vmm_api::Vmm>, files: Files) -> Result<Self> {
        Ok(Self {
            pidfd: watch(pidfd)?,
            child,
            files,
        })
    }

    /// Waits, takes the process off the table and reads what it left.
    pub async fn end(mut self) -> Ended {
        if let Err(error) = self.pidfd.readable().await {
            tracing::error!(%error, "a VMM cannot be watched");
        }
        let read = tokio::task::spawn_blocking(move || {
            let status = self.child.as_mut().and_then(|child| child.wait().ok());
            exit_record(&self.files.exit_record).ok_or_else(|| {
                let ended = status.map_or_else(String::new, |status| format!(" ({status})"));
                let said = tail(&end_of_file(&self.files.messages));
                format!("the VMM left no exit record{ended}. The end of its messages:\n{said}")
            })
        });
        match read.await {
            Ok(Ok(record)) => Ended {
                reason: record.reason.to_string(),
                console_tail: record.console_tail,
            },
            Ok(Err(reason)) => Ended {
                reason,
                console_tail: String::new(),
            },
            Err(error) => Ended {
                reason: format!("the VMM's exit record was not read: {error}"),
                console_tail: String::new(),
            },
        }
    }
}

fn pid(pid: u32) -> Option<Pid> {
    i32::try_from(pid).ok().and_then(Pid::from_raw)
}

fn start_time(pid: u32) -> Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The command's name is in parentheses and may contain anything.
    let after = stat.rsplit_once(')').map_or("", |(_, after)| after);
    let field = after.split_whitespace().nth(19);
    field
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| Error::new(ErrorKind::InvalidData, format!("/proc/{pid}/stat is odd")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_found_again_and_a_later_one_is_not_taken_for_it() {
        let me = Process::of(std::process::id()).unwrap();
        assert!(me.open().unwrap().is_some());
        let earlier = Process {
            start_time: me.start_time + 1,
            ..me
        };
        assert!(earlier.open().unwrap().is_none());
        let never = Process {
            pid: u32::MAX,
            start_time: 0,
        };
        assert!(never.open().unwrap().is_none());
    }
}

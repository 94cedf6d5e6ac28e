//! Takes the exit of every child: the agent's own and the orphans that fall to PID 1.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::process::{WaitOptions, WaitStatus};
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};

/// How many exits of processes nobody has asked for yet are kept: one may end before the agent
/// has read its number.
const UNCLAIMED: usize = 256;

/// How a process ended: its exit status, or 128 + n after signal n.
pub type ExitCode = i32;

/// A point in the order of exits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(u64);

/// Asks for exits.
#[derive(Debug, Clone)]
pub struct Reaper {
    requests: mpsc::UnboundedSender<Request>,
    exits: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Request {
    pid: i32,
    since: Moment,
    sender: oneshot::Sender<ExitCode>,
}

impl Reaper {
    /// Starts to reap. `children` is readable when a child has ended.
    pub fn start(children: OwnedFd) -> io::Result<Self> {
        let children = crate::sys::watch(children)?;
        let (requests, incoming) = mpsc::unbounded_channel();
        let exits = Arc::new(AtomicU64::new(0));
        tokio::spawn(reap(children, incoming, Arc::clone(&exits)));
        Ok(Self { requests, exits })
    }

    /// To be taken before a process is started, see [`Reaper::exit`].
    pub fn now(&self) -> Moment {
        Moment(self.exits.load(Ordering::Relaxed))
    }

    /// The end of a child started after `since`, which may be past. What ended before had the
    /// same number by chance.
    pub fn exit(&self, pid: i32, since: Moment) -> oneshot::Receiver<ExitCode> {
        let (sender, receiver) = oneshot::channel();
        // The reaper lives as long as the agent; if not, the receiver says so.
        let _ = self.requests.send(Request { pid, since, sender });
        receiver
    }
}

async fn reap(
    children: AsyncFd<OwnedFd>,
    mut incoming: mpsc::UnboundedReceiver<Request>,
    exits: Arc<AtomicU64>,
) {
    let mut ledger = Ledger::default();
    loop {
        tokio::select! {
            request = incoming.recv() => match request {
                Some(request) => ledger.ask(request),
                None => return,
            },
            ready = children.readable() => {
                if let Ok(mut ready) = ready {
                    drain(&children);
                    ready.clear_ready();
                }
                while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
                    if let Some(code) = code(status) {
                        let moment = Moment(exits.fetch_add(1, Ordering::Relaxed));
                        ledger.ended(pid.as_raw_nonzero().get(), code, moment);
                    }
                }
            }
        }
    }
}

/// Empties the signalfd; what it says is less exact than what wait(2) says.
fn drain(children: &AsyncFd<OwnedFd>) {
    let mut buffer = [0; 1024];
    while matches!(rustix::io::read(children.get_ref(), &mut buffer), Ok(n) if n > 0) {}
}

fn code(status: WaitStatus) -> Option<ExitCode> {
    status
        .exit_status()
        .or_else(|| status.terminating_signal().map(|signal| 128 + signal))
}

/// Matches exits with those who ask, in either order.
#[derive(Debug, Default)]
struct Ledger {
    asked: HashMap<i32, oneshot::Sender<ExitCode>>,
    unclaimed: VecDeque<Unclaimed>,
}

#[derive(Debug, PartialEq, Eq)]
struct Unclaimed {
    pid: i32,
    code: ExitCode,
    moment: Moment,
}

impl Ledger {
    fn ask(&mut self, request: Request) {
        let Request { pid, since, sender } = request;
        let ended = self
            .unclaimed
            .iter()
            .position(|exit| exit.pid == pid && exit.moment >= since);
        match ended.and_then(|at| self.unclaimed.remove(at)) {
            Some(exit) => drop(sender.send(exit.code)),
            None => drop(self.asked.insert(pid, sender)),
        }
    }

    fn ended(&mut self, pid: i32, code: ExitCode, moment: Moment) {
        if let Some(sender) = self.asked.remove(&pid) {
            let _ = sender.send(code);
            return;
        }
        if self.unclaimed.len() == UNCLAIMED {
            self.unclaimed.pop_front();
        }
        self.unclaimed.push_back(Unclaimed { pid, code, moment });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(ledger: &mut Ledger, pid: i32, since: u64) -> oneshot::Receiver<ExitCode> {
        let (sender, receiver) = oneshot::channel();
        let since = Moment(since);
        ledger.ask(Request { pid, since, sender });
        receiver
    }

    #[test]
    fn an_exit_is_told_whoever_comes_first() {
        let mut ledger = Ledger::default();
        let mut early = ask(&mut ledger, 7, 0);
        ledger.ended(7, 3, Moment(0));
        assert_eq!(early.try_recv(), Ok(3));
        ledger.ended(8, 137, Moment(1));
        assert_eq!(ask(&mut ledger, 8, 1).try_recv(), Ok(137));
    }

    #[test]
    fn an_older_process_of_the_same_number_is_another() {
        let mut ledger = Ledger::default();
        ledger.ended(7, 3, Moment(4));
        let mut later = ask(&mut ledger, 7, 5);
        assert!(later.try_recv().is_err());
        ledger.ended(7, 0, Moment(9));
        assert_eq!(later.try_recv(), Ok(0));
    }

    #[test]
    fn orphans_take_no_memory_for_ever() {
        let mut ledger = Ledger::default();
        for pid in 0..10_000 {
            ledger.ended(pid, 0, Moment(0));
        }
        assert_eq!(ledger.unclaimed.len(), UNCLAIMED);
    }
}

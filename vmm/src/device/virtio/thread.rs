//! The thread of a device, and what it waits for.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::thread::JoinHandle;
use std::time::Instant;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Device, Running, StartError};

/// Events taken from the kernel at once.
const EVENTS: usize = 64;
/// Stack of a thread, in bytes: nothing recurses, and buffers are on the heap.
const STACK_BYTES: usize = 256 << 10;
/// The token of the event that ends the thread.
const STOP: u64 = u64::MAX;

/// A device with its thread.
pub struct Thread<D> {
    stop: EventFd,
    thread: JoinHandle<Box<D>>,
}

impl<D: Device + 'static> Thread<D> {
    /// Starts a thread that does `work` until the [`Poll`] of `stop` says that it is to end.
    pub fn start(
        device: &'static str,
        stop: EventFd,
        work: impl FnOnce() -> Box<D> + Send + 'static,
    ) -> Result<Box<dyn Running>, StartError> {
        let thread = std::thread::Builder::new()
            .name(device.to_owned())
            .stack_size(STACK_BYTES)
            .spawn(work)
            .map_err(|error| StartError {
                device,
                why: format!("its thread could not be made: {error}"),
            })?;
        Ok(Box::new(Self { stop, thread }))
    }
}

impl<D: Device + 'static> Running for Thread<D> {
    fn stop(self: Box<Self>) -> Box<dyn Device> {
        // One write cannot overflow the counter of an event that is written once.
        let _ = self.stop.write(1);
        match self.thread.join() {
            Ok(device) => device,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

/// What a thread waits for. Everything is edge triggered: it is reported once for each change, so
/// that no counter need be read and nothing spins that cannot be served at the moment.
pub struct Poll {
    epoll: Epoll,
    stop: EventFd,
    events: Box<[EpollEvent]>,
}

/// Why a thread woke up.
#[derive(Debug, Clone, Copy)]
pub struct Wake {
    /// What the descriptor was watched with.
    pub token: u64,
    /// What has happened.
    pub events: EventSet,
    /// The thread is to end.
    pub stop: bool,
}

impl Poll {
    /// Waits for the end of the thread only.
    pub fn new() -> io::Result<Self> {
        let poll = Self {
            epoll: Epoll::new()?,
            stop: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            events: vec![EpollEvent::default(); EVENTS].into_boxed_slice(),
        };
        poll.watch(poll.stop.as_raw_fd(), EventSet::IN, STOP)?;
        Ok(poll)
    }

    /// The event that ends the thread when it is written.
    pub fn stopper(&self) -> io::Result<EventFd> {
        self.stop.try_clone()
    }

    /// Waits for `events` of a descriptor, too, until it is closed.
    pub fn watch(&self, fd: RawFd, events: EventSet, token: u64) -> io::Result<()> {
        let event = EpollEvent::new(events | EventSet::EDGE_TRIGGERED, token);
        self.epoll.ctl(ControlOperation::Add, fd, event)
    }

    /// Waits until something happens or `deadline` has passed; not at all if `busy`.
    pub fn wait(
        &mut self,
        busy: bool,
        deadline: Option<Instant>,
    ) -> io::Result<impl Iterator<Item = Wake> + use<'_>> {
        let milliseconds = match deadline {
            _ if busy => 0,
            None => -1,
            // Rounded up, so that the deadline has passed afterwards.
            Some(deadline) => deadline
                .saturating_duration_since(Instant::now())
                .as_millis()
                .saturating_add(1)
                .try_into()
                .unwrap_or(i32::MAX),
        };
        let count = match self.epoll.wait(milliseconds, &mut self.events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        Ok(self.events.iter().take(count).map(|event| Wake {
            token: event.data(),
            events: event.event_set(),
            stop: event.data() == STOP,
        }))
    }

    /// Waits for the end of the thread and ignores everything else.
    pub fn wait_for_stop(mut self) {
        // If waiting fails, there is nothing that the device could still do.
        while let Ok(mut wakes) = self.wait(false, None) {
            if wakes.any(|wake| wake.stop) {
                return;
            }
        }
    }
}

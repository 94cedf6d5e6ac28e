//! A thread that serves one queue: what the simple devices have in common.

use std::io::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::{ActiveQueue, Interrupt, Memory};
use crate::sys;

/// Stack of a worker, in bytes: it recurses nowhere and keeps buffers on the heap.
const STACK_BYTES: usize = 128 << 10;

/// A request as the driver made it available.
pub type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap>;

/// The queue, or a request in it, breaks a rule of virtio.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the driver broke a rule of virtio: {0}")]
pub struct Malformed(pub &'static str);

/// What serves the requests of one queue.
pub trait Serve: Send + 'static {
    /// Serves one request and tells how many bytes were written to it.
    fn serve(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: Chain<'_>,
    ) -> std::result::Result<u32, Malformed>;
}

/// A running thread that gives its server back.
pub struct Worker<S> {
    thread: JoinHandle<S>,
    stop: Arc<AtomicBool>,
    kick: EventFd,
}

impl<S: Serve> Worker<S> {
    /// Starts a thread called `name` for `queue`.
    pub fn start(
        name: &str,
        memory: Memory,
        queue: ActiveQueue,
        interrupt: Interrupt,
        server: S,
    ) -> Result<Self> {
        let kick = queue.kick.try_clone()?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut round = Round {
            memory,
            queue: queue.queue,
            interrupt,
            server,
            stop: stop.clone(),
        };
        let body = move || {
            round.run(&queue.kick);
            round.server
        };
        let builder = std::thread::Builder::new()
            .name(name.to_owned())
            .stack_size(STACK_BYTES);
        Ok(Self {
            thread: builder.spawn(body)?,
            stop,
            kick,
        })
    }

    /// Ends the thread after the request that it is at; `None` if it died.
    pub fn stop(self) -> Option<S> {
        self.stop.store(true, Ordering::SeqCst);
        // Cannot fail: a guest's kicks do not fill the counter.
        let _ = self.kick.write(1);
        self.thread.join().ok()
    }
}

struct Round<S> {
    memory: Memory,
    queue: Queue,
    interrupt: Interrupt,
    server: S,
    stop: Arc<AtomicBool>,
}

impl<S: Serve> Round<S> {
    fn run(&mut self, kick: &EventFd) {
        let mut healthy = self.queue.ready();
        // Poll can only fail if the kernel is out of memory; the thread then waits to be joined.
        while wait(kick).is_ok() && !self.stopping() {
            if healthy && self.drain().is_err() {
                healthy = false;
                self.interrupt.needs_reset();
            }
        }
    }

    fn stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Serves what there is, until nothing is left or the thread shall stop.
    fn drain(&mut self) -> std::result::Result<(), Malformed> {
        let broken = |_| Malformed("a ring cannot be used");
        let memory = self.memory.as_ref();
        loop {
            self.queue.disable_notification(memory).map_err(broken)?;
            while let Some(chain) = self.queue.iter(memory).map_err(broken)?.next() {
                let head = chain.head_index();
                let written = self.server.serve(memory, chain)?;
                self.queue.add_used(memory, head, written).map_err(broken)?;
                if self.queue.needs_notification(memory).map_err(broken)? {
                    self.interrupt.queue();
                }
                if self.stopping() {
                    return Ok(());
                }
            }
            if !self.queue.enable_notification(memory).map_err(broken)? {
                return Ok(());
            }
        }
    }
}

/// Waits until the event is written, and takes that back.
fn wait(event: &EventFd) -> Result<()> {
    let mut polled = [PollFd::from_borrowed_fd(
        sys::descriptor(event),
        PollFlags::IN,
    )];
    loop {
        match rustix::event::poll(&mut polled, None) {
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Error::from(error)),
            Ok(_) => break,
        }
    }
    let _ = event.read();
    Ok(())
}

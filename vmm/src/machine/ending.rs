//! That the guest has come to its end, and how.

use std::sync::{Arc, Mutex, PoisonError};

use bulkhead_vmm_api::ExitReason;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// What the kernel says last (kernel: kernel/panic.c).
const PANIC: &str = "Kernel panic - not syncing";

/// Told by the vCPUs, waited for by the control loop. Clones share it; the first end counts.
#[derive(Clone)]
pub struct Ending {
    how: Arc<Mutex<Option<How>>>,
    event: Arc<EventFd>,
}

enum How {
    Reset,
    TripleFault,
    Failed(String),
}

impl Ending {
    /// Fails if the process has no descriptor left.
    pub fn new() -> std::io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self {
            how: Arc::default(),
            event: Arc::new(event),
        })
    }

    /// Readable once the guest has ended.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// The guest reset its machine.
    pub fn reset(&self) {
        self.tell(How::Reset);
    }

    /// A vCPU could not deliver a double fault.
    pub fn triple_fault(&self) {
        self.tell(How::TripleFault);
    }

    /// KVM or a device gave up.
    pub fn fail(&self, why: String) {
        self.tell(How::Failed(why));
    }

    fn tell(&self, how: How) {
        self.how
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert(how);
        // The counter does not fill by one write for each vCPU's end.
        let _ = self.event.write(1);
    }

    /// Why the VM ended, if it has; `console_tail` tells a panic from another reset.
    pub fn reason(&self, console_tail: impl FnOnce() -> String) -> Option<ExitReason> {
        match self
            .how
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()?
        {
            How::Failed(why) => Some(ExitReason::Failed(why.clone())),
            How::TripleFault => Some(ExitReason::TripleFault),
            How::Reset if console_tail().contains(PANIC) => Some(ExitReason::GuestPanic),
            How::Reset => Some(ExitReason::GuestReset),
        }
    }
}

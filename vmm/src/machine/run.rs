//! The control loop: what the main thread does while the guest runs.

use bulkhead_vmm_api::control::{Action, Reply};
use bulkhead_vmm_api::{ExitReason, WINDOWS};
use rustix::event::{PollFd, PollFlags};

use super::{Machine, assemble};
use crate::control::{Control, Perform};
use crate::device::bus::Bus;
use crate::files::Files;
use crate::sys;

impl Machine {
    /// Serves the control socket until the guest ends or the server ends it.
    pub fn run(mut self) -> ExitReason {
        let reason = match self.control.take() {
            Some(control) => self.serve(control),
            None => ExitReason::Failed("the control socket is missing".into()),
        };
        self.vcpus.stop();
        // What the devices were asked for is done, and disks are flushed.
        self.bus.windows().iter().for_each(|window| window.stop());
        reason
    }

    fn serve(&mut self, mut control: Control) -> ExitReason {
        let mut session = Session {
            machine: self,
            shutdown: false,
        };
        loop {
            let machine = &session.machine;
            if let Some(reason) = machine.ending.reason(|| machine.console.tail()) {
                return reason;
            }
            if session.shutdown {
                return ExitReason::Shutdown;
            }
            let connection = control.connection();
            let ending = sys::descriptor(machine.ending.event());
            let mut polled = vec![
                PollFd::from_borrowed_fd(ending, PollFlags::IN),
                PollFd::from_borrowed_fd(control.listener(), PollFlags::IN),
            ];
            polled.extend(
                connection
                    .as_ref()
                    .map(|socket| PollFd::new(socket, PollFlags::IN)),
            );
            match rustix::event::poll(&mut polled, None) {
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return ExitReason::Failed(format!("poll failed: {error}")),
                Ok(_) => {}
            }
            let ready: Vec<bool> = polled.iter().map(|fd| !fd.revents().is_empty()).collect();
            drop(polled);
            if ready.get(2) == Some(&true) {
                control.serve(&mut session);
            }
            if ready.get(1) == Some(&true) {
                control.accept();
            }
        }
    }
}

/// The machine while it is served.
struct Session<'m> {
    machine: &'m mut Machine,
    shutdown: bool,
}

impl Perform for Session<'_> {
    fn perform(&mut self, action: Action, mut files: Files) -> Result<Reply, String> {
        let machine = &mut *self.machine;
        match action {
            Action::Pause => machine.vcpus.pause(),
            Action::Resume => machine.vcpus.resume(),
            Action::Shutdown => {
                // Before the answer: the server may go on as soon as it has it.
                machine.vcpus.pause();
                machine
                    .bus
                    .windows()
                    .iter()
                    .for_each(|window| window.stop());
                self.shutdown = true;
            }
            Action::Attach { device } => {
                device.validate("").map_err(|error| error.to_string())?;
                let window = free_window(&machine.bus)?;
                let device = assemble::device(&device, &mut files).map_err(|e| e.to_string())?;
                let place = machine.bus.windows().get(usize::from(window));
                let place = place.ok_or_else(|| "The window does not exist.".to_owned())?;
                place
                    .attach(device)
                    .map_err(|error| format!("Window {window}: {error}."))?;
                return Ok(Reply::Attached { window });
            }
            Action::Detach { window } => {
                let place = machine.bus.windows().get(usize::from(window));
                let place = place.ok_or_else(|| {
                    format!(
                        "Window {window} does not exist; there are 0 to {}.",
                        WINDOWS - 1
                    )
                })?;
                place
                    .detach()
                    .map_err(|error| format!("Window {window}: {error}."))?;
            }
            Action::Stats => {
                let console_tail = machine.console.tail();
                let windows = (0..WINDOWS).zip(machine.bus.windows());
                let interfaces = windows
                    .filter_map(|(number, window)| Some(window.counters()?.read(number)))
                    .collect();
                return Ok(Reply::Stats {
                    paused: machine.vcpus.paused(),
                    console_tail,
                    interfaces,
                });
            }
        }
        Ok(Reply::Done)
    }
}

fn free_window(bus: &Bus) -> Result<u8, String> {
    let mut windows = (0..WINDOWS).zip(bus.windows());
    let free = windows.find(|(_, window)| window.is_empty());
    free.map(|(number, _)| number)
        .ok_or_else(|| format!("All {WINDOWS} windows of the VM hold a device; detach one first."))
}

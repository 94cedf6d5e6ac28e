//! vCPUs: a thread each.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use kvm_ioctls::{VcpuExit, VcpuFd};

use super::ending::Ending;
use crate::device::bus::{Bus, Effect};
use crate::sys::{self, Kickable};

/// Stack of a vCPU's thread, in bytes: devices are started on it.
const STACK_BYTES: usize = 256 << 10;

/// All vCPUs of a machine.
pub struct Vcpus {
    gate: Arc<Gate>,
    threads: Vec<JoinHandle<()>>,
}

/// What the vCPUs shall do, and how many do not run.
struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Clone, Copy)]
struct State {
    order: Order,
    stopped: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Run,
    Pause,
    End,
}

impl Vcpus {
    /// Starts a thread for each vCPU. Fails if the system has no thread left; those that were
    /// started end.
    pub fn start(fds: Vec<VcpuFd>, bus: &Arc<Bus>, ending: &Ending) -> std::io::Result<Self> {
        sys::install_kick()?;
        let state = Mutex::new(State {
            order: Order::Run,
            stopped: 0,
        });
        let gate = Arc::new(Gate {
            state,
            changed: Condvar::new(),
        });
        let mut vcpus = Self {
            gate,
            threads: Vec::with_capacity(fds.len()),
        };
        for (index, fd) in fds.into_iter().enumerate() {
            let vcpu = Vcpu {
                fd,
                bus: bus.clone(),
                gate: vcpus.gate.clone(),
                ending: ending.clone(),
            };
            let builder = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .stack_size(STACK_BYTES);
            match builder.spawn(|| vcpu.run()) {
                Ok(thread) => vcpus.threads.push(thread),
                Err(error) => {
                    vcpus.stop();
                    return Err(error);
                }
            }
        }
        Ok(vcpus)
    }

    /// Whether the vCPUs are paused.
    pub fn paused(&self) -> bool {
        self.gate.lock().order == Order::Pause
    }

    /// Takes all vCPUs out of the guest and waits until they are.
    pub fn pause(&self) {
        self.order(Order::Pause);
    }

    /// Lets the vCPUs run on.
    pub fn resume(&self) {
        self.gate.lock().order = Order::Run;
        self.gate.changed.notify_all();
    }

    /// Ends all vCPUs for good.
    pub fn stop(&mut self) {
        self.order(Order::End);
        for thread in self.threads.drain(..) {
            // A thread that panicked has ended the process.
            let _ = thread.join();
        }
    }

    /// Gives an order to stop and waits until it is followed.
    fn order(&self, order: Order) {
        self.gate.lock().order = order;
        self.gate.changed.notify_all();
        self.threads.iter().for_each(sys::kick);
        let mut state = self.gate.lock();
        while state.stopped < self.threads.len() {
            state = self
                .gate
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Gate {
    /// Waits here while the vCPU shall not run; `false` if it never shall again.
    fn pass(&self) -> bool {
        let mut state = self.lock();
        if state.order == Order::Run {
            return true;
        }
        state.stopped += 1;
        self.changed.notify_all();
        while state.order == Order::Pause {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if state.order == Order::End {
            return false; // and stays counted among the stopped
        }
        state.stopped -= 1;
        true
    }

    /// Counts a vCPU that will not run again among the stopped.
    fn retire(&self) {
        self.lock().stopped += 1;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One vCPU.
struct Vcpu {
    fd: VcpuFd,
    bus: Arc<Bus>,
    gate: Arc<Gate>,
    ending: Ending,
}

impl Vcpu {
    fn run(mut self) {
        let _kickable = Kickable::new(&mut self.fd);
        // A kick may have come before that.
        while self.gate.pass() {
            match self.enter() {
                Exit::Kicked => continue,
                Exit::Reset => self.ending.reset(),
                Exit::TripleFault => self.ending.triple_fault(),
                Exit::Failed(why) => self.ending.fail(why),
            }
            return self.gate.retire();
        }
    }

    /// Runs the guest until it has to be left.
    fn enter(&mut self) -> Exit {
        loop {
            match self.fd.run() {
                Ok(VcpuExit::IoOut(port, data)) => match self.bus.port_write(port, data) {
                    Effect::None => {}
                    Effect::Reset => return Exit::Reset,
                },
                Ok(VcpuExit::IoIn(port, data)) => self.bus.port_read(port, data),
                Ok(VcpuExit::MmioWrite(address, data)) => self.bus.memory_write(address, data),
                Ok(VcpuExit::MmioRead(address, data)) => self.bus.memory_read(address, data),
                Ok(VcpuExit::Shutdown) => return Exit::TripleFault,
                Ok(VcpuExit::Intr) => return Exit::Kicked,
                Ok(other) => {
                    return Exit::Failed(format!("a vCPU left the guest by {other:?}"));
                }
                Err(error) if error.errno() == libc::EINTR => {
                    self.fd.set_kvm_immediate_exit(0);
                    return Exit::Kicked;
                }
                Err(error) if error.errno() == libc::EAGAIN => {}
                Err(error) => return Exit::Failed(format!("a vCPU cannot run: {error}")),
            }
        }
    }
}

/// Why the guest was left.
enum Exit {
    Kicked,
    Reset,
    TripleFault,
    Failed(String),
}

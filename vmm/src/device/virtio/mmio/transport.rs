//! The registers and the device's life behind them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::super::net::Counters;
use super::super::{Active, ActiveQueue, Device, Interrupt, Memory, NEEDS_RESET, Running};
use super::registers::*;
use super::wires::Wires;
use crate::journal;

/// Why a device could not be put into a window.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// There is one already.
    #[error("the window holds a device already")]
    Occupied,
    /// KVM refused the interrupt.
    #[error("the window's interrupt could not be connected: {0}")]
    Interrupt(std::io::Error),
}

/// Why a device could not be taken from a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DetachError {
    /// There is none.
    #[error("the window is empty")]
    Empty,
    /// The guest uses it.
    #[error("the guest's driver still uses the device; unbind it in the guest first")]
    InUse,
}

/// The state of one window.
pub struct Transport {
    address: u64,
    pin: u32,
    memory: Memory,
    wires: Arc<dyn Wires>,
    interrupt_status: Arc<AtomicU32>,
    occupant: Option<Occupant>,
    /// Device status (virtio 1.2 §2.1), as far as the driver wrote it.
    status: u8,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    generation: u32,
}

/// The device in a window, and what the driver set up for it.
struct Occupant {
    life: Life,
    kind: u32,
    features: u64,
    config: Vec<u8>,
    queues: Vec<Setup>,
    line: Arc<EventFd>,
    counters: Option<Arc<Counters>>,
}

enum Life {
    Idle(Box<dyn Device>),
    /// With the kick of each queue.
    Running(Box<dyn Running>, Vec<EventFd>),
    /// It could not start and is gone.
    Lost,
}

/// A queue as the driver describes it (virtio 1.2 §4.2.3.2).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Setup {
    max_size: u16,
    size: u32,
    ready: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

impl Transport {
    pub fn new(
        address: u64,
        pin: u32,
        memory: Memory,
        wires: Arc<dyn Wires>,
        interrupt_status: Arc<AtomicU32>,
    ) -> Self {
        Self {
            address,
            pin,
            memory,
            wires,
            interrupt_status,
            occupant: None,
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            generation: 0,
        }
    }

    pub fn counters(&self) -> Option<Arc<Counters>> {
        self.occupant.as_ref()?.counters.clone()
    }

    pub fn is_empty(&self) -> bool {
        self.occupant.is_none()
    }

    pub fn attach(&mut self, device: Box<dyn Device>) -> Result<(), AttachError> {
        if self.occupant.is_some() {
            return Err(AttachError::Occupied);
        }
        let line = self.wires.interrupt_line(self.pin);
        let line = line.map_err(AttachError::Interrupt)?;
        let sizes = device.queue_sizes();
        self.occupant = Some(Occupant {
            kind: device.kind(),
            features: device.features() | F_VERSION_1,
            config: device.config().to_vec(),
            counters: device.counters(),
            queues: sizes.iter().map(|size| Setup::new(*size)).collect(),
            life: Life::Idle(device),
            line,
        });
        self.reset();
        self.generation = self.generation.wrapping_add(1);
        Ok(())
    }

    pub fn detach(&mut self) -> Result<Box<dyn Device>, DetachError> {
        let occupant = self.occupant.take().ok_or(DetachError::Empty)?;
        match occupant.life {
            // Linux notices the device once more when its driver has let it go.
            Life::Idle(device) if self.status & DRIVER == 0 => {
                self.status = 0;
                self.generation = self.generation.wrapping_add(1);
                Ok(device)
            }
            life => {
                self.occupant = Some(Occupant { life, ..occupant });
                Err(DetachError::InUse)
            }
        }
    }

    /// Stops the device, if it runs, and forgets what the driver set (virtio 1.2 §2.4).
    pub fn reset(&mut self) {
        self.status = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        if let Some(occupant) = &mut self.occupant {
            occupant
                .queues
                .iter_mut()
                .for_each(|queue| *queue = Setup::new(queue.max_size));
            occupant.life = match std::mem::replace(&mut occupant.life, Life::Lost) {
                Life::Running(running, kicks) => {
                    disconnect(&*self.wires, self.address, &kicks);
                    Life::Idle(running.stop())
                }
                life => life,
            };
        }
        self.interrupt_status.store(0, Ordering::SeqCst);
    }

    pub fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(at) = offset.checked_sub(CONFIG) {
            let config = self.occupant.iter().flat_map(|occupant| &occupant.config);
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            data.iter_mut()
                .zip(config.skip(at))
                .for_each(|(to, from)| *to = *from);
        } else if let Ok(register) = <&mut [u8; 4]>::try_from(data) {
            *register = self.register(offset).to_le_bytes();
        }
    }

    fn register(&self, offset: u64) -> u32 {
        match offset {
            MAGIC_VALUE => return MAGIC,
            VERSION => return MODERN,
            VENDOR_ID => return VENDOR,
            _ => {}
        }
        // The rest of an empty window reads zero, its device id among it.
        let Some(occupant) = &self.occupant else {
            return 0;
        };
        match offset {
            DEVICE_ID => occupant.kind,
            DEVICE_FEATURES => half(occupant.features, self.device_features_select),
            QUEUE_SIZE_MAX => self.queue().map_or(0, |queue| queue.max_size.into()),
            QUEUE_READY => self.queue().map_or(0, |queue| queue.ready.into()),
            STATUS => self.shown_status().into(),
            SHARED_MEMORY_LENGTH..CONFIG_GENERATION => u32::MAX, // no shared memory
            CONFIG_GENERATION => self.generation,
            _ => 0,
        }
    }

    pub fn write(&mut self, offset: u64, value: u32) {
        match offset {
            DEVICE_FEATURES_SELECT => self.device_features_select = value,
            DRIVER_FEATURES_SELECT => self.driver_features_select = value,
            DRIVER_FEATURES if self.status & FEATURES_OK == 0 => {
                set_half(
                    &mut self.driver_features,
                    self.driver_features_select,
                    value,
                );
            }
            QUEUE_SELECT => self.queue_select = value,
            // KVM takes the notifications of a running device; any other is without meaning.
            QUEUE_NOTIFY => {}
            STATUS => self.set_status(value as u8),
            _ => self.set_queue(offset, value),
        }
    }

    fn queue(&self) -> Option<&Setup> {
        self.occupant
            .as_ref()?
            .queues
            .get(usize::try_from(self.queue_select).ok()?)
    }

    /// Nothing that describes a queue can be changed once the device runs, nor while the queue is
    /// marked ready (virtio 1.2 §4.2.2.2).
    fn set_queue(&mut self, offset: u64, value: u32) {
        if self.status & DRIVER_OK != 0 || self.status & FEATURES_OK == 0 {
            return;
        }
        let select = usize::try_from(self.queue_select).unwrap_or(usize::MAX);
        let queue = self
            .occupant
            .as_mut()
            .and_then(|occupant| occupant.queues.get_mut(select));
        let Some(queue) = queue else {
            return;
        };
        if offset == QUEUE_READY {
            queue.ready = value & 1 != 0;
            return;
        }
        if queue.ready {
            return;
        }
        let (base, high) = (offset & !4, u32::from(offset & 4 != 0));
        match base {
            QUEUE_SIZE if high == 0 => queue.size = value,
            QUEUE_DESCRIPTORS => set_half(&mut queue.descriptors, high, value),
            QUEUE_DRIVER => set_half(&mut queue.driver, high, value),
            QUEUE_DEVICE => set_half(&mut queue.device, high, value),
            _ => {}
        }
    }

    fn shown_status(&self) -> u8 {
        let failed = self.interrupt_status.load(Ordering::SeqCst) & NEEDS_RESET != 0;
        self.status | if failed { DEVICE_NEEDS_RESET } else { 0 }
    }

    fn set_status(&mut self, value: u8) {
        if value == 0 {
            return self.reset();
        }
        let Some(occupant) = &self.occupant else {
            return;
        };
        // A driver adds bits; it takes them back by a reset only (virtio 1.2 §2.1.1).
        let mut value = self.status | value & !DEVICE_NEEDS_RESET;
        let added = value & !self.status;
        let acceptable = self.driver_features & !occupant.features == 0
            && self.driver_features & F_VERSION_1 != 0;
        if added & FEATURES_OK != 0 && !acceptable {
            value &= !FEATURES_OK;
        }
        if value & FEATURES_OK == 0 {
            value &= !DRIVER_OK;
        }
        let start = value & !self.status & DRIVER_OK != 0;
        self.status = value;
        if start {
            self.start();
        }
    }

    fn start(&mut self) {
        let Some(occupant) = &mut self.occupant else {
            return;
        };
        let interrupt = Interrupt::new(self.interrupt_status.clone(), occupant.line.clone());
        let event_idx = self.driver_features & F_EVENT_IDX != 0;
        let queues: Option<Vec<Queue>> = occupant
            .queues
            .iter()
            .map(|setup| setup.queue(&self.memory, event_idx))
            .collect();
        let device = match (std::mem::replace(&mut occupant.life, Life::Lost), queues) {
            (Life::Idle(device), Some(queues)) => Some((device, queues)),
            (life, _) => {
                // The driver described a queue outside its memory, or the device was lost before.
                occupant.life = life;
                None
            }
        };
        let Some((device, queues)) = device else {
            return interrupt.needs_reset();
        };
        let active = connect(&*self.wires, self.address, queues);
        let started = active.and_then(|(queues, kicks)| {
            let active = Active {
                memory: self.memory.clone(),
                queues,
                interrupt: interrupt.clone(),
                features: self.driver_features,
            };
            match device.start(active) {
                Ok(running) => Ok(Life::Running(running, kicks)),
                Err(error) => {
                    disconnect(&*self.wires, self.address, &kicks);
                    Err(std::io::Error::other(error))
                }
            }
        });
        match started {
            Ok(life) => occupant.life = life,
            Err(error) => {
                let (kind, address) = (occupant.kind, self.address);
                journal::write(format_args!(
                    "The virtio device of kind {kind} at {address:#x} did not start: {error}."
                ));
                interrupt.needs_reset();
            }
        }
    }
}

impl Setup {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            ..Self::default()
        }
    }

    /// The queue to run on, or `None` if its description is wrong.
    fn queue(&self, memory: &Memory, event_idx: bool) -> Option<Queue> {
        let mut queue = Queue::new(self.max_size).ok()?;
        if !self.ready {
            return Some(queue);
        }
        queue.try_set_size(u16::try_from(self.size).ok()?).ok()?;
        queue
            .try_set_desc_table_address(GuestAddress(self.descriptors))
            .ok()?;
        queue
            .try_set_avail_ring_address(GuestAddress(self.driver))
            .ok()?;
        queue
            .try_set_used_ring_address(GuestAddress(self.device))
            .ok()?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        queue.is_valid(memory.as_ref()).then_some(queue)
    }
}

type Connected = (Vec<ActiveQueue>, Vec<EventFd>);

fn connect(wires: &dyn Wires, address: u64, queues: Vec<Queue>) -> std::io::Result<Connected> {
    let (mut active, mut kicks) = (Vec::new(), Vec::new());
    for (index, queue) in (0..).zip(queues) {
        let ends = event()
            .and_then(|kick| Ok((kick.try_clone()?, kick)))
            .and_then(|ends| {
                wires.connect_kick(address + QUEUE_NOTIFY, index, &ends.0)?;
                Ok(ends)
            });
        match ends {
            Ok((kick, ours)) => {
                active.push(ActiveQueue { queue, kick });
                kicks.push(ours);
            }
            Err(error) => {
                disconnect(wires, address, &kicks);
                return Err(error);
            }
        }
    }
    Ok((active, kicks))
}

fn disconnect(wires: &dyn Wires, address: u64, kicks: &[EventFd]) {
    for (index, kick) in (0..).zip(kicks) {
        wires.disconnect_kick(address + QUEUE_NOTIFY, index, kick);
    }
}

fn event() -> std::io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(value: &mut u64, select: u32, half: u32) {
    match select {
        0 => *value = *value & !0xffff_ffff | u64::from(half),
        1 => *value = *value & 0xffff_ffff | u64::from(half) << 32,
        _ => {}
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;

//! The thread that moves frames between the queues and the tap.

use std::io;
use std::os::fd::AsRawFd;

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;

use super::buffers::{Buffers, collect};
use super::control::Control;
use super::counters::{Flow, Turn};
use super::device::{Net, has};
use super::{ETHERNET_BYTES, HEADER_BYTES, SEGMENTED_BYTES, sys};
use crate::device::virtio::ring::{Ring, RingError};
use crate::device::virtio::thread::Poll;
use crate::device::virtio::{ActiveQueue, Interrupt, Memory};
use crate::journal;

/// Frames moved in one direction before the other has its turn.
const TURN: usize = 128;
/// The least bytes of a frame with its header: an Ethernet header (IEEE 802.3) without payload.
const SMALLEST_FRAME: usize = HEADER_BYTES + 14;
/// The most bytes of a frame that the guest may send, with its header.
const LARGEST_FRAME: usize = HEADER_BYTES + ETHERNET_BYTES + SEGMENTED_BYTES;

const KICK_RECEIVE: u64 = 0;
const KICK_TRANSMIT: u64 = 1;
const TAP: u64 = 2;
const KICK_CONTROL: u64 = 3;

/// Why the device gave up. Until the guest resets it, it does nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    #[error("the guest set up {0} queues; receive and transmit are needed")]
    Queues(usize),
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error("waiting for events failed: {0}")]
    Poll(io::Error),
}

/// What a worker takes over: a pair of queues.
pub(super) struct Part {
    /// Which pair, from 0.
    pub pair: usize,
    pub receive: ActiveQueue,
    pub transmit: ActiveQueue,
    /// The control queue, and how many pairs the guest may ask for there.
    pub control: Option<(ActiveQueue, usize)>,
    pub memory: Memory,
    pub interrupt: Interrupt,
    /// What was negotiated.
    pub features: u64,
}

/// A running device, or what serves one pair of its queues.
pub(super) struct Worker {
    device: Box<Net>,
    pair: usize,
    memory: Memory,
    interrupt: Interrupt,
    receive: Ring,
    transmit: Ring,
    control: Option<Control>,
    poll: Poll,
    /// Bytes that receive buffers must have together before a frame is read, if frames may be
    /// spread over several. Otherwise one chain is one frame.
    spread: Option<usize>,
    /// The tap may have a frame.
    readable: bool,
    /// The tap may take a frame.
    writable: bool,
}

impl Worker {
    /// Takes over the queues.
    pub fn new(device: Box<Net>, part: Part, poll: Poll) -> Result<Self, Fault> {
        let (memory, features) = (&part.memory, part.features);
        let receive = Ring::new("receive", part.receive, memory, features)?;
        let transmit = Ring::new("transmit", part.transmit, memory, features)?;
        let control = part
            .control
            .map(|(queue, pairs)| Control::new(queue, memory, features, pairs))
            .transpose()?;
        let tap = device.tap(part.pair).as_raw_fd();
        let both = EventSet::IN | EventSet::OUT;
        let mut watched = vec![
            (KICK_RECEIVE, receive.kick(), EventSet::IN),
            (KICK_TRANSMIT, transmit.kick(), EventSet::IN),
            (TAP, tap, both),
        ];
        watched.extend(
            control
                .as_ref()
                .map(|control| (KICK_CONTROL, control.kick(), EventSet::IN)),
        );
        for (token, fd, events) in watched {
            poll.watch(fd, events, token).map_err(Fault::Poll)?;
        }
        let spread = has(features, VIRTIO_NET_F_MRG_RXBUF).then(|| device.largest_frame(features));
        Ok(Self {
            device,
            pair: part.pair,
            memory: part.memory,
            interrupt: part.interrupt,
            receive,
            transmit,
            control,
            poll,
            spread,
            readable: true,
            writable: true,
        })
    }

    /// Runs until stopped and gives the device back.
    pub fn run(mut self) -> Box<Net> {
        let memory = Memory::clone(&self.memory);
        if let Err(fault) = self.serve(&memory) {
            journal::write(format_args!(
                "The net device stops until its driver resets it: {fault}."
            ));
            self.interrupt.needs_reset();
            self.poll.wait_for_stop();
        }
        self.device
    }

    fn serve(&mut self, memory: &GuestMemoryMmap) -> Result<(), Fault> {
        let mut buffers = Buffers::default();
        loop {
            let mut busy = self.transmit(memory)? | self.receive(memory, &mut buffers)?;
            if let Some(control) = &mut self.control {
                busy |= control.serve(&self.device, memory, &self.interrupt)?;
            }
            for wake in self.poll.wait(busy, None).map_err(Fault::Poll)? {
                match wake.token {
                    _ if wake.stop => return Ok(()),
                    KICK_RECEIVE => kicked(&mut self.receive, &self.device.counters.received),
                    KICK_TRANSMIT => kicked(&mut self.transmit, &self.device.counters.sent),
                    KICK_CONTROL => self.control.iter_mut().for_each(Control::kicked),
                    _ => {
                        let failed = EventSet::ERROR | EventSet::HANG_UP;
                        self.readable |= wake.events.intersects(EventSet::IN | failed);
                        self.writable |= wake.events.intersects(EventSet::OUT | failed);
                    }
                }
            }
        }
    }

    /// Sends the guest's frames. Returns whether there may be more that can be sent.
    fn transmit(&mut self, memory: &GuestMemoryMmap) -> Result<bool, Fault> {
        let ring = &mut self.transmit;
        let mut turn = Turn::default();
        let mut pieces = Vec::new();
        for _ in 0..TURN {
            if !self.writable {
                break;
            }
            let Some(chain) = ring.next(memory)? else {
                break;
            };
            let head = chain.head_index();
            pieces.clear();
            let bytes = collect(ring, memory, chain, false, &mut pieces)?;
            if (SMALLEST_FRAME..=LARGEST_FRAME).contains(&bytes) {
                match sys::write(self.device.tap(self.pair), &pieces) {
                    Ok(_) => turn.moved(bytes),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                        ring.give_back();
                        continue;
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        ring.give_back();
                        self.writable = false;
                        break;
                    }
                    // An interface that is down, or a header that makes no sense: a network may
                    // lose frames.
                    Err(_) => turn.lost(),
                }
            } else {
                turn.lost();
            }
            ring.put(memory, head, 0)?;
        }
        let interrupted = ring.notify(memory, &self.interrupt)?;
        self.device.counters.sent.add(&turn, interrupted);
        Ok(self.writable && ring.filled())
    }

    /// Reads frames for the guest. Returns whether there may be more that can be read.
    fn receive<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
        buffers: &mut Buffers<'m>,
    ) -> Result<bool, Fault> {
        let ring = &mut self.receive;
        let mut more = true;
        let mut failures = 0;
        let mut turn = Turn::default();
        for _ in 0..TURN {
            if !self.readable || !buffers.fill(ring, memory, self.spread)? {
                more = false;
                break;
            }
            let mut rest = [0];
            match sys::read(self.device.tap(self.pair), buffers.pieces(), &mut rest) {
                // Nothing carries frames without bytes: the other end is gone.
                Ok(0) => self.readable = false,
                Ok(count) if count > buffers.bytes() || count < SMALLEST_FRAME => {
                    // Too long for the guest, or not a frame.
                    turn.lost();
                }
                Ok(count) => {
                    buffers.put(ring, memory, count)?;
                    turn.moved(count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // No frame, also of an interface that is down, or no interface: the kernel tells
                // when that changes.
                Err(error)
                    if error.kind() == io::ErrorKind::WouldBlock
                        || error.raw_os_error() == Some(libc::EBADFD) =>
                {
                    self.readable = false;
                }
                // A frame that the tap could not hand over, such as one with a segmentation that
                // the header has no number for, is lost; those behind it are not.
                Err(_) => {
                    turn.lost();
                    failures += 1;
                }
            }
        }
        // An error that stays is not asked for again until the kernel tells of something new.
        self.readable &= failures < TURN;
        let interrupted = ring.notify(memory, &self.interrupt)?;
        self.device.counters.received.add(&turn, interrupted);
        Ok(more && self.readable)
    }
}

/// The guest has kicked this queue, once or more often.
fn kicked(ring: &mut Ring, flow: &Flow) {
    flow.notified(ring.kicks());
    ring.kicked();
}

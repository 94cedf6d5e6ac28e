//! The thread that moves packets between the queues and the streams.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::time::Instant;

use vmm_sys_util::epoll::EventSet;

use super::device::{Message, Vsock};
use super::packet::{HEADER_BYTES, Header, MAX_PAYLOAD};
use crate::device::virtio::ring::{Ring, RingError};
use crate::device::virtio::thread::Poll;
use crate::device::virtio::{Active, ActiveQueue, Interrupt, Memory};
use crate::journal;

/// Packets moved in one direction before the other has its turn.
const TURN: usize = 128;

const KICK_RECEIVE: u64 = 0;
const KICK_TRANSMIT: u64 = 1;
const BELL: u64 = 2;
/// Added to the number of a stream, to tell it from the events above.
const FIRST_STREAM: u64 = 16;

/// Why the device gave up. Until the guest resets it, it does nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    #[error("the guest set up {0} queues; receive, transmit and event are needed")]
    Queues(usize),
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error("the guest's memory cannot be reached: {0}")]
    Memory(io::Error),
    #[error("waiting for events failed: {0}")]
    Poll(io::Error),
}

/// A running device.
pub(super) struct Worker {
    device: Box<Vsock>,
    memory: Memory,
    interrupt: Interrupt,
    receive: Ring,
    transmit: Ring,
    /// For the transport reset after a restore; not used otherwise.
    _event: ActiveQueue,
    poll: Poll,
    payload: Box<[u8]>,
}

impl Worker {
    /// Takes over the queues.
    pub fn new(device: Box<Vsock>, active: Active, poll: Poll) -> Result<Self, Fault> {
        let count = active.queues.len();
        let [receive, transmit, event]: [ActiveQueue; 3] =
            active.queues.try_into().map_err(|_| Fault::Queues(count))?;
        let receive = Ring::new("receive", receive, &active.memory, active.features)?;
        let transmit = Ring::new("transmit", transmit, &active.memory, active.features)?;
        for (token, event) in [
            (KICK_RECEIVE, receive.kick()),
            (KICK_TRANSMIT, transmit.kick()),
            (BELL, device.bell.as_raw_fd()),
        ] {
            poll.watch(event, EventSet::IN, token)
                .map_err(Fault::Poll)?;
        }
        Ok(Self {
            device,
            memory: active.memory,
            interrupt: active.interrupt,
            receive,
            transmit,
            _event: event,
            poll,
            payload: vec![0; MAX_PAYLOAD].into_boxed_slice(),
        })
    }

    /// Runs until stopped, then closes every stream and gives the device back.
    pub fn run(mut self) -> Box<Vsock> {
        // Answers to dials that were made before a reset.
        while self.device.inbox.try_recv().is_ok() {}
        if let Err(fault) = self.serve() {
            journal::write(format_args!(
                "The vsock device stops until its driver resets it: {fault}."
            ));
            self.device.streams.clear();
            self.interrupt.needs_reset();
            self.poll.wait_for_stop();
        }
        self.device.streams.clear();
        self.device
    }

    fn serve(&mut self) -> Result<(), Fault> {
        loop {
            let busy = self.take()? | self.give()?;
            let deadline = self.device.streams.deadline();
            let wakes = self.poll.wait(busy, deadline).map_err(Fault::Poll)?;
            let now = Instant::now();
            let mut rung = false;
            for wake in wakes {
                match wake.token {
                    _ if wake.stop => return Ok(()),
                    KICK_RECEIVE => self.receive.kicked(),
                    KICK_TRANSMIT => self.transmit.kicked(),
                    BELL => rung = true,
                    token => {
                        let number = token.saturating_sub(FIRST_STREAM);
                        self.device.streams.wake(number, wake.events, now);
                    }
                }
            }
            if rung {
                self.read_inbox(now);
            }
            self.device.streams.expire(now);
        }
    }

    fn read_inbox(&mut self, now: Instant) {
        while let Ok(message) = self.device.inbox.try_recv() {
            let poll = &self.poll;
            let streams = &mut self.device.streams;
            match message {
                Message::Answer(number, socket) => streams.answer(number, socket, now, |socket| {
                    let both = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP;
                    let token = number.saturating_add(FIRST_STREAM);
                    poll.watch(socket.as_raw_fd(), both, token)
                }),
                Message::ServerGone => streams.refuse_dials(now),
            }
        }
    }

    /// Takes packets from the guest. Returns whether there may be more.
    fn take(&mut self) -> Result<bool, Fault> {
        let memory = self.memory.as_ref();
        let now = Instant::now();
        let ring = &mut self.transmit;
        let streams = &mut self.device.streams;
        for _ in 0..TURN {
            if !streams.accepts() {
                break;
            }
            let Some(chain) = ring.next(memory)? else {
                break;
            };
            let head = chain.head_index();
            let mut reader = chain.reader(memory).map_err(ring.malformed())?;
            let length = reader.available_bytes();
            let mut header = [0; HEADER_BYTES];
            if length < HEADER_BYTES {
                return Err(ring.unusable(length, 1).into());
            }
            reader.read_exact(&mut header).map_err(Fault::Memory)?;
            let header = Header::decode(&header);
            let payload = match self.payload.get_mut(..header.length as usize) {
                Some(payload) if payload.len() <= length - HEADER_BYTES => {
                    reader.read_exact(payload).map_err(Fault::Memory)?;
                    Some(&*payload)
                }
                _ => None,
            };
            streams.receive(&header, payload, now);
            ring.put(memory, head, 0)?;
        }
        ring.notify(memory, &self.interrupt)?;
        Ok(ring.filled() && streams.accepts())
    }

    /// Gives packets to the guest. Returns whether there may be more.
    fn give(&mut self) -> Result<bool, Fault> {
        let memory = self.memory.as_ref();
        let now = Instant::now();
        let ring = &mut self.receive;
        let streams = &mut self.device.streams;
        let blocked = !streams.accepts();
        for _ in 0..TURN {
            if !streams.has_packets() {
                break;
            }
            let Some(chain) = ring.next(memory)? else {
                break;
            };
            let head = chain.head_index();
            let mut writer = chain.writer(memory).map_err(ring.malformed())?;
            let length = writer.available_bytes();
            if length <= HEADER_BYTES {
                return Err(ring.unusable(length, 1).into());
            }
            let room = MAX_PAYLOAD.min(length - HEADER_BYTES);
            let payload = self.payload.get_mut(..room).unwrap_or_default();
            let Some(header) = streams.packet(payload, now) else {
                ring.give_back();
                break;
            };
            let payload = payload.get(..header.length as usize).unwrap_or_default();
            writer
                .write_all(&header.encode())
                .and_then(|()| writer.write_all(payload))
                .map_err(Fault::Memory)?;
            ring.put(memory, head, HEADER_BYTES as u32 + header.length)?;
        }
        ring.notify(memory, &self.interrupt)?;
        let unblocked = blocked && streams.accepts();
        Ok(unblocked || (ring.filled() && streams.has_packets()))
    }
}

//! All streams of a guest: finds the one a packet is for, and the next that has a packet.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::time::Instant;

use vmm_sys_util::epoll::EventSet;

use super::Announce;
use super::connection::{Connection, Ports};
use super::packet::{HOST_CID, Header, Op, TYPE_STREAM};
use super::stream::{Readiness, Stream};

/// The most streams of a guest at once.
pub const MAX_STREAMS: usize = 1023;
/// The most of them that may wait for the host's answer.
pub const MAX_DIALS: usize = 64;
/// The most resets for packets of no connection that wait for the guest. With more, the guest's
/// packets wait instead (virtio 1.2 §5.10.6.1.2).
const MAX_REFUSALS: usize = 256;

/// The streams, by the number they were announced with.
pub struct Streams {
    guest_cid: u32,
    announce: Box<dyn Announce>,
    /// The number of the next stream: none is used twice in the life of the VM.
    next: u64,
    streams: BTreeMap<u64, Stream>,
    by_ports: HashMap<Ports, u64>,
    /// Streams that may have a packet, in turn.
    ready: VecDeque<u64>,
    refusals: VecDeque<Header>,
    deadlines: BTreeSet<(Instant, u64)>,
}

impl Streams {
    /// No streams.
    pub fn new(guest_cid: u32, announce: Box<dyn Announce>) -> Self {
        Self {
            guest_cid,
            announce,
            next: 1,
            streams: BTreeMap::new(),
            by_ports: HashMap::new(),
            ready: VecDeque::new(),
            refusals: VecDeque::new(),
            deadlines: BTreeSet::new(),
        }
    }

    /// Closes everything without a word to the guest.
    pub fn clear(&mut self) {
        self.streams.clear();
        self.by_ports.clear();
        self.ready.clear();
        self.refusals.clear();
        self.deadlines.clear();
    }

    /// Whether a packet of the guest can be taken.
    pub fn accepts(&self) -> bool {
        self.refusals.len() < MAX_REFUSALS
    }

    /// Takes a packet of the guest. `payload` is `None` if the guest's buffer does not hold what
    /// the header says, or too much.
    pub fn receive(&mut self, header: &Header, payload: Option<&[u8]>, now: Instant) {
        let addressed =
            header.source_cid == u64::from(self.guest_cid) && header.destination_cid == HOST_CID;
        if !addressed {
            return;
        }
        if header.kind != TYPE_STREAM {
            return self.refuse(header);
        }
        let ports = Ports {
            host: header.destination_port,
            guest: header.source_port,
        };
        let Some(&number) = self.by_ports.get(&ports) else {
            return match (header.op, payload) {
                (Op::Request, Some(_)) => self.dial(header, now),
                _ => self.refuse(header),
            };
        };
        self.change(number, now, |stream| match payload {
            Some(payload) => stream.connection.receive(header, payload),
            None => stream.connection.reset(),
        });
    }

    /// Answers a packet that no stream takes (virtio 1.2 §5.10.6.4.1).
    fn refuse(&mut self, header: &Header) {
        if header.op != Op::Reset {
            self.refusals.push_back(header.refusal());
        }
    }

    fn dial(&mut self, request: &Header, now: Instant) {
        let dials = self.streams.values().filter(|s| s.connection.is_dialling());
        if self.streams.len() >= MAX_STREAMS || dials.count() >= MAX_DIALS {
            return self.refuse(request);
        }
        let number = self.next;
        self.next += 1;
        if !self.announce.dial(number, request.destination_port) {
            return self.refuse(request);
        }
        let connection = Connection::dialled(self.guest_cid, request);
        self.by_ports.insert(connection.ports(), number);
        self.streams.insert(number, Stream::new(connection));
        self.change(number, now, |_| {});
    }

    /// Takes the host's answer to a dial, if it still waits for one.
    pub fn answer(
        &mut self,
        number: u64,
        socket: Option<OwnedFd>,
        now: Instant,
        watch: impl FnOnce(&OwnedFd) -> std::io::Result<()>,
    ) {
        self.change(number, now, |stream| {
            if !stream.connection.is_dialling() {
                return;
            }
            match socket {
                Some(socket) if watch(&socket).is_ok() => stream.join(socket),
                _ => stream.connection.reset(),
            }
        });
    }

    /// Refuses every dial that waits.
    pub fn refuse_dials(&mut self, now: Instant) {
        let numbers: Vec<u64> = self.streams.keys().copied().collect();
        for number in numbers {
            self.change(number, now, |stream| {
                if stream.connection.is_dialling() {
                    stream.connection.reset();
                }
            });
        }
    }

    /// Takes news of a socket.
    pub fn wake(&mut self, number: u64, events: EventSet, now: Instant) {
        let failed = EventSet::HANG_UP | EventSet::ERROR;
        let news = Readiness {
            readable: events.intersects(EventSet::IN | EventSet::READ_HANG_UP | failed),
            writable: events.intersects(EventSet::OUT | failed),
            hung_up: events.intersects(EventSet::HANG_UP),
        };
        self.change(number, now, |stream| stream.wake(news));
    }

    /// When [`Self::expire`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// Ends what has waited too long.
    pub fn expire(&mut self, now: Instant) {
        while let Some(&(deadline, number)) = self.deadlines.first() {
            if deadline > now {
                return;
            }
            self.deadlines.pop_first();
            self.change(number, now, |_| {});
        }
    }

    /// Whether [`Self::packet`] may have something.
    pub fn has_packets(&self) -> bool {
        !self.refusals.is_empty() || !self.ready.is_empty()
    }

    /// The next packet for the guest, with its payload, if any, in the first bytes of `payload`.
    pub fn packet(&mut self, payload: &mut [u8], now: Instant) -> Option<Header> {
        if let Some(refusal) = self.refusals.pop_front() {
            return Some(refusal);
        }
        while let Some(number) = self.ready.pop_front() {
            let mut packet = None;
            self.change(number, now, |stream| {
                stream.queued = false;
                packet = stream.packet(payload);
            });
            if packet.is_some() {
                return packet;
            }
        }
        None
    }

    /// Changes a stream, if it is still there, and does everything that follows from it.
    fn change(&mut self, number: u64, now: Instant, change: impl FnOnce(&mut Stream)) {
        let Some(stream) = self.streams.get_mut(&number) else {
            return;
        };
        let before = stream.deadline();
        change(stream);
        stream.settle(now);
        let after = stream.deadline();
        if before != after {
            before.map(|deadline| self.deadlines.remove(&(deadline, number)));
            after.map(|deadline| self.deadlines.insert((deadline, number)));
        }
        if stream.wants_turn() && !stream.queued {
            stream.queued = true;
            self.ready.push_back(number);
        }
        let ports = stream.connection.ports();
        if !stream.connection.has_guest() && self.by_ports.get(&ports) == Some(&number) {
            self.by_ports.remove(&ports);
        }
        if stream.connection.is_gone() {
            after.map(|deadline| self.deadlines.remove(&(deadline, number)));
            if stream.queued {
                // Or a guest that takes nothing could make the queue grow without end.
                self.ready.retain(|queued| *queued != number);
            }
            self.streams.remove(&number);
        }
    }
}

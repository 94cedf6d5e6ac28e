//! One connection, as a state machine without I/O: packets of the guest and events of the host's
//! socket go in, packets for the guest come out.
//!
//! Control packets are not queued but remembered as flags, so that a guest which does not take
//! them cannot make the device hold more than a few bits for each connection.

use std::collections::VecDeque;
use std::num::Wrapping;
use std::time::Duration;

use super::packet::{
    HOST_CID, Header, MAX_PAYLOAD, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};

/// The receive buffer of a connection, in bytes: what the guest may send ahead of the host.
pub const BUFFER_BYTES: u32 = 64 << 10;
/// How many bytes leave the buffer before the guest is told without being asked.
const TELL_AFTER: u32 = BUFFER_BYTES / 4;
/// How long a dial may wait for its answer: as long as Linux waits for a connection.
pub const DIAL_LIMIT: Duration = Duration::from_secs(2);
/// How long a guest may take to confirm that a connection is closed.
pub const CLOSE_LIMIT: Duration = Duration::from_secs(2);
/// How long bytes of a connection that the guest has closed may wait for the host.
pub const DRAIN_LIMIT: Duration = Duration::from_secs(30);

/// The ends of a connection; unique among the connections of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ports {
    /// The port that the guest dialled.
    pub host: u32,
    /// The guest's own port.
    pub guest: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The host has not answered yet.
    Dialling,
    /// Both ends are there.
    Open,
    /// The guest is to be sent a reset.
    Resetting,
    /// The guest is done; its last bytes wait for the host.
    Draining,
    /// Nothing is left.
    Gone,
}

/// What waits to be sent, in the order of precedence. A reset is [`Phase::Resetting`].
#[derive(Debug, Default)]
struct Pending {
    response: bool,
    shutdown: bool,
    credit_request: bool,
    credit_update: bool,
}

impl Pending {
    fn any(&self) -> bool {
        self.response || self.shutdown || self.credit_request || self.credit_update
    }
}

/// What is to be shut down on the host's socket.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct SocketShutdown {
    /// The guest receives no more.
    pub read: bool,
    /// The guest has sent its last byte, and the socket has it.
    pub write: bool,
}

/// One connection, opened by the guest.
#[derive(Debug)]
pub struct Connection {
    guest_cid: u32,
    ports: Ports,
    phase: Phase,
    pending: Pending,
    /// Bytes from the guest that the socket has not taken; at most [`BUFFER_BYTES`].
    buffer: VecDeque<u8>,
    /// Bytes that ever left `buffer`.
    forwarded: Wrapping<u32>,
    /// What the guest knows of `forwarded`.
    told: Wrapping<u32>,
    /// Bytes ever sent to the guest.
    sent: Wrapping<u32>,
    /// The guest's receive buffer, by its last packet.
    guest_buffer: u32,
    /// Bytes that ever left the guest's receive buffer, by its last packet.
    guest_forwarded: Wrapping<u32>,
    /// The guest was asked for credit and has not given any.
    credit_asked: bool,
    /// The guest sends no more.
    guest_ended: bool,
    /// The guest receives no more.
    guest_deaf: bool,
    /// The host sends no more.
    host_ended: bool,
    /// The host receives no more.
    host_deaf: bool,
    /// What the socket was already told.
    shut: SocketShutdown,
}

impl Connection {
    /// A connection that the guest dials with `request`.
    pub fn dialled(guest_cid: u32, request: &Header) -> Self {
        let mut connection = Self {
            guest_cid,
            ports: Ports {
                host: request.destination_port,
                guest: request.source_port,
            },
            phase: Phase::Dialling,
            pending: Pending::default(),
            buffer: VecDeque::new(),
            forwarded: Wrapping(0),
            told: Wrapping(0),
            sent: Wrapping(0),
            guest_buffer: 0,
            guest_forwarded: Wrapping(0),
            credit_asked: false,
            guest_ended: false,
            guest_deaf: false,
            host_ended: false,
            host_deaf: false,
            shut: SocketShutdown::default(),
        };
        connection.take_credit(request);
        connection
    }

    /// The ends of the connection.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// Whether the host has not answered yet.
    pub fn is_dialling(&self) -> bool {
        self.phase == Phase::Dialling
    }

    /// Whether packets of the guest still belong to this connection.
    pub fn has_guest(&self) -> bool {
        !matches!(self.phase, Phase::Draining | Phase::Gone)
    }

    /// Whether the host's socket still has a use. If not, it is to be closed.
    pub fn has_host(&self) -> bool {
        match self.phase {
            Phase::Dialling | Phase::Open => true,
            Phase::Resetting | Phase::Draining => !self.buffer.is_empty(),
            Phase::Gone => false,
        }
    }

    /// Whether nothing is left to be done.
    pub fn is_gone(&self) -> bool {
        self.phase == Phase::Gone
    }

    /// How long the connection may stay in the state it is in, if there is a limit; then
    /// [`Self::expire`].
    pub fn limit(&self) -> Option<Duration> {
        match self.phase {
            Phase::Dialling => Some(DIAL_LIMIT),
            Phase::Open if self.host_ended && self.host_deaf && !self.pending.shutdown => {
                Some(CLOSE_LIMIT)
            }
            Phase::Draining => Some(DRAIN_LIMIT),
            Phase::Open | Phase::Resetting | Phase::Gone => None,
        }
    }

    /// The time of [`Self::limit`] is over.
    pub fn expire(&mut self) {
        match self.phase {
            Phase::Dialling | Phase::Open => self.reset(),
            Phase::Draining => {
                self.discard();
                self.phase = Phase::Gone;
            }
            Phase::Resetting | Phase::Gone => {}
        }
    }

    /// The host answers the dial with a socket.
    pub fn accept(&mut self) {
        if self.phase == Phase::Dialling {
            self.phase = Phase::Open;
            self.pending.response = true;
        }
    }

    /// Ends the connection at once, without its bytes in flight.
    pub fn reset(&mut self) {
        if self.has_guest() {
            self.discard();
            self.pending = Pending::default();
            self.phase = Phase::Resetting;
        }
    }

    /// Takes a packet of the guest, whose `length` is that of its `payload`.
    pub fn receive(&mut self, header: &Header, payload: &[u8]) {
        self.take_credit(header);
        match (self.phase, header.op) {
            (Phase::Draining | Phase::Gone, _) => {}
            (_, Op::Reset) => self.leave(),
            (Phase::Resetting, _) => {}
            (Phase::Open, Op::Data) => self.take(payload),
            (Phase::Open, Op::Shutdown) => self.guest_shuts(header.flags),
            (Phase::Open, Op::CreditUpdate) => {}
            (Phase::Open, Op::CreditRequest) => self.pending.credit_update = true,
            _ => self.reset(),
        }
    }

    fn take_credit(&mut self, header: &Header) {
        self.guest_buffer = header.buffer;
        self.guest_forwarded = Wrapping(header.forwarded);
        if self.credit() > 0 {
            self.credit_asked = false;
            self.pending.credit_request = false;
        }
    }

    /// Bytes that the guest's receive buffer has room for (virtio 1.2 §5.10.6.3).
    fn credit(&self) -> u32 {
        // The guest chooses both numbers: what makes no sense is no credit.
        let in_flight = (self.sent - self.guest_forwarded).0;
        self.guest_buffer.saturating_sub(in_flight)
    }

    fn take(&mut self, payload: &[u8]) {
        let room = (BUFFER_BYTES as usize).saturating_sub(self.buffer.len());
        if self.guest_ended || payload.len() > room {
            self.reset();
            return;
        }
        self.buffer.extend(payload);
        if self.host_deaf {
            // Sent before the guest knew.
            self.discard();
        }
    }

    fn guest_shuts(&mut self, flags: u32) {
        self.guest_ended |= flags & SHUTDOWN_SEND != 0;
        self.guest_deaf |= flags & SHUTDOWN_RECEIVE != 0;
        if self.guest_ended && self.guest_deaf {
            // "... a VIRTIO_VSOCK_OP_RST ... confirms" (§5.10.6.5). The bytes in flight still
            // reach the host.
            self.pending = Pending::default();
            self.phase = Phase::Resetting;
        }
    }

    /// The guest has forgotten the connection.
    fn leave(&mut self) {
        self.pending = Pending::default();
        if self.guest_ended && !self.buffer.is_empty() {
            self.phase = Phase::Draining;
        } else {
            self.discard();
            self.phase = Phase::Gone;
        }
    }

    fn discard(&mut self) {
        let length = self.buffer.len();
        self.forward(length);
    }

    /// Bytes for the socket, in two pieces.
    pub fn outgoing(&self) -> (&[u8], &[u8]) {
        self.buffer.as_slices()
    }

    /// The socket has taken the first `count` bytes of [`Self::outgoing`].
    pub fn forward(&mut self, count: usize) {
        let count = count.min(self.buffer.len());
        self.buffer.drain(..count);
        if self.buffer.is_empty() {
            // Idle connections hold no memory.
            self.buffer = VecDeque::new();
        }
        // At most `BUFFER_BYTES`, so nothing is cut.
        self.forwarded += Wrapping(count as u32);
        if (self.forwarded - self.told).0 >= TELL_AFTER && self.phase == Phase::Open {
            self.pending.credit_update |= !self.guest_ended;
        }
        if self.phase == Phase::Draining && self.buffer.is_empty() {
            self.phase = Phase::Gone;
        }
    }

    /// What the socket is to be told now; each is said once.
    pub fn socket_shutdown(&mut self) -> SocketShutdown {
        let due = SocketShutdown {
            read: self.guest_deaf,
            write: self.guest_ended && self.buffer.is_empty(),
        };
        let news = SocketShutdown {
            read: due.read && !self.shut.read,
            write: due.write && !self.shut.write,
        };
        self.shut = due;
        news
    }

    /// The socket has come to its end: the host sends no more.
    pub fn host_ends(&mut self) {
        if self.phase == Phase::Open && !self.host_ended {
            self.host_ended = true;
            self.pending.shutdown = true;
        }
    }

    /// The socket takes no more bytes.
    pub fn host_goes_deaf(&mut self) {
        if self.host_deaf {
            return;
        }
        self.host_deaf = true;
        self.discard();
        if self.phase == Phase::Open {
            self.pending.shutdown = true;
        }
    }

    /// Whether bytes that the socket has are wanted, be there credit for them or not.
    pub fn wants_input(&self) -> bool {
        self.phase == Phase::Open && !self.host_ended && !self.guest_deaf
    }

    /// Bytes that may be read from the socket now.
    pub fn room(&self) -> usize {
        if self.wants_input() && !self.pending.response {
            MAX_PAYLOAD.min(self.credit() as usize)
        } else {
            0
        }
    }

    /// The socket has bytes but [`Self::room`] is 0: asks the guest, once.
    pub fn starve(&mut self) {
        if self.wants_input() && self.credit() == 0 && !self.credit_asked {
            self.credit_asked = true;
            self.pending.credit_request = true;
        }
    }

    /// Whether [`Self::control`] has something.
    pub fn has_control(&self) -> bool {
        match self.phase {
            Phase::Resetting => true,
            Phase::Open => self.pending.any(),
            Phase::Dialling | Phase::Draining | Phase::Gone => false,
        }
    }

    /// The next packet without payload.
    pub fn control(&mut self) -> Option<Header> {
        if self.phase == Phase::Resetting {
            let header = self.header(Op::Reset, 0, 0);
            self.leave();
            return Some(header);
        }
        if self.phase != Phase::Open {
            return None;
        }
        let take = std::mem::take::<bool>;
        if take(&mut self.pending.response) {
            Some(self.header(Op::Response, 0, 0))
        } else if take(&mut self.pending.shutdown) {
            let ended = if self.host_ended { SHUTDOWN_SEND } else { 0 };
            let deaf = if self.host_deaf { SHUTDOWN_RECEIVE } else { 0 };
            Some(self.header(Op::Shutdown, 0, ended | deaf))
        } else if take(&mut self.pending.credit_request) {
            Some(self.header(Op::CreditRequest, 0, 0))
        } else if take(&mut self.pending.credit_update) {
            Some(self.header(Op::CreditUpdate, 0, 0))
        } else {
            None
        }
    }

    /// The header of `count` bytes read from the socket, at most [`Self::room`] and not 0.
    pub fn data(&mut self, count: usize) -> Header {
        // At most `MAX_PAYLOAD`, so nothing is cut.
        let count = count.min(MAX_PAYLOAD) as u32;
        self.sent += Wrapping(count);
        self.header(Op::Data, count, 0)
    }

    fn header(&mut self, op: Op, length: u32, flags: u32) -> Header {
        self.told = self.forwarded;
        self.pending.credit_update = false;
        Header {
            source_cid: HOST_CID,
            destination_cid: u64::from(self.guest_cid),
            source_port: self.ports.host,
            destination_port: self.ports.guest,
            length,
            kind: TYPE_STREAM,
            op,
            flags,
            buffer: BUFFER_BYTES,
            forwarded: self.forwarded.0,
        }
    }
}

#[cfg(test)]
mod tests;

//! A guest with a vsock device, and the host's end of it.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress};

use crate::device::virtio::driver::{self, Buffer, Driver, Line, QUEUE_BYTES};
use crate::device::virtio::vsock::connection::BUFFER_BYTES;
use crate::device::virtio::vsock::packet::{
    HEADER_BYTES, HOST_CID, Header, MAX_PAYLOAD, Op, TYPE_STREAM,
};
use crate::device::virtio::vsock::{Announce, Answers, Vsock};
use crate::device::virtio::{Active, Device, Memory, Running};

const CID: u32 = 3;
pub const RECEIVE_BYTES: usize = 4 << 10;
const SEND_BYTES: usize = HEADER_BYTES + MAX_PAYLOAD;
pub const RECEIVE_AT: u64 = 0x10_0000;
pub const SEND_AT: u64 = 0x20_0000;

struct Dials {
    to: Sender<(u64, u32)>,
    listen: bool,
}

impl Announce for Dials {
    fn dial(&self, stream: u64, port: u32) -> bool {
        self.listen && self.to.send((stream, port)).is_ok()
    }
}

/// A guest and the host's end of its device.
pub struct Guest {
    pub memory: Memory,
    pub receive: Driver,
    pub transmit: Driver,
    pub line: Line,
    pub running: Option<Box<dyn Running>>,
    pub answers: Answers,
    pub dials: Receiver<(u64, u32)>,
    /// By guest port: what the device has told about its credit, and what was sent.
    pub credit: HashMap<u32, Credit>,
}

#[derive(Default, Clone, Copy)]
pub struct Credit {
    buffer: u32,
    forwarded: u32,
    sent: u32,
    /// Of the guest itself.
    taken: u32,
}

impl Credit {
    pub fn room(&self) -> usize {
        let in_flight = self.sent.wrapping_sub(self.forwarded);
        self.buffer.checked_sub(in_flight).unwrap() as usize
    }
}

impl Guest {
    pub fn new() -> Self {
        Self::with(true, true, 64)
    }

    /// `buffers` in the receive queue; the host listens or not; event index or not.
    pub fn with(listen: bool, event_idx: bool, buffers: u16) -> Self {
        let (to, dials) = channel();
        let (device, answers) = Vsock::new(CID, Box::new(Dials { to, listen })).unwrap();
        let mut guest = Self::boot(Box::new(device), answers, dials, event_idx);
        for slot in 0..u64::from(buffers) {
            let at = RECEIVE_AT + slot * RECEIVE_BYTES as u64;
            guest.receive.offer(&[Buffer::write(at, RECEIVE_BYTES)]);
        }
        guest
    }

    pub fn boot(
        device: Box<dyn Device>,
        answers: Answers,
        dials: Receiver<(u64, u32)>,
        event_idx: bool,
    ) -> Self {
        let memory = driver::memory(16 << 20);
        let queue = |index| Driver::new(&memory, QUEUE_BYTES * index, 64, event_idx);
        let (receive, transmit, event) = (queue(0), queue(1), queue(2));
        let (interrupt, line) = driver::interrupt();
        let active = Active {
            memory: memory.clone(),
            queues: [&receive, &transmit, &event]
                .map(Driver::activate)
                .into_iter()
                .collect(),
            interrupt,
            features: u64::from(event_idx) << VIRTIO_RING_F_EVENT_IDX,
        };
        let running = Some(device.start(active).unwrap());
        Self {
            memory,
            receive,
            transmit,
            line,
            running,
            answers,
            dials,
            credit: HashMap::new(),
        }
    }

    pub fn header(&self, port: u32, op: Op) -> Header {
        Header {
            source_cid: u64::from(CID),
            destination_cid: HOST_CID,
            source_port: port,
            destination_port: 1024,
            length: 0,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buffer: 256 << 10,
            forwarded: self.credit.get(&port).map_or(0, |credit| credit.taken),
        }
    }

    /// Sends bytes as they are, in two buffers as Linux does.
    pub fn send_raw(&mut self, header: &[u8], payload: &[u8]) {
        while self.transmit.used().is_some() {}
        while !self.transmit.has_room(2) {
            self.line.wait();
            while self.transmit.used().is_some() {}
        }
        let slot = (0..64)
            .find(|slot| !self.slots_in_use().contains(slot))
            .unwrap();
        let at = SEND_AT + slot * SEND_BYTES.next_multiple_of(16) as u64;
        self.memory.write_slice(header, GuestAddress(at)).unwrap();
        let body = at + header.len() as u64;
        self.memory
            .write_slice(payload, GuestAddress(body))
            .unwrap();
        let mut chain = vec![Buffer::read(at, header.len())];
        if !payload.is_empty() {
            chain.push(Buffer::read(body, payload.len()));
        }
        self.transmit.offer(&chain);
    }

    pub fn slots_in_use(&self) -> Vec<u64> {
        let stride = SEND_BYTES.next_multiple_of(16) as u64;
        let addresses = self.transmit.offered();
        addresses.map(|at| (at - SEND_AT) / stride).collect()
    }

    pub fn send(&mut self, header: Header, payload: &[u8]) {
        let header = Header {
            length: payload.len() as u32,
            ..header
        };
        let credit = self.credit.entry(header.source_port).or_default();
        credit.sent = credit.sent.wrapping_add(header.length);
        self.send_raw(&header.encode(), payload);
    }

    pub fn say(&mut self, port: u32, op: Op) {
        self.send(self.header(port, op), &[]);
    }

    pub fn shut(&mut self, port: u32, flags: u32) {
        let header = self.header(port, Op::Shutdown);
        self.send(Header { flags, ..header }, &[]);
    }

    /// The next packet, if there is one already. Its buffer is offered again.
    pub fn poll(&mut self) -> Option<(Header, Vec<u8>)> {
        let (packet, at) = self.poll_keep()?;
        self.receive.offer(&[Buffer::write(at, RECEIVE_BYTES)]);
        Some(packet)
    }

    pub fn poll_keep(&mut self) -> Option<((Header, Vec<u8>), u64)> {
        let (at, length) = self.receive.used()?;
        let mut bytes = vec![0; length as usize];
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        let (header, payload) = bytes.split_first_chunk().unwrap();
        let header = Header::decode(header);
        assert_eq!(header.length as usize, payload.len());
        assert_eq!((header.source_cid, header.destination_cid), (HOST_CID, 3));
        if header.op != Op::Reset {
            let credit = self.credit.entry(header.destination_port).or_default();
            credit.buffer = header.buffer;
            credit.forwarded = header.forwarded;
            credit.taken = credit.taken.wrapping_add(header.length);
        }
        Some(((header, payload.to_vec()), at))
    }

    /// The next packet.
    pub fn next(&mut self) -> (Header, Vec<u8>) {
        loop {
            if let Some(packet) = self.poll() {
                return packet;
            }
            self.line.wait();
        }
    }

    /// The next packet that is not about credit.
    pub fn next_event(&mut self) -> (Header, Vec<u8>) {
        loop {
            let packet = self.next();
            match packet.0.op {
                Op::CreditUpdate => {}
                Op::CreditRequest => self.say(packet.0.destination_port, Op::CreditUpdate),
                _ => return packet,
            }
        }
    }

    pub fn dialled(&self) -> u64 {
        let limit = Duration::from_secs(20);
        self.dials.recv_timeout(limit).unwrap().0
    }

    /// Opens a stream from `port` and returns the host's end.
    pub fn open(&mut self, port: u32) -> UnixStream {
        self.say(port, Op::Request);
        let stream = self.dialled();
        let (host, socket) = UnixStream::pair().unwrap();
        host.set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        self.answers.answer(stream, Some(OwnedFd::from(socket)));
        let (header, _) = self.next();
        assert_eq!((header.op, header.destination_port), (Op::Response, port));
        assert_eq!(header.buffer, BUFFER_BYTES);
        host
    }

    /// Sends `bytes` as far as credit goes, and collects what comes, until `bytes` are sent and
    /// `done` agrees with what has come.
    pub fn exchange(&mut self, port: u32, bytes: &[u8], done: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let mut rest = bytes;
        let mut came = Vec::new();
        let mut told = self.credit[&port].taken;
        loop {
            let room = self.credit[&port].room().min(rest.len()).min(MAX_PAYLOAD);
            if room > 0 {
                let (now, later) = rest.split_at(room);
                self.send(self.header(port, Op::Data), now);
                rest = later;
            }
            if rest.is_empty() && done(&came) {
                return came;
            }
            let packet = match self.poll() {
                Some(packet) => packet,
                None if room > 0 => continue,
                None => self.next(),
            };
            match packet.0.op {
                Op::Data => came.extend(packet.1),
                Op::CreditUpdate => {}
                Op::CreditRequest => self.say(port, Op::CreditUpdate),
                other => panic!("{other:?}"),
            }
            if self.credit[&port].taken.wrapping_sub(told) > 64 << 10 {
                told = self.credit[&port].taken;
                self.say(port, Op::CreditUpdate);
            }
        }
    }

    pub fn stop(mut self) -> (Box<dyn Device>, Answers, Receiver<(u64, u32)>) {
        let device = self.running.take().unwrap().stop();
        (device, self.answers, self.dials)
    }
}

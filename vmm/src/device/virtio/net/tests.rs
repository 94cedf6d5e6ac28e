//! The running device, driven by a guest's side of its queues. A socket that keeps the bounds of
//! packets stands in for the tap, and a real tap for itself.

use std::net::UdpSocket;
use std::os::fd::OwnedFd;

use proptest::prelude::*;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress};

use super::{ETHERNET_BYTES, HEADER_BYTES, Net};
use crate::device::virtio::driver::{self, Buffer, Driver, Line, QUEUE_BYTES};
use crate::device::virtio::{Active, Device, Memory, Running};

mod tap;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const MTU: u16 = 1500;
const RECEIVE_AT: u64 = 0x10_0000;
const SEND_AT: u64 = 0x80_0000;
const SEND_BYTES: u64 = 0x1_1000;
const MERGE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

/// How many hostile guests to try: so many times more with BULKHEAD_TEST_FACTOR.
fn cases() -> u32 {
    let factor = std::env::var("BULKHEAD_TEST_FACTOR").ok();
    let factor: Option<u32> = factor.and_then(|factor| factor.parse().ok());
    factor.unwrap_or(1).saturating_mul(64)
}

/// A guest with a network interface.
struct Guest {
    memory: Memory,
    receive: Driver,
    transmit: Driver,
    line: Line,
    running: Box<dyn Running>,
    buffer_bytes: usize,
}

impl Guest {
    /// A guest whose receive queue holds `buffers` of `buffer_bytes`.
    fn boot(device: Box<dyn Device>, features: u64, buffers: u64, buffer_bytes: usize) -> Self {
        let memory = driver::memory(32 << 20);
        let event_idx = features & EVENT_IDX != 0;
        let mut receive = Driver::new(&memory, 0, 256, event_idx);
        let transmit = Driver::new(&memory, QUEUE_BYTES, 128, event_idx);
        for slot in 0..buffers {
            let at = RECEIVE_AT + slot * buffer_bytes as u64;
            receive.offer(&[Buffer::write(at, buffer_bytes)]);
        }
        let (interrupt, line) = driver::interrupt();
        let active = Active {
            memory: memory.clone(),
            queues: vec![receive.activate(), transmit.activate()],
            interrupt,
            features,
        };
        Self {
            memory,
            receive,
            transmit,
            line,
            running: device.start(active).unwrap(),
            buffer_bytes,
        }
    }

    /// The same, with the other end of its wire.
    fn wired(features: u64, buffers: u64, buffer_bytes: usize) -> (Self, OwnedFd) {
        let (wire, tap) = wire();
        let device = Box::new(Net::new(vec![tap], MAC, MTU).unwrap());
        (Self::boot(device, features, buffers, buffer_bytes), wire)
    }

    /// Sends a frame in pieces of the given sizes, the last taking the rest.
    fn send(&mut self, frame: &[u8], sizes: &[usize]) {
        while self.transmit.used().is_some() {}
        while !self.transmit.has_room(sizes.len() + 1) {
            self.line.wait();
            while self.transmit.used().is_some() {}
        }
        let in_use: Vec<u64> = self.transmit.offered().collect();
        let at = (0..)
            .map(|slot| SEND_AT + slot * SEND_BYTES)
            .find(|at| !in_use.contains(at))
            .unwrap();
        self.memory.write_slice(frame, GuestAddress(at)).unwrap();
        let mut chain = Vec::new();
        let mut start = 0;
        for size in sizes {
            chain.push(Buffer::read(at + start as u64, *size));
            start += size;
        }
        chain.push(Buffer::read(at + start as u64, frame.len() - start));
        self.transmit.offer(&chain);
    }

    /// The next buffer that the device has used, offered again.
    fn buffer(&mut self) -> Vec<u8> {
        let (at, length) = loop {
            match self.receive.used() {
                Some(used) => break used,
                None => self.line.wait(),
            }
        };
        let mut bytes = vec![0; length as usize];
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        self.receive.offer(&[Buffer::write(at, self.buffer_bytes)]);
        bytes
    }

    /// The next frame: all its buffers have to be there with the first.
    fn frame(&mut self) -> Vec<u8> {
        let mut frame = self.buffer();
        for _ in 1..u16::from_le_bytes([frame[10], frame[11]]) {
            let (at, length) = self.receive.used().expect("the rest of the frame");
            let mut bytes = vec![0; length as usize];
            self.memory
                .read_slice(&mut bytes, GuestAddress(at))
                .unwrap();
            self.receive.offer(&[Buffer::write(at, self.buffer_bytes)]);
            frame.extend(bytes);
        }
        frame
    }
}

/// Two ends of something that keeps the bounds of packets, like a tap.
fn wire() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::CLOEXEC;
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}

/// A frame with its header, different for each `seed`.
fn frame(length: usize, seed: usize) -> Vec<u8> {
    let payload = (0..length).map(|at| (at * 7 + seed * 13 + (at >> 8)) as u8);
    [0; HEADER_BYTES].into_iter().chain(payload).collect()
}

fn put(wire: &OwnedFd, frame: &[u8]) {
    assert_eq!(send(wire, frame, SendFlags::empty()).unwrap(), frame.len());
}

fn get(wire: &OwnedFd) -> Vec<u8> {
    let mut bytes = vec![0; 80 << 10];
    let (count, _) = recv(wire, &mut bytes[..], RecvFlags::empty()).unwrap();
    bytes.truncate(count);
    bytes
}

/// What the guest sees of a frame: the tap's header with the number of buffers.
fn numbered(mut frame: Vec<u8>, buffers: u8) -> Vec<u8> {
    frame[10] = buffers;
    frame
}

#[test]
fn the_configuration_tells_address_and_mtu() {
    let device = Net::new(vec![wire().1], MAC, 9000).unwrap();
    assert_eq!(device.kind(), 1);
    assert_ne!(device.features() & 1 << VIRTIO_NET_F_MTU, 0);
    assert_eq!(device.config()[..6], MAC);
    assert_eq!(device.config()[10..], 9000u16.to_le_bytes());
}

#[test]
fn a_frame_goes_out_as_it_is() {
    for features in [0, EVENT_IDX] {
        let (mut guest, wire) = Guest::wired(features, 0, 2048);
        let cases: [&[usize]; 4] = [&[], &[12], &[10, 2, 14], &[1, 0, 1, 30]];
        for (seed, sizes) in cases.into_iter().enumerate() {
            let frame = frame(60 + seed, seed);
            guest.send(&frame, sizes);
            assert_eq!(get(&wire), frame);
        }
        guest.running.stop();
    }
}

#[test]
fn a_frame_in_an_indirect_table_goes_out() {
    let (mut guest, wire) = Guest::wired(EVENT_IDX, 0, 2048);
    let frame = frame(900, 3);
    let table = SEND_AT + 0x8000;
    guest
        .memory
        .write_slice(&frame, GuestAddress(SEND_AT))
        .unwrap();
    for (index, (at, length, flags)) in [(SEND_AT, 12u32, 1u16), (SEND_AT + 12, 900, 0)]
        .into_iter()
        .enumerate()
    {
        let entry = GuestAddress(table + 16 * index as u64);
        let tail = u64::from(length) | u64::from(flags) << 32 | 1 << 48;
        guest.memory.write_obj([at, tail], entry).unwrap();
    }
    guest.transmit.describe(5, Buffer::read(table, 32), 4, 0);
    guest.transmit.publish(5);
    assert_eq!(get(&wire), frame);
}

#[test]
fn a_frame_comes_in_as_it_is() {
    for features in [0, EVENT_IDX, MERGE, MERGE | EVENT_IDX] {
        let (mut guest, wire) = Guest::wired(features, 16, 2048);
        for seed in 0..100 {
            let frame = frame(14 + seed * 15, seed);
            put(&wire, &frame);
            assert_eq!(guest.frame(), numbered(frame, 1));
        }
        guest.running.stop();
    }
}

#[test]
fn a_frame_is_spread_over_buffers_if_the_guest_agrees() {
    let (mut guest, wire) = Guest::wired(MERGE | EVENT_IDX, 16, 256);
    for seed in 0..50 {
        let frame = frame(1500, seed);
        put(&wire, &frame);
        assert_eq!(guest.frame(), numbered(frame, 6));
    }
}

#[test]
fn a_segmented_frame_needs_buffers_for_the_largest() {
    let tso = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;
    let (mut guest, wire) = Guest::wired(MERGE | EVENT_IDX | tso, 48, 1536);
    let frame = frame(60_000, 1);
    put(&wire, &frame);
    assert_eq!(guest.frame(), numbered(frame, 40));
}

#[test]
fn frames_notifications_and_interrupts_are_counted() {
    let (wire, tap) = wire();
    let device = Box::new(Net::new(vec![tap], MAC, MTU).unwrap());
    let counters = device.counters().unwrap();
    let mut guest = Guest::boot(device, EVENT_IDX, 8, 2048);
    for seed in 0..3 {
        guest.send(&frame(100, seed), &[12]);
        assert_eq!(get(&wire), frame(100, seed));
    }
    guest.send(&frame(13, 0), &[12]);
    put(&wire, &frame(3000, 0));
    put(&wire, &frame(200, 0));
    assert_eq!(guest.frame(), numbered(frame(200, 0), 1));
    guest.running.stop();
    let counted = counters.read(2);
    assert_eq!(counted.window, 2);
    let (sent, received) = (counted.sent, counted.received);
    assert_eq!((sent.frames, sent.bytes, sent.lost), (3, 300, 1));
    assert_eq!(
        (received.frames, received.bytes, received.lost),
        (1, 200, 1)
    );
    assert!((1..=4).contains(&sent.notifications), "{sent:?}");
    assert_eq!(received.interrupts, 1);
}

#[test]
fn a_frame_that_is_too_long_for_the_guest_is_dropped() {
    for (features, room) in [(0, 2048), (MERGE, 6 * 256)] {
        let (mut guest, wire) = Guest::wired(features, room as u64 / 256, 256);
        let room = if features == 0 { 256 } else { room };
        put(&wire, &frame(room - HEADER_BYTES + 1, 1));
        put(&wire, &frame(100, 2));
        assert_eq!(guest.frame(), numbered(frame(100, 2), 1));
        guest.running.stop();
    }
}

#[test]
fn a_frame_of_the_guest_that_is_too_long_or_short_is_dropped() {
    let (mut guest, wire) = Guest::wired(EVENT_IDX, 0, 2048);
    guest.send(&frame(65535 + ETHERNET_BYTES + 1, 1), &[12]);
    guest.send(&frame(13, 1), &[12]);
    guest.send(&frame(100, 2), &[12]);
    assert_eq!(get(&wire), frame(100, 2));
}

#[test]
fn frames_wait_until_the_guest_has_buffers() {
    for features in [0, EVENT_IDX, MERGE | EVENT_IDX] {
        let (mut guest, wire) = Guest::wired(features, 0, 2048);
        for seed in 0..8 {
            put(&wire, &frame(1000, seed));
        }
        for slot in 0..3 {
            let at = RECEIVE_AT + slot * 2048;
            guest.receive.offer(&[Buffer::write(at, 2048)]);
        }
        for seed in 0..8 {
            assert_eq!(guest.frame(), numbered(frame(1000, seed), 1));
        }
        guest.running.stop();
    }
}

#[test]
fn a_frame_that_cannot_be_read_does_not_hold_up_those_behind_it() {
    let tap = UdpSocket::bind("127.0.0.1:0").unwrap();
    let wire = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = wire.local_addr().unwrap();
    tap.connect(address).unwrap();
    let device = Box::new(Net::new(vec![tap.try_clone().unwrap().into()], MAC, MTU).unwrap());
    let mut guest = Guest::boot(device, EVENT_IDX, 0, 2048);
    // While the guest has no buffers, the refusal of a datagram becomes an error for the next to
    // read, and frames queue up behind it.
    drop(wire);
    tap.send(b"to nobody").unwrap();
    let wire = UdpSocket::bind(address).unwrap();
    wire.connect(tap.local_addr().unwrap()).unwrap();
    for seed in 0..2 {
        wire.send(&frame(100, seed)).unwrap();
    }
    for slot in 0..2 {
        let at = RECEIVE_AT + slot * 2048;
        guest.receive.offer(&[Buffer::write(at, 2048)]);
    }
    for seed in 0..2 {
        assert_eq!(guest.frame(), numbered(frame(100, seed), 1));
    }
}

#[test]
fn frames_of_the_guest_wait_for_a_full_tap() {
    let (mut guest, wire) = Guest::wired(EVENT_IDX, 0, 2048);
    let count = 2000;
    let reader = std::thread::spawn(move || {
        // The wire holds less than the guest sends before anybody reads.
        std::thread::sleep(std::time::Duration::from_millis(50));
        for seed in 0..count {
            assert!(get(&wire) == frame(1500, seed));
        }
    });
    for seed in 0..count {
        guest.send(&frame(1500, seed), &[12]);
    }
    reader.join().unwrap();
}

#[test]
fn both_directions_run_at_once() {
    for features in [MERGE, MERGE | EVENT_IDX] {
        let (mut guest, wire) = Guest::wired(features, 64, 512);
        let count = 3000;
        let host = wire.try_clone().unwrap();
        let writer = std::thread::spawn(move || {
            for seed in 0..count {
                put(&host, &frame(14 + seed % 1486, seed));
            }
        });
        let reader = std::thread::spawn(move || {
            for seed in 0..count {
                assert!(get(&wire) == frame(14 + seed % 1486, seed));
            }
        });
        for seed in 0..count {
            guest.send(&frame(14 + seed % 1486, seed), &[12]);
            let came = guest.frame();
            assert!(came[HEADER_BYTES..] == frame(14 + seed % 1486, seed)[HEADER_BYTES..]);
        }
        writer.join().unwrap();
        reader.join().unwrap();
        guest.running.stop();
    }
}

#[test]
fn a_malformed_queue_stops_the_device_and_not_the_process() {
    let cases: [fn(&mut Guest); 6] = [
        |guest| guest.transmit.jump(1000),
        |guest| guest.transmit.publish(128),
        |guest| {
            guest.transmit.offer(&[Buffer::read(u64::MAX - 8, 64)]);
        },
        |guest| {
            guest.receive.offer(&[Buffer::write(1 << 40, 64)]);
        },
        |guest| {
            // A buffer that the device may not write.
            guest.receive.offer(&[Buffer::read(RECEIVE_AT, 64)]);
        },
        |guest| {
            // A chain without an end.
            guest.receive.describe(9, Buffer::write(0, 0), 1, 9);
            guest.receive.publish(9);
        },
    ];
    for break_it in cases {
        let (mut guest, wire) = Guest::wired(EVENT_IDX, 0, 2048);
        break_it(&mut guest);
        guest.transmit.kick();
        guest.receive.kick();
        put(&wire, &frame(100, 0));
        guest.line.wait_for_needs_reset();
        let device = guest.running.stop();
        // After a reset it works again.
        let mut guest = Guest::boot(device, EVENT_IDX, 4, 2048);
        guest.send(&frame(100, 1), &[12]);
        assert_eq!(get(&wire), frame(100, 1));
        put(&wire, &frame(100, 2));
        let came = guest.frame();
        // The frame put before is still there, if the broken queue could not take it.
        assert!(came == numbered(frame(100, 0), 1) || came == numbered(frame(100, 2), 1));
        guest.running.stop();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases()))]

    /// Whatever descriptors the guest writes, the process stays, and a reset cures the device.
    #[test]
    fn garbage_does_no_harm(
        descriptors in proptest::collection::vec(
            (0u64..40 << 20, 0u32..1 << 20, 0u16..8, 0u16..140),
            1..64,
        ),
        heads in proptest::collection::vec(0u16..70, 1..40),
        features in prop_oneof![Just(0), Just(EVENT_IDX), Just(MERGE), Just(MERGE | EVENT_IDX)],
    ) {
        let (mut guest, wire) = Guest::wired(features, 0, 2048);
        for (index, (address, length, flags, next)) in descriptors.into_iter().enumerate() {
            // Above the rings, so that the test does not break its own queue.
            let buffer = Buffer::read(address | 0x10_0000, length as usize);
            guest.transmit.describe(index as u16, buffer, flags, next);
            guest.receive.describe(index as u16, buffer, flags, next);
        }
        for (turn, head) in heads.into_iter().enumerate() {
            guest.transmit.publish(head);
            guest.receive.publish(head);
            let _ = send(&wire, &frame(40 + turn, turn), SendFlags::DONTWAIT);
            let mut sink = vec![0; 80 << 10];
            let _ = recv(&wire, &mut sink[..], RecvFlags::DONTWAIT);
        }
        let device = guest.running.stop();
        let mut sink = vec![0; 80 << 10];
        while recv(&wire, &mut sink[..], RecvFlags::DONTWAIT).is_ok() {}
        let mut guest = Guest::boot(device, EVENT_IDX, 0, 2048);
        guest.send(&frame(100, 1), &[12]);
        prop_assert_eq!(get(&wire), frame(100, 1));
        guest.running.stop();
    }
}

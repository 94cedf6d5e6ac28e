//! The running device, driven by a guest's side of its queues over real sockets.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use proptest::prelude::*;

use self::guest::{Guest, RECEIVE_AT, RECEIVE_BYTES, SEND_AT};
use super::connection::BUFFER_BYTES;
use super::packet::{HEADER_BYTES, Header, MAX_PAYLOAD, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use crate::device::virtio::driver::Buffer;

mod guest;

fn pattern(length: usize) -> Vec<u8> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..length).map(|_| next()).collect()
}

/// Reads from the host's end until its end.
fn read_all(mut host: &UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    host.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_dial_that_the_host_answers_is_open() {
    for event_idx in [true, false] {
        let mut guest = Guest::with(true, event_idx, 64);
        let mut host = guest.open(9);
        guest.send(guest.header(9, Op::Data), b"ping");
        let mut bytes = [0; 4];
        host.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"ping");
        host.write_all(b"pong").unwrap();
        let (header, payload) = guest.next_event();
        assert_eq!((header.op, &payload[..]), (Op::Data, &b"pong"[..]));
        guest.stop();
    }
}

#[test]
fn a_dial_is_announced_with_its_port_and_a_new_number() {
    let mut guest = Guest::new();
    guest.say(9, Op::Request);
    guest.say(10, Op::Request);
    let limit = Duration::from_secs(20);
    let first = guest.dials.recv_timeout(limit).unwrap();
    let second = guest.dials.recv_timeout(limit).unwrap();
    assert_eq!((first.1, second.1), (1024, 1024));
    assert_ne!(first.0, second.0);
}

#[test]
fn a_dial_that_the_host_refuses_is_reset() {
    let mut guest = Guest::new();
    guest.say(9, Op::Request);
    let stream = guest.dialled();
    guest.answers.answer(stream, None);
    let (header, _) = guest.next();
    assert_eq!((header.op, header.destination_port), (Op::Reset, 9));
}

#[test]
fn a_dial_without_a_listener_is_reset() {
    let mut guest = Guest::with(false, true, 64);
    guest.say(9, Op::Request);
    assert_eq!(guest.next().0.op, Op::Reset);
}

#[test]
fn a_dial_without_an_answer_is_reset() {
    let mut guest = Guest::new();
    guest.say(9, Op::Request);
    assert_eq!(guest.next().0.op, Op::Reset);
    // An answer that comes too late closes the socket.
    let (host, socket) = UnixStream::pair().unwrap();
    let stream = guest.dialled();
    guest.answers.answer(stream, Some(OwnedFd::from(socket)));
    assert_eq!(read_all(&host), b"");
}

#[test]
fn dials_are_refused_when_the_server_goes() {
    let mut guest = Guest::new();
    let mut host = guest.open(8);
    guest.say(9, Op::Request);
    guest.say(10, Op::Request);
    guest.dialled();
    guest.dialled();
    guest.answers.server_gone();
    let (first, second) = (guest.next().0, guest.next().0);
    assert_eq!((first.op, second.op), (Op::Reset, Op::Reset));
    assert_eq!(first.destination_port + second.destination_port, 19);
    // An open stream does not care.
    host.write_all(b"on").unwrap();
    assert_eq!(guest.next_event().1, b"on");
}

#[test]
fn ten_mebibytes_come_back_from_a_slow_reader() {
    for event_idx in [true, false] {
        let mut guest = Guest::with(true, event_idx, 16);
        let mut host = guest.open(9);
        let echo = std::thread::spawn(move || {
            let mut bytes = [0; 48 << 10];
            let mut turn = 0;
            loop {
                let count = host.read(&mut bytes).unwrap();
                if count == 0 {
                    return;
                }
                turn += 1;
                if turn % 16 == 0 {
                    std::thread::sleep(Duration::from_millis(1));
                }
                host.write_all(&bytes[..count]).unwrap();
            }
        });
        let bytes = pattern(10 << 20);
        let back = guest.exchange(9, &bytes, |came| came.len() == 10 << 20);
        assert!(back == bytes);
        guest.shut(9, SHUTDOWN_SEND);
        assert_eq!(guest.next_event().0.op, Op::Shutdown);
        echo.join().unwrap();
    }
}

#[test]
fn the_guest_is_held_back_when_the_host_does_not_read() {
    let mut guest = Guest::new();
    let mut host = guest.open(9);
    // Until neither the socket nor the buffer takes more.
    let mut sent = 0usize;
    loop {
        let room = guest.credit[&9].room();
        if room > 0 {
            guest.send(guest.header(9, Op::Data), &vec![7; room]);
            sent += room;
        }
        guest.say(9, Op::CreditRequest);
        while guest.next().0.op != Op::CreditUpdate {}
        if guest.credit[&9].room() == 0 {
            break;
        }
    }
    let mut bytes = vec![0; sent];
    host.read_exact(&mut bytes).unwrap();
    while guest.credit[&9].room() < BUFFER_BYTES as usize / 4 {
        assert_eq!(guest.next().0.op, Op::CreditUpdate);
    }
}

#[test]
fn the_host_is_held_back_when_the_guest_has_no_credit() {
    let mut guest = Guest::new();
    guest.say(9, Op::Request);
    let stream = guest.dialled();
    let (mut host, socket) = UnixStream::pair().unwrap();
    guest.answers.answer(stream, Some(OwnedFd::from(socket)));
    assert_eq!(guest.next().0.op, Op::Response);
    let small = |guest: &Guest, buffer| Header {
        buffer,
        ..guest.header(9, Op::CreditUpdate)
    };
    guest.send(small(&guest, 0), &[]);
    host.write_all(b"hello").unwrap();
    // Perhaps the bytes were faster than the news.
    let (header, payload) = guest.next();
    if header.op == Op::Data {
        assert_eq!(payload, b"hello");
        return;
    }
    assert_eq!(header.op, Op::CreditRequest);
    guest.send(small(&guest, 3), &[]);
    let (header, payload) = guest.next();
    assert_eq!((header.op, &payload[..]), (Op::Data, &b"hel"[..]));
    assert_eq!(guest.next().0.op, Op::CreditRequest);
    guest.send(small(&guest, 5), &[]);
    assert_eq!(guest.next().1, b"lo");
}

#[test]
fn the_host_is_served_again_when_the_guest_has_buffers_again() {
    let mut guest = Guest::with(true, true, 2);
    let mut host = guest.open(9);
    host.write_all(&pattern(3 * RECEIVE_BYTES)).unwrap();
    // The guest takes both buffers away and gives them back late.
    let mut kept = Vec::new();
    let mut came = Vec::new();
    while kept.len() < 2 {
        match guest.poll_keep() {
            Some(((_, payload), at)) => {
                came.extend(payload);
                kept.push(at);
            }
            None => guest.line.wait(),
        }
    }
    for at in kept {
        guest.receive.offer(&[Buffer::write(at, RECEIVE_BYTES)]);
    }
    while came.len() < 3 * RECEIVE_BYTES {
        came.extend(guest.next().1);
    }
    assert!(came == pattern(3 * RECEIVE_BYTES));
}

#[test]
fn the_guest_can_end_its_half() {
    let mut guest = Guest::new();
    let mut host = guest.open(9);
    guest.send(guest.header(9, Op::Data), b"last words");
    guest.shut(9, SHUTDOWN_SEND);
    assert_eq!(read_all(&host), b"last words");
    host.write_all(b"an answer").unwrap();
    assert_eq!(guest.next_event().1, b"an answer");
    drop(host);
    while guest.next_event().0.flags & SHUTDOWN_SEND == 0 {}
    guest.shut(9, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    loop {
        let (header, _) = guest.next_event();
        if header.op == Op::Reset {
            break;
        }
        assert_eq!(header.op, Op::Shutdown);
    }
}

#[test]
fn the_host_can_end_its_half() {
    let mut guest = Guest::new();
    let mut host = guest.open(9);
    host.write_all(b"last words").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.next_event().1, b"last words");
    let (header, _) = guest.next_event();
    assert_eq!((header.op, header.flags), (Op::Shutdown, SHUTDOWN_SEND));
    guest.send(guest.header(9, Op::Data), b"an answer");
    let mut bytes = [0; 9];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"an answer");
}

#[test]
fn a_guest_that_stops_reading_stops_the_host() {
    let mut guest = Guest::new();
    let mut host = guest.open(9);
    guest.shut(9, SHUTDOWN_RECEIVE);
    // Its other half still works; and once that byte is here, so is the shutdown.
    guest.send(guest.header(9, Op::Data), b"x");
    host.read_exact(&mut [0]).unwrap();
    let error = host.write_all(b"hello").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
}

#[test]
fn a_closed_stream_still_delivers_what_the_guest_sent() {
    let mut guest = Guest::new();
    let host = guest.open(9);
    let bytes = pattern(BUFFER_BYTES as usize);
    let mut sent = Vec::new();
    // More than the socket holds, so that the device has to keep some.
    for _ in 0..16 {
        let room = guest.credit[&9].room();
        guest.send(guest.header(9, Op::Data), &bytes[..room]);
        sent.extend_from_slice(&bytes[..room]);
        guest.say(9, Op::CreditRequest);
        while guest.next().0.op != Op::CreditUpdate {}
    }
    guest.shut(9, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    assert_eq!(guest.next_event().0.op, Op::Reset);
    // The port is free again.
    let _second = guest.open(9);
    assert!(read_all(&host) == sent);
}

#[test]
fn a_host_that_closes_ends_both_halves() {
    let mut guest = Guest::new();
    let host = guest.open(9);
    drop(host);
    let mut flags = 0;
    while flags != SHUTDOWN_SEND | SHUTDOWN_RECEIVE {
        let (header, _) = guest.next_event();
        assert_eq!(header.op, Op::Shutdown);
        flags = header.flags;
        assert_ne!(flags, SHUTDOWN_SEND, "that is what a host's end looks like");
    }
    // A guest that does not confirm is reset after a while.
    assert_eq!(guest.next_event().0.op, Op::Reset);
}

#[test]
fn a_guest_that_overruns_its_credit_is_reset() {
    let mut guest = Guest::new();
    let host = guest.open(9);
    let bytes = vec![1; MAX_PAYLOAD];
    // Far more than the device and the socket hold.
    for _ in 0..64 {
        guest.send(guest.header(9, Op::Data), &bytes);
    }
    let reset = loop {
        let (header, _) = guest.next();
        if header.op == Op::Reset {
            break header;
        }
    };
    assert_eq!(reset.destination_port, 9);
    // The host sees the end after what the socket held.
    read_all(&host);
}

#[test]
fn a_second_request_resets_the_stream() {
    let mut guest = Guest::new();
    let host = guest.open(9);
    guest.say(9, Op::Request);
    assert_eq!(guest.next_event().0.op, Op::Reset);
    assert_eq!(read_all(&host), b"");
}

#[test]
fn packets_of_no_stream_are_reset_and_strangers_ignored() {
    let mut guest = Guest::new();
    for op in [Op::Response, Op::Data, Op::Shutdown, Op::Unknown(99)] {
        guest.say(77, op);
        let (header, _) = guest.next();
        assert_eq!((header.op, header.destination_port), (Op::Reset, 77));
    }
    let request = guest.header(5, Op::Request);
    // Neither of these is answered ...
    guest.say(77, Op::Reset);
    let stranger = |header| Header {
        source_cid: 4,
        ..header
    };
    guest.send(stranger(request), &[]);
    let elsewhere = Header {
        destination_cid: 1,
        ..request
    };
    guest.send(elsewhere, &[]);
    // ... but a socket type that is not served is.
    guest.send(Header { kind: 2, ..request }, &[]);
    let (header, _) = guest.next();
    assert_eq!((header.op, header.kind), (Op::Reset, 2));
    assert_eq!(guest.dials.try_recv().ok(), None);
}

#[test]
fn a_header_that_promises_too_much_resets_the_stream() {
    for length in [11, u32::MAX, MAX_PAYLOAD as u32 + 1] {
        let mut guest = Guest::new();
        let _host = guest.open(9);
        let header = Header {
            length,
            ..guest.header(9, Op::Data)
        };
        guest.send_raw(&header.encode(), b"ten bytes.");
        assert_eq!(guest.next_event().0.op, Op::Reset);
    }
}

#[test]
fn streams_are_limited() {
    let mut guest = Guest::new();
    let mut hosts = Vec::new();
    for port in 0..super::streams::MAX_STREAMS as u32 {
        hosts.push(guest.open(port));
    }
    guest.say(5000, Op::Request);
    let (header, _) = guest.next();
    assert_eq!((header.op, header.destination_port), (Op::Reset, 5000));
    // One that ends makes room.
    guest.say(0, Op::Reset);
    hosts.push(guest.open(5000));
}

#[test]
fn dials_that_wait_are_limited() {
    let mut guest = Guest::new();
    for port in 0..=super::streams::MAX_DIALS as u32 {
        guest.say(port, Op::Request);
    }
    let (header, _) = guest.next();
    assert_eq!(header.op, Op::Reset);
    assert_eq!(header.destination_port, super::streams::MAX_DIALS as u32);
}

#[test]
fn a_device_can_be_stopped_and_started_again() {
    let mut guest = Guest::new();
    let host = guest.open(9);
    guest.say(10, Op::Request);
    let before = guest.dialled();
    let (device, answers, dials) = guest.stop();
    assert_eq!(read_all(&host), b"");
    answers.answer(before, None);
    let mut guest = Guest::boot(device, answers, dials, true);
    guest
        .receive
        .offer(&[Buffer::write(RECEIVE_AT, RECEIVE_BYTES)]);
    guest.say(10, Op::Request);
    let after = guest.dialled();
    assert!(after > before);
    guest.answers.answer(after, None);
    assert_eq!(guest.next().0.op, Op::Reset);
}

#[test]
fn a_malformed_queue_stops_the_device_and_not_the_process() {
    let cases: [fn(&mut Guest); 5] = [
        // More entries than the queue has.
        |guest| guest.transmit.jump(1000),
        // A head that is no descriptor.
        |guest| guest.transmit.publish(64),
        // A buffer outside of the memory.
        |guest| {
            guest
                .transmit
                .offer(&[Buffer::read(u64::MAX - 8, HEADER_BYTES)]);
        },
        // A chain without an end and without a header.
        |guest| {
            guest.transmit.describe(63, Buffer::read(0, 0), 1, 63);
            guest.transmit.publish(63);
        },
        // A packet too short for a header.
        |guest| {
            guest.transmit.offer(&[Buffer::read(SEND_AT, 43)]);
        },
    ];
    for break_it in cases {
        let mut guest = Guest::new();
        let host = guest.open(9);
        break_it(&mut guest);
        guest.transmit.kick();
        guest.line.wait_for_needs_reset();
        assert_eq!(read_all(&host), b"");
        let (device, answers, dials) = guest.stop();
        // After a reset it works again.
        let mut guest = Guest::boot(device, answers, dials, true);
        guest
            .receive
            .offer(&[Buffer::write(RECEIVE_AT, RECEIVE_BYTES)]);
        guest.open(9);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever bytes the guest sends, the device stays and serves the next stream.
    #[test]
    fn garbage_does_no_harm(
        packets in proptest::collection::vec(
            (
                proptest::collection::vec(any::<u8>(), HEADER_BYTES..200),
                proptest::option::of((0u16..9, 0u32..3)),
            ),
            1..40,
        )
    ) {
        let mut guest = Guest::new();
        let _host = guest.open(1);
        for (mut bytes, plausible) in packets {
            if let Some((op, port)) = plausible {
                let mut header = guest.header(port, Op::from(op));
                header.length = u32::from(bytes[0]);
                header.flags = u32::from(bytes[1]);
                header.buffer = u32::from(bytes[2]) << 20;
                header.forwarded = u32::from(bytes[3]) << 24;
                bytes[..HEADER_BYTES].copy_from_slice(&header.encode());
            }
            guest.send_raw(&bytes, &[]);
            while guest.poll().is_some() {}
        }
        guest.say(999, Op::Request);
        loop {
            match guest.dials.recv_timeout(Duration::from_millis(1)) {
                Ok((stream, _)) => guest.answers.answer(stream, None),
                Err(RecvTimeoutError::Timeout) => {}
                Err(error) => panic!("{error}"),
            }
            match guest.poll() {
                Some((header, _)) if header.destination_port == 999 => {
                    prop_assert_eq!(header.op, Op::Reset);
                    break;
                }
                _ => {}
            }
        }
        guest.stop();
    }
}

//! The state machine alone.

use proptest::prelude::*;

use super::*;

const CID: u32 = 3;

fn packet(op: Op) -> Header {
    Header {
        source_cid: u64::from(CID),
        destination_cid: HOST_CID,
        source_port: 9,
        destination_port: 1024,
        length: 0,
        kind: TYPE_STREAM,
        op,
        flags: 0,
        buffer: 1000,
        forwarded: 0,
    }
}

fn shutdown(flags: u32) -> Header {
    Header {
        flags,
        ..packet(Op::Shutdown)
    }
}

fn open() -> Connection {
    let mut connection = Connection::dialled(CID, &packet(Op::Request));
    connection.accept();
    assert_eq!(ops(&mut connection), [Op::Response]);
    connection
}

/// Everything that the connection has to say now.
fn ops(connection: &mut Connection) -> Vec<Op> {
    std::iter::from_fn(|| connection.control())
        .map(|header| header.op)
        .collect()
}

#[test]
fn nothing_is_said_before_the_host_answers() {
    let mut connection = Connection::dialled(CID, &packet(Op::Request));
    assert_eq!(ops(&mut connection), []);
    assert_eq!(connection.room(), 0);
    assert_eq!(connection.limit(), Some(DIAL_LIMIT));
    connection.expire();
    assert_eq!(ops(&mut connection), [Op::Reset]);
    assert!(connection.is_gone());
}

#[test]
fn a_guest_that_gives_up_its_dial_is_forgotten() {
    let mut connection = Connection::dialled(CID, &packet(Op::Request));
    connection.receive(&packet(Op::Reset), &[]);
    assert!(connection.is_gone());
    connection.accept();
    assert_eq!(ops(&mut connection), []);
}

#[test]
fn data_before_the_answer_is_a_violation() {
    let mut connection = Connection::dialled(CID, &packet(Op::Request));
    connection.receive(&packet(Op::Data), b"early");
    assert_eq!(ops(&mut connection), [Op::Reset]);
}

#[test]
fn every_packet_tells_the_credit() {
    let mut connection = open();
    connection.receive(&packet(Op::Data), b"12345");
    connection.forward(5);
    let header = connection.data(1);
    assert_eq!((header.buffer, header.forwarded), (BUFFER_BYTES, 5));
}

#[test]
fn credit_is_told_when_enough_has_left_the_buffer() {
    let mut connection = open();
    connection.receive(&packet(Op::Data), &[0; TELL_AFTER as usize]);
    connection.forward(TELL_AFTER as usize - 1);
    assert_eq!(ops(&mut connection), []);
    connection.forward(1);
    assert_eq!(ops(&mut connection), [Op::CreditUpdate]);
    connection.receive(&packet(Op::CreditRequest), &[]);
    assert_eq!(ops(&mut connection), [Op::CreditUpdate]);
}

#[test]
fn one_byte_more_than_the_credit_is_a_violation() {
    let mut connection = open();
    connection.receive(&packet(Op::Data), &[0; BUFFER_BYTES as usize]);
    assert_eq!(connection.outgoing().0.len(), BUFFER_BYTES as usize);
    connection.receive(&packet(Op::Data), &[0]);
    assert!(!connection.has_host());
    assert_eq!(ops(&mut connection), [Op::Reset]);
}

#[test]
fn the_guest_is_asked_once_for_credit() {
    let mut connection = open();
    assert_eq!(connection.room(), 1000);
    connection.data(1000);
    assert_eq!(connection.room(), 0);
    connection.starve();
    connection.starve();
    assert_eq!(ops(&mut connection), [Op::CreditRequest]);
    connection.starve();
    assert_eq!(ops(&mut connection), []);
    let forwarded = 400;
    connection.receive(
        &Header {
            forwarded,
            ..packet(Op::CreditUpdate)
        },
        &[],
    );
    assert_eq!(connection.room(), 400);
}

#[test]
fn credit_counters_wrap() {
    let mut connection = open();
    for _ in 0..70_000 {
        let forwarded = connection.sent.0;
        connection.receive(
            &Header {
                forwarded,
                buffer: 1 << 20,
                ..packet(Op::CreditUpdate)
            },
            &[],
        );
        assert_eq!(connection.room(), MAX_PAYLOAD);
        connection.data(MAX_PAYLOAD);
    }
    assert_eq!(connection.sent.0, (70_000u64 << 16) as u32);
}

#[test]
fn credit_that_makes_no_sense_is_none() {
    let mut connection = open();
    let forwarded = 1;
    connection.receive(
        &Header {
            forwarded,
            ..packet(Op::CreditUpdate)
        },
        &[],
    );
    assert_eq!(connection.room(), 0);
}

#[test]
fn a_half_close_of_the_guest_reaches_the_socket_after_its_bytes() {
    let mut connection = open();
    connection.receive(&packet(Op::Data), b"last");
    connection.receive(&shutdown(SHUTDOWN_SEND), &[]);
    assert!(!connection.socket_shutdown().write);
    connection.forward(4);
    assert!(connection.socket_shutdown().write);
    assert!(!connection.socket_shutdown().write);
    assert!(connection.room() > 0);
    connection.receive(&packet(Op::Data), b"more");
    assert_eq!(ops(&mut connection), [Op::Reset]);
}

#[test]
fn a_half_close_of_the_host_leaves_the_other_half() {
    let mut connection = open();
    connection.host_ends();
    let header = connection.control().unwrap();
    assert_eq!((header.op, header.flags), (Op::Shutdown, SHUTDOWN_SEND));
    assert_eq!(connection.room(), 0);
    assert_eq!(connection.limit(), None);
    connection.receive(&packet(Op::Data), b"still here");
    assert_eq!(connection.outgoing().0, b"still here");
    connection.host_goes_deaf();
    let header = connection.control().unwrap();
    assert_eq!(header.flags, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    assert_eq!(connection.limit(), Some(CLOSE_LIMIT));
    connection.receive(&packet(Op::Reset), &[]);
    assert!(connection.is_gone());
}

#[test]
fn a_full_close_of_the_guest_is_confirmed_and_its_bytes_kept() {
    let mut connection = open();
    connection.receive(&packet(Op::Data), b"last");
    connection.receive(&shutdown(SHUTDOWN_RECEIVE), &[]);
    assert!(connection.socket_shutdown().read);
    connection.receive(&shutdown(SHUTDOWN_SEND), &[]);
    assert_eq!(ops(&mut connection), [Op::Reset]);
    assert!(!connection.has_guest() && connection.has_host());
    assert_eq!(connection.limit(), Some(DRAIN_LIMIT));
    connection.forward(4);
    assert!(connection.is_gone());
}

#[test]
fn bytes_of_a_closed_connection_do_not_wait_for_ever() {
    let mut connection = open();
    connection.receive(&packet(Op::Data), b"last");
    connection.receive(&shutdown(SHUTDOWN_SEND | SHUTDOWN_RECEIVE), &[]);
    assert_eq!(ops(&mut connection), [Op::Reset]);
    connection.expire();
    assert!(connection.is_gone());
}

#[test]
fn a_reset_of_the_guest_drops_its_bytes() {
    let mut connection = open();
    connection.receive(&packet(Op::Data), b"lost");
    connection.receive(&packet(Op::Reset), &[]);
    assert!(connection.is_gone());
    assert_eq!(connection.outgoing().0, b"");
}

#[test]
fn bytes_for_a_host_that_is_gone_are_dropped_and_credited() {
    let mut connection = open();
    connection.receive(&packet(Op::Data), &[0; 100]);
    connection.host_goes_deaf();
    connection.receive(&packet(Op::Data), &[0; BUFFER_BYTES as usize]);
    let header = connection.control().unwrap();
    assert_eq!((header.op, header.flags), (Op::Shutdown, SHUTDOWN_RECEIVE));
    assert_eq!(header.forwarded, 100 + BUFFER_BYTES);
}

#[derive(Debug, Clone)]
enum Event {
    Packet(u16, u32, u32, u32, usize),
    Accept,
    Forward(usize),
    Ends,
    Deaf,
    Starve,
    Read,
    Say,
    Expire,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => (2u16..9, 0u32..4, prop_oneof![Just(0), Just(1000), any::<u32>()], any::<u32>(), 0usize..70_000)
            .prop_map(|(op, flags, buffer, forwarded, length)| {
                Event::Packet(op, flags, buffer, forwarded, length)
            }),
        4 => (0u32..3, 0usize..20_000)
            .prop_map(|(flags, length)| Event::Packet(5, flags, 1 << 18, 0, length)),
        2 => Just(Event::Accept),
        4 => (0usize..30_000).prop_map(Event::Forward),
        1 => Just(Event::Ends),
        1 => Just(Event::Deaf),
        2 => Just(Event::Starve),
        4 => Just(Event::Read),
        4 => Just(Event::Say),
        1 => Just(Event::Expire),
    ]
}

proptest! {
    /// Whatever happens in whatever order: what is held is bounded, the guest is never sent more
    /// than it has room for, bytes come out in the order they came in, and after the reset there
    /// is silence.
    #[test]
    fn no_order_of_events_breaks_the_rules(events in proptest::collection::vec(event(), 1..80)) {
        let mut connection = Connection::dialled(CID, &packet(Op::Request));
        let mut over = false;
        let (mut taken, mut left) = (0u8, 0u8);
        for event in events {
            let sent = connection.sent;
            match event {
                Event::Packet(op, flags, buffer, forwarded, length) => {
                    let before = connection.buffer.len();
                    let payload: Vec<u8> = (0..length)
                        .map(|at| taken.wrapping_add(at as u8))
                        .collect();
                    let header = Header { flags, buffer, forwarded, ..packet(Op::from(op)) };
                    connection.receive(&header, &payload);
                    if connection.buffer.len() > before {
                        prop_assert_eq!(connection.buffer.len(), before + length);
                        taken = taken.wrapping_add(length as u8);
                    }
                }
                Event::Accept => connection.accept(),
                Event::Forward(count) => {
                    let first = connection.outgoing().0;
                    let count = count.min(first.len());
                    for byte in &first[..count] {
                        prop_assert_eq!(*byte, left);
                        left = left.wrapping_add(1);
                    }
                    connection.forward(count);
                }
                Event::Ends => connection.host_ends(),
                Event::Deaf => connection.host_goes_deaf(),
                Event::Starve => connection.starve(),
                Event::Read => {
                    let room = connection.room();
                    if room > 0 {
                        prop_assert!(!over);
                        let header = connection.data(room);
                        prop_assert!(header.length as usize <= MAX_PAYLOAD);
                        let in_flight = connection.sent - connection.guest_forwarded;
                        prop_assert!(in_flight.0 <= connection.guest_buffer);
                    }
                }
                Event::Say => {
                    prop_assert_eq!(connection.has_control(), {
                        let said = connection.control();
                        if let Some(header) = said {
                            prop_assert!(!over, "{:?} after the reset", header.op);
                            prop_assert_eq!(header.forwarded, connection.forwarded.0);
                            over |= header.op == Op::Reset;
                        }
                        said.is_some()
                    });
                }
                Event::Expire => connection.expire(),
            }
            if !matches!(event, Event::Read) {
                prop_assert_eq!(connection.sent, sent);
            }
            if connection.buffer.is_empty() {
                // Bytes of a connection that was reset are dropped.
                left = taken;
            }
            prop_assert!(connection.buffer.len() <= BUFFER_BYTES as usize);
            prop_assert!(connection.has_guest() || connection.room() == 0);
            prop_assert!(!connection.is_gone() || !connection.has_host());
        }
    }

    /// A guest that keeps to its credit is never stuck: when all its bytes have left the buffer,
    /// it knows of room.
    #[test]
    fn a_guest_with_something_to_send_gets_credit(
        sizes in proptest::collection::vec(1usize..70_000, 1..60),
        takes in proptest::collection::vec(1usize..70_000, 1..60),
    ) {
        let mut connection = open();
        let (mut sent, mut forwarded) = (0u32, 0u32);
        for (size, take) in sizes.into_iter().zip(takes.into_iter().cycle()) {
            let room = BUFFER_BYTES - (sent - forwarded);
            let length = size.min(room as usize);
            connection.receive(&packet(Op::Data), &vec![0; length]);
            sent += length as u32;
            connection.forward(take);
            if room as usize == length {
                connection.forward(BUFFER_BYTES as usize);
            }
            while let Some(header) = connection.control() {
                prop_assert_eq!(header.op, Op::CreditUpdate);
                forwarded = header.forwarded;
            }
            prop_assert!(sent - forwarded < BUFFER_BYTES);
        }
    }
}

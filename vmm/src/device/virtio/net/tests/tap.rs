//! The device on a real tap, in a network namespace of its own. Needs root and `/dev/net/tun`; is
//! skipped without them.

use std::os::fd::OwnedFd;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MQ,
};
use vm_memory::{Bytes, GuestAddress};

use super::{EVENT_IDX, Guest, HEADER_BYTES, MAC, MERGE, MTU, RECEIVE_AT, SEND_AT, cases};
use crate::device::virtio::driver::{self, Buffer, Driver, Line, QUEUE_BYTES};
use crate::device::virtio::net::Net;
use crate::device::virtio::{Active, Device, Memory, Running};

const SEVERAL: u64 = 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ;

/// An Ethernet frame of a protocol that nobody speaks.
fn ethernet(to: [u8; 6], seed: u8) -> Vec<u8> {
    let mut frame = to.to_vec();
    frame.extend([2, 0, 0, 0, 0, 2, 0x88, 0xb5]);
    frame.extend((0..1000u16).map(|at| at as u8 ^ seed));
    frame
}

#[test]
fn frames_pass_a_real_tap_both_ways() {
    let Some((taps, wire)) = sys::tap(HEADER_BYTES as i32, 1) else {
        eprintln!("skipped: no tap can be made here");
        return;
    };
    let device = Net::new(taps, MAC, MTU).unwrap();
    let offload = 1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_GUEST_CSUM;
    assert_eq!(device.features() & offload, offload);
    let features = MERGE | EVENT_IDX | offload;
    let mut guest = Guest::boot(Box::new(device), features, 64, 1536);
    for seed in 0..20 {
        let sent = ethernet([2, 0, 0, 0, 0, 3], seed);
        let with_header = [vec![0; HEADER_BYTES], sent.clone()].concat();
        guest.send(&with_header, &[12]);
        let mut bytes = [0; 2048];
        let came = loop {
            let (count, _) = recv(&wire, &mut bytes[..], RecvFlags::empty()).unwrap();
            // The kernel itself may speak on a new interface.
            if bytes[12..14] == sent[12..14] {
                break &bytes[..count];
            }
        };
        assert_eq!(came, sent);

        let sent = ethernet(MAC, seed);
        loop {
            match send(&wire, &sent, SendFlags::empty()) {
                Err(Errno::NOBUFS) => {}
                result => break assert_eq!(result, Ok(sent.len())),
            }
        }
        let came = loop {
            let frame = guest.frame();
            if frame[HEADER_BYTES..HEADER_BYTES + 6] == MAC {
                break frame;
            }
        };
        assert_eq!(came[HEADER_BYTES..], sent);
        assert_eq!(came[10..12], [1, 0]);
    }
    guest.running.stop();
}

#[test]
fn a_tap_with_another_header_is_refused() {
    let Some((taps, _wire)) = sys::tap(10, 1) else {
        eprintln!("skipped: no tap can be made here");
        return;
    };
    let error = Net::new(taps, MAC, MTU).err().unwrap();
    assert!(error.to_string().contains("10 bytes"), "{error}");
}

/// Types of segmentation of the header, and that its checksum is to be made (virtio 1.2 §5.1.6).
const TCP4: u8 = 1;
const TCP6: u8 = 4;
const ECN: u8 = 0x80;
const NEEDS_CSUM: u8 = 1;

/// A TCP segment of 10,000 bytes to be cut into pieces, with its header; IP of this version.
fn segment(version: u8, kind: u8) -> Vec<u8> {
    const PAYLOAD: usize = 10_000;
    let (protocol, network) = match version {
        4 => ([0x08, 0x00], 20),
        _ => ([0x86, 0xdd], 40),
    };
    let headers = 14 + network + 20;
    let mut frame = vec![0; HEADER_BYTES + headers + PAYLOAD];
    let number = |value: usize| (value as u16).to_le_bytes();
    frame[..2].copy_from_slice(&[NEEDS_CSUM, kind]);
    // hdr_len, gso_size, csum_start, csum_offset
    for (at, value) in [(2, headers), (4, 1400), (6, 14 + network), (8, 16)] {
        frame[at..at + 2].copy_from_slice(&number(value));
    }
    let ethernet = &mut frame[HEADER_BYTES..];
    ethernet[..6].copy_from_slice(&[2, 0, 0, 0, 0, 3]);
    ethernet[6..12].copy_from_slice(&MAC);
    ethernet[12..14].copy_from_slice(&protocol);
    let ip = &mut ethernet[14..];
    match version {
        4 => {
            ip[0] = 0x45;
            ip[2..4].copy_from_slice(&((40 + PAYLOAD) as u16).to_be_bytes());
            (ip[8], ip[9]) = (64, 6);
        }
        _ => {
            ip[0] = 0x60;
            ip[4..6].copy_from_slice(&((20 + PAYLOAD) as u16).to_be_bytes());
            (ip[6], ip[7]) = (6, 64);
        }
    }
    let tcp = &mut ip[network..];
    // The length of its header; ACK, and with ECN that the window was made smaller (CWR).
    (tcp[12], tcp[13]) = (5 << 4, if kind & ECN != 0 { 0x90 } else { 0x10 });
    frame
}

#[test]
fn segments_of_both_families_leave_whole() {
    let Some((taps, wire)) = sys::tap(HEADER_BYTES as i32, 1) else {
        eprintln!("skipped: no tap can be made here");
        return;
    };
    let device = Net::new(taps, MAC, MTU).unwrap();
    let features = device.features();
    let mut guest = Guest::boot(Box::new(device), features, 0, 2048);
    for (version, kind) in [(4, TCP4), (4, TCP4 | ECN), (6, TCP6), (6, TCP6 | ECN)] {
        let sent = segment(version, kind);
        guest.send(&sent, &[12]);
        let mut bytes = vec![0; 16 << 10];
        let came = loop {
            let (count, _) = recv(&wire, &mut bytes[..], RecvFlags::empty()).unwrap();
            // The kernel itself may speak on a new interface.
            if bytes[..6] == sent[HEADER_BYTES..][..6] {
                break &bytes[..count];
            }
        };
        assert!(
            came == &sent[HEADER_BYTES..],
            "{} bytes of {kind:#x}",
            came.len()
        );
    }
    guest.running.stop();
}

/// Frames of any length with any header: the kernel refuses what makes no sense, and goes on.
#[test]
fn headers_that_make_no_sense_do_no_harm() {
    let Some((taps, wire)) = sys::tap(HEADER_BYTES as i32, 1) else {
        eprintln!("skipped: no tap can be made here");
        return;
    };
    let device = Box::new(Net::new(taps, MAC, MTU).unwrap());
    let features = device.features();
    let counters = device.counters().unwrap();
    let mut guest = Guest::boot(device, features, 64, 1536);
    let mut runner = TestRunner::deterministic();
    let header = proptest::collection::vec(
        prop_oneof![
            Just(0),
            Just(1),
            Just(4),
            Just(0x81),
            Just(0xff),
            any::<u8>()
        ],
        HEADER_BYTES,
    );
    let frames = (
        header,
        prop_oneof![0usize..100, 0usize..2000, 0usize..66_000],
        any::<u8>(),
        prop_oneof![Just(None), Just(Some(4)), Just(Some(6))],
    );
    for _ in 0..cases() {
        let (header, length, seed, version) = frames.new_tree(&mut runner).unwrap().current();
        let mut frame: Vec<u8> = (0..length).map(|at| at as u8 ^ seed).collect();
        if let Some(version) = version {
            let pattern = segment(version, TCP4);
            let part = length.min(pattern.len() - HEADER_BYTES);
            frame[..part].copy_from_slice(&pattern[HEADER_BYTES..][..part]);
        }
        guest.send(&[header, frame].concat(), &[12]);
        let mut sink = vec![0; 80 << 10];
        while recv(&wire, &mut sink[..], RecvFlags::DONTWAIT).is_ok() {}
        while guest.receive.used().is_some() {}
    }
    let mark = ethernet([2, 0, 0, 0, 0, 3], 9);
    guest.send(&[vec![0; HEADER_BYTES], mark.clone()].concat(), &[12]);
    let mut bytes = vec![0; 80 << 10];
    loop {
        let (count, _) = recv(&wire, &mut bytes[..], RecvFlags::empty()).unwrap();
        if bytes[..count] == mark {
            break;
        }
    }
    guest.running.stop();
    let sent = counters.read(0).sent;
    assert!(sent.frames > 0 && sent.lost > 0, "{sent:?}");
}

/// A UDP datagram, of a flow of its own for each `port`.
fn datagram(port: u8) -> Vec<u8> {
    let mut frame = MAC.to_vec();
    frame.extend([2, 0, 0, 0, 0, 2, 8, 0]);
    frame.extend([
        0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ]);
    frame.extend([4, port, 4, 0, 0, 8, 0, 0]);
    frame
}

/// A guest with two pairs of queues and the control queue.
struct Several {
    memory: Memory,
    receive: [Driver; 2],
    transmit: [Driver; 2],
    control: Driver,
    line: Line,
    running: Box<dyn Running>,
}

impl Several {
    fn boot(device: Box<Net>) -> Self {
        let memory = driver::memory(32 << 20);
        let queue = |number: u64| Driver::new(&memory, number * QUEUE_BYTES, 128, true);
        let mut receive = [queue(0), queue(2)];
        let (transmit, control) = ([queue(1), queue(3)], queue(4));
        for (pair, driver) in (0..).zip(&mut receive) {
            for slot in 0..128 {
                let at = RECEIVE_AT + (pair * 128 + slot) * 2048;
                driver.offer(&[Buffer::write(at, 2048)]);
            }
        }
        let (interrupt, line) = driver::interrupt();
        let queues = [
            &receive[0],
            &transmit[0],
            &receive[1],
            &transmit[1],
            &control,
        ];
        let active = Active {
            memory: memory.clone(),
            queues: queues.map(Driver::activate).into(),
            interrupt,
            features: EVENT_IDX | SEVERAL,
        };
        let running = device.start(active).unwrap();
        Self {
            memory,
            receive,
            transmit,
            control,
            line,
            running,
        }
    }

    /// Asks for so many pairs; the device's answer.
    fn ask(&mut self, class: u8, pairs: u16) -> u8 {
        let [low, high] = pairs.to_le_bytes();
        let at = GuestAddress(SEND_AT);
        self.memory
            .write_slice(&[class, 0, low, high, 0xff], at)
            .unwrap();
        let command = [Buffer::read(SEND_AT, 2), Buffer::read(SEND_AT + 2, 2)];
        let answer = Buffer::write(SEND_AT + 4, 1);
        self.control.offer(&[command[0], command[1], answer]);
        while self.control.used().is_none() {
            self.line.wait();
        }
        self.memory.read_obj(GuestAddress(SEND_AT + 4)).unwrap()
    }

    /// How many of 64 flows come by each pair.
    fn arrivals(&mut self, wire: &OwnedFd) -> [usize; 2] {
        for port in 0..64 {
            while send(wire, &datagram(port), SendFlags::empty()) == Err(Errno::NOBUFS) {}
        }
        let mut came = [0; 2];
        while came[0] + came[1] < 64 {
            let mut quiet = true;
            for (driver, came) in self.receive.iter_mut().zip(&mut came) {
                while let Some((at, _)) = driver.used() {
                    quiet = false;
                    let kind = GuestAddress(at + HEADER_BYTES as u64 + 12);
                    // The kernel itself may speak on a new interface.
                    *came += usize::from(self.memory.read_obj::<[u8; 2]>(kind).unwrap() == [8, 0]);
                }
            }
            if quiet {
                self.line.wait();
            }
        }
        came
    }
}

#[test]
fn the_guest_uses_as_many_pairs_of_queues_as_it_asks_for() {
    let Some((taps, wire)) = sys::tap(HEADER_BYTES as i32, 2) else {
        eprintln!("skipped: no tap can be made here");
        return;
    };
    let device = Net::new(taps, MAC, MTU).unwrap();
    assert_eq!(device.features() & SEVERAL, SEVERAL);
    assert_eq!(device.queue_sizes().len(), 5);
    assert_eq!(device.config()[8..10], [2, 0]);
    let mut guest = Several::boot(Box::new(device));
    assert_eq!(guest.arrivals(&wire), [64, 0]);
    for (class, pairs) in [(4, 0), (4, 3), (3, 2)] {
        assert_eq!(guest.ask(class, pairs), 1, "class {class}, {pairs} pairs");
    }
    assert_eq!(guest.ask(4, 2), 0);
    let [first, second] = guest.arrivals(&wire);
    assert!(first > 0 && second > 0, "{first} and {second}");
    let sent = ethernet([2, 0, 0, 0, 0, 3], 1);
    let with_header = [vec![0; HEADER_BYTES], sent.clone()].concat();
    let at = GuestAddress(SEND_AT);
    guest.memory.write_slice(&with_header, at).unwrap();
    guest.transmit[1].offer(&[Buffer::read(SEND_AT, with_header.len())]);
    let mut bytes = [0; 2048];
    let came = loop {
        let (count, _) = recv(&wire, &mut bytes[..], RecvFlags::empty()).unwrap();
        if bytes[12..14] == sent[12..14] {
            break &bytes[..count];
        }
    };
    assert_eq!(came, sent);
    guest.running.stop();
}

mod sys {
    #![allow(unsafe_code)]
    use std::os::fd::{AsRawFd, FromRawFd};

    use super::OwnedFd;

    /// The queues of a tap and a packet socket on its interface, in a new network namespace of this
    /// thread.
    pub fn tap(header_bytes: libc::c_int, queues: usize) -> Option<(Vec<OwnedFd>, OwnedFd)> {
        let owned = |fd: libc::c_int| {
            // SAFETY: the descriptor was just made and belongs to nobody else.
            (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
        };
        // SAFETY: plain calls of the kernel; every address is that of a live value of the type
        // that the call documents.
        unsafe {
            if libc::unshare(libc::CLONE_NEWNET) != 0 {
                return None;
            }
            let mut taps = Vec::new();
            let mut request: libc::ifreq = std::mem::zeroed();
            for (to, from) in request.ifr_name.iter_mut().zip(b"tap0") {
                *to = *from as libc::c_char;
            }
            let several = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
            let kind = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several;
            for _ in 0..queues {
                let tap = owned(libc::open(c"/dev/net/tun".as_ptr(), libc::O_RDWR))?;
                request.ifr_ifru.ifru_flags = kind as libc::c_short;
                if libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) != 0 {
                    return None;
                }
                let size = &raw const header_bytes;
                assert_eq!(libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, size), 0);
                taps.push(tap);
            }
            let all = libc::c_int::from((libc::ETH_P_ALL as u16).to_be());
            let wire = owned(libc::socket(libc::AF_PACKET, libc::SOCK_RAW, all))?;
            request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
            assert_eq!(
                libc::ioctl(wire.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request),
                0
            );
            assert_eq!(
                libc::ioctl(wire.as_raw_fd(), libc::SIOCGIFINDEX, &raw mut request),
                0
            );
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
            address.sll_ifindex = request.ifr_ifru.ifru_ifindex;
            let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            let bound = libc::bind(wire.as_raw_fd(), (&raw const address).cast(), length);
            assert_eq!(bound, 0);
            Some((taps, wire))
        }
    }
}

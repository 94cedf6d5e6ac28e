//! The device on a real tap, in a network namespace of its own. Needs root and `/dev/net/tun`; is
//! skipped without them.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM};

use super::{EVENT_IDX, Guest, HEADER_BYTES, MAC, MERGE, MTU};
use crate::device::virtio::Device;
use crate::device::virtio::net::Net;

/// An Ethernet frame of a protocol that nobody speaks.
fn ethernet(to: [u8; 6], seed: u8) -> Vec<u8> {
    let mut frame = to.to_vec();
    frame.extend([2, 0, 0, 0, 0, 2, 0x88, 0xb5]);
    frame.extend((0..1000u16).map(|at| at as u8 ^ seed));
    frame
}

#[test]
fn frames_pass_a_real_tap_both_ways() {
    let Some((tap, wire)) = sys::tap(HEADER_BYTES as i32) else {
        eprintln!("skipped: no tap can be made here");
        return;
    };
    let device = Net::new(tap, MAC, MTU).unwrap();
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
    let Some((tap, _wire)) = sys::tap(10) else {
        eprintln!("skipped: no tap can be made here");
        return;
    };
    let error = Net::new(tap, MAC, MTU).err().unwrap();
    assert!(error.to_string().contains("10 bytes"), "{error}");
}

mod sys {
    #![allow(unsafe_code)]
    use std::os::fd::{AsRawFd, FromRawFd};

    use super::OwnedFd;

    /// A tap and a packet socket on its interface, in a new network namespace of this thread.
    pub fn tap(header_bytes: libc::c_int) -> Option<(OwnedFd, OwnedFd)> {
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
            let tap = owned(libc::open(c"/dev/net/tun".as_ptr(), libc::O_RDWR))?;
            let mut request: libc::ifreq = std::mem::zeroed();
            for (to, from) in request.ifr_name.iter_mut().zip(b"tap0") {
                *to = *from as libc::c_char;
            }
            let kind = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
            request.ifr_ifru.ifru_flags = kind as libc::c_short;
            if libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) != 0 {
                return None;
            }
            let size = &raw const header_bytes;
            assert_eq!(libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, size), 0);
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
            Some((tap, wire))
        }
    }
}

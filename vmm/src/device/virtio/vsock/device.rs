//! The device as the transport sees it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Announce;
use super::streams::Streams;
use super::worker::Worker;
use crate::device::virtio::thread::{Poll, Thread};
use crate::device::virtio::{Active, Device, Running, StartError};

/// Entries of the receive, transmit and event queues. The guest fills the receive queue with
/// buffers of about 4 KiB, so its size is guest memory.
const QUEUE_SIZES: [u16; 3] = [128, 128, 16];

/// What the host has to say to the device.
pub(super) enum Message {
    /// The answer to a dial.
    Answer(u64, Option<OwnedFd>),
    /// Nobody will answer the dials made so far.
    ServerGone,
}

/// A vsock device that is not running.
pub struct Vsock {
    pub(super) streams: Streams,
    pub(super) inbox: Receiver<Message>,
    pub(super) bell: Arc<EventFd>,
    config: [u8; 8],
}

/// The way answers to dials take to the device. Clones share it.
#[derive(Clone)]
pub struct Answers {
    outbox: Sender<Message>,
    bell: Arc<EventFd>,
}

impl Answers {
    /// Answers the dial announced as `stream` with a connected stream socket, or refuses it. An
    /// answer to a dial that no longer waits closes the socket.
    pub fn answer(&self, stream: u64, socket: Option<OwnedFd>) {
        self.send(Message::Answer(stream, socket));
    }

    /// Refuses every dial that waits for an answer.
    pub fn server_gone(&self) {
        self.send(Message::ServerGone);
    }

    fn send(&self, message: Message) {
        // Without a device there is no guest to tell.
        if self.outbox.send(message).is_ok() {
            let _ = self.bell.write(1);
        }
    }
}

impl Vsock {
    /// A device that gives the guest the address `guest_cid`, 3 or more, and the way to answer
    /// its dials. Fails if the process has no descriptors left.
    pub fn new(guest_cid: u32, announce: Box<dyn Announce>) -> io::Result<(Self, Answers)> {
        let (outbox, inbox) = mpsc::channel();
        let bell = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        let device = Self {
            streams: Streams::new(guest_cid, announce),
            inbox,
            bell: Arc::clone(&bell),
            config: u64::from(guest_cid).to_le_bytes(),
        };
        Ok((device, Answers { outbox, bell }))
    }
}

impl Device for Vsock {
    fn kind(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn start(self: Box<Self>, active: Active) -> Result<Box<dyn Running>, StartError> {
        let failed = |why: String| StartError {
            device: "vsock",
            why,
        };
        let poll = Poll::new().map_err(|error| failed(error.to_string()))?;
        let stop = poll.stopper().map_err(|error| failed(error.to_string()))?;
        let worker = Worker::new(self, active, poll).map_err(|fault| failed(fault.to_string()))?;
        Thread::start("vsock", stop, move || worker.run())
    }
}

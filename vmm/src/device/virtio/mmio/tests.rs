//! A driver that keeps to the rules, and one that does not.

use std::io::Result;
use std::sync::Mutex;

use proptest::prelude::*;
use vm_memory::GuestMemoryMmap;

use super::*;
use crate::device::virtio::StartError;

const BASE: u64 = 0xd000_0000;

/// Which kicks are connected, as numbers of queues.
#[derive(Default)]
struct FakeWires(Mutex<Vec<u32>>);

impl Wires for FakeWires {
    fn connect_kick(&self, address: u64, queue: u32, _: &EventFd) -> Result<()> {
        assert_eq!(address, BASE + QUEUE_NOTIFY);
        self.0.lock().unwrap().push(queue);
        Ok(())
    }

    fn disconnect_kick(&self, _: u64, queue: u32, _: &EventFd) {
        self.0
            .lock()
            .unwrap()
            .retain(|connected| *connected != queue);
    }

    fn interrupt_line(&self, _: u32) -> Result<Arc<EventFd>> {
        Ok(Arc::new(EventFd::new(0)?))
    }
}

/// A device with two queues that remembers, in its configuration, how often it ran.
struct Counter {
    config: [u8; 1],
    fails: bool,
}

struct RunningCounter {
    config: [u8; 1],
    _queues: Vec<ActiveQueue>,
}

impl Device for Counter {
    fn kind(&self) -> u32 {
        42
    }

    fn features(&self) -> u64 {
        1 << 5 | F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16, 8]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn start(self: Box<Self>, active: Active) -> std::result::Result<Box<dyn Running>, StartError> {
        if self.fails {
            return Err(StartError {
                device: "counter",
                why: "it never does".into(),
            });
        }
        assert!(active.queues[0].queue.is_valid(active.memory.as_ref()));
        assert_eq!(active.queues[0].queue.size(), 4);
        assert!(!active.queues[1].queue.ready());
        let config = [self.config[0] + 1];
        Ok(Box::new(RunningCounter {
            config,
            _queues: active.queues,
        }))
    }
}

impl Running for RunningCounter {
    fn stop(self: Box<Self>) -> Box<dyn Device> {
        Box::new(Counter {
            config: self.config,
            fails: false,
        })
    }
}

struct Bench {
    transport: Transport,
    wires: Arc<FakeWires>,
    status: Arc<AtomicU32>,
}

impl Bench {
    fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let (wires, status) = (Arc::new(FakeWires::default()), Arc::new(AtomicU32::new(0)));
        let transport = Transport::new(BASE, 5, Arc::new(memory), wires.clone(), status.clone());
        Self {
            transport,
            wires,
            status,
        }
    }

    fn with(fails: bool) -> Self {
        let mut bench = Self::new();
        bench
            .transport
            .attach(Box::new(Counter { config: [0], fails }))
            .unwrap();
        bench
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, writes: &[(u64, u32)]) {
        writes
            .iter()
            .for_each(|(offset, value)| self.transport.write(*offset, *value));
    }

    /// Up to FEATURES_OK (virtio 1.2 §3.1.1).
    fn negotiate(&mut self, low: u32, high: u32) -> u32 {
        let status = STATUS;
        self.write(&[(status, 0), (status, 1), (status, 3)]);
        self.write(&[(DRIVER_FEATURES_SELECT, 0), (DRIVER_FEATURES, low)]);
        self.write(&[
            (DRIVER_FEATURES_SELECT, 1),
            (DRIVER_FEATURES, high),
            (status, 11),
        ]);
        self.read(status)
    }

    fn queue(&mut self, descriptors: u32) {
        self.write(&[
            (QUEUE_SELECT, 0),
            (QUEUE_SIZE, 4),
            (QUEUE_DESCRIPTORS, descriptors),
        ]);
        self.write(&[
            (QUEUE_DRIVER, 0x2000),
            (QUEUE_DEVICE, 0x3000),
            (QUEUE_READY, 1),
        ]);
    }

    fn start(&mut self) -> u32 {
        self.negotiate(1 << 5, 1);
        self.queue(0x1000);
        self.write(&[(STATUS, 15)]);
        self.read(STATUS)
    }

    fn kicks(&self) -> Vec<u32> {
        self.wires.0.lock().unwrap().clone()
    }
}

#[test]
fn an_empty_window_shows_the_transport_and_no_device() {
    let mut bench = Bench::new();
    assert_eq!(bench.read(MAGIC_VALUE), u32::from_le_bytes(*b"virt"));
    assert_eq!((bench.read(VERSION), bench.read(DEVICE_ID)), (2, 0));
    bench.write(&[(STATUS, 15), (QUEUE_READY, 1)]);
    assert_eq!((bench.read(STATUS), bench.read(CONFIG)), (0, 0));
    assert!(matches!(bench.transport.detach(), Err(DetachError::Empty)));
}

#[test]
fn a_device_starts_stops_and_starts_again() {
    let mut bench = Bench::with(false);
    assert_eq!(
        (bench.read(DEVICE_ID), bench.read(QUEUE_SIZE_MAX)),
        (42, 16)
    );
    assert_eq!(bench.start(), 15);
    assert_eq!(bench.kicks(), [0, 1]);
    bench.write(&[(STATUS, 0)]);
    assert_eq!((bench.read(STATUS), bench.read(QUEUE_READY)), (0, 0));
    assert!(bench.kicks().is_empty());
    assert_eq!(bench.start(), 15);
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    let mut bench = Bench::with(false);
    assert_eq!(bench.read(DEVICE_FEATURES), 1 << 5 | 1 << 29);
    bench.write(&[(DEVICE_FEATURES_SELECT, 1)]);
    assert_eq!(bench.read(DEVICE_FEATURES), 1);
    assert_eq!(bench.negotiate(1 << 5, 1), 11);
    assert_eq!(bench.negotiate(1 << 6, 1), 3, "never offered");
    assert_eq!(bench.negotiate(1 << 5, 0), 3, "a legacy driver");
    bench.write(&[(STATUS, 7)]);
    assert_eq!(bench.read(STATUS), 3, "started without features");
    assert!(bench.kicks().is_empty());
}

#[test]
fn a_running_queue_cannot_be_described_anew() {
    let mut bench = Bench::with(false);
    bench.start();
    let occupant = |bench: &Bench| bench.transport.occupant.as_ref().unwrap().queues.clone();
    let before = occupant(&bench);
    for offset in (0..CONFIG).step_by(4).filter(|offset| *offset != STATUS) {
        bench.write(&[(QUEUE_SELECT, 0), (offset, 0x5a5a)]);
        bench.write(&[(QUEUE_SELECT, 1), (offset, 1)]);
    }
    assert_eq!(occupant(&bench), before);
    bench.write(&[(QUEUE_SELECT, 0)]);
    assert_eq!(bench.read(QUEUE_READY), 1);
}

#[test]
fn a_queue_outside_the_memory_needs_a_reset_and_starts_nothing() {
    let mut bench = Bench::with(false);
    bench.negotiate(1 << 5, 1);
    bench.queue(0xffff_f000);
    bench.write(&[(STATUS, 15)]);
    assert_eq!(bench.read(STATUS), 15 | 64);
    assert!(bench.kicks().is_empty());
    assert_ne!(
        bench.status.load(Ordering::SeqCst) & 2,
        0,
        "and the driver is told"
    );
    assert_eq!(bench.start(), 15, "after the reset it can start");
}

#[test]
fn a_device_that_does_not_start_needs_a_reset() {
    let mut bench = Bench::with(true);
    assert_eq!(bench.start(), 15 | 64);
    assert!(bench.kicks().is_empty());
    assert_eq!(bench.start(), 15 | 64);
}

#[test]
fn only_a_device_that_the_guest_let_go_can_be_taken() {
    let mut bench = Bench::with(false);
    bench.start();
    assert!(matches!(bench.transport.detach(), Err(DetachError::InUse)));
    bench.write(&[(STATUS, 0), (STATUS, 1)]);
    let generation = bench.read(CONFIG_GENERATION);
    let device = bench.transport.detach().unwrap();
    assert_eq!(device.config(), [1], "it is the one that ran");
    assert_eq!(bench.read(DEVICE_ID), 0);
    assert!(bench.transport.attach(device).is_ok());
    assert_eq!((bench.read(DEVICE_ID), bench.read(STATUS)), (42, 0));
    assert_ne!(bench.read(CONFIG_GENERATION), generation);
}

#[test]
fn the_configuration_ends_where_it_ends() {
    let mut bench = Bench::with(false);
    bench.start();
    bench.write(&[(STATUS, 0)]);
    let mut bytes = [0xff; 8];
    bytes.fill(0);
    bench.transport.read(CONFIG, &mut bytes[..2]);
    bench.transport.read(u64::MAX, &mut bytes[4..]);
    // What the device shows was read when it was attached.
    assert_eq!(bytes, [0; 8]);
}

proptest! {
    #[test]
    fn no_sequence_of_writes_makes_it_panic(
        writes in proptest::collection::vec((0u64..0x140, any::<u32>()), 0..60),
        status in proptest::collection::vec(0u32..0x100, 0..10),
    ) {
        let mut bench = Bench::with(false);
        bench.start();
        for (index, (offset, value)) in writes.into_iter().enumerate() {
            bench.write(&[(offset, value)]);
            if let Some(status) = status.get(index / 6) {
                bench.write(&[(STATUS, *status)]);
            }
            bench.read(offset);
        }
        bench.write(&[(STATUS, 0)]);
        prop_assert!(bench.kicks().is_empty());
    }
}

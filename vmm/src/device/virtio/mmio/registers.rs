//! Offsets and bits of virtio 1.2 §4.2.2, §2.1 and §6.

/// Identity: reads "virt".
pub const MAGIC_VALUE: u64 = 0x000;
/// Version of the transport.
pub const VERSION: u64 = 0x004;
/// What device it is; 0 is none.
pub const DEVICE_ID: u64 = 0x008;
/// Who made it.
pub const VENDOR_ID: u64 = 0x00c;
/// Half of the offered features.
pub const DEVICE_FEATURES: u64 = 0x010;
/// Which half.
pub const DEVICE_FEATURES_SELECT: u64 = 0x014;
/// Half of the accepted features.
pub const DRIVER_FEATURES: u64 = 0x020;
/// Which half.
pub const DRIVER_FEATURES_SELECT: u64 = 0x024;
/// The queue that the registers below are about.
pub const QUEUE_SELECT: u64 = 0x030;
/// Its largest size.
pub const QUEUE_SIZE_MAX: u64 = 0x034;
/// Its size.
pub const QUEUE_SIZE: u64 = 0x038;
/// Whether it is in use.
pub const QUEUE_READY: u64 = 0x044;
/// Written with the number of a queue that has new buffers.
pub const QUEUE_NOTIFY: u64 = 0x050;
/// Why the interrupt was raised.
pub const INTERRUPT_STATUS: u64 = 0x060;
/// Written with the reasons that were dealt with.
pub const INTERRUPT_ACK: u64 = 0x064;
/// Status of the device; writing 0 resets it.
pub const STATUS: u64 = 0x070;
/// Descriptor area, low half; the high half follows.
pub const QUEUE_DESCRIPTORS: u64 = 0x080;
/// Driver area.
pub const QUEUE_DRIVER: u64 = 0x090;
/// Device area.
pub const QUEUE_DEVICE: u64 = 0x0a0;
/// Length of the selected shared memory region, low half; all ones is none.
pub const SHARED_MEMORY_LENGTH: u64 = 0x0b0;
/// Changes when the configuration space changes.
pub const CONFIG_GENERATION: u64 = 0x0fc;
/// The configuration space.
pub const CONFIG: u64 = 0x100;

/// "virt", little endian.
pub const MAGIC: u32 = 0x7472_6976;
/// The transport that is not the legacy one.
pub const MODERN: u32 = 2;
/// "BLKH", little endian.
pub const VENDOR: u32 = 0x484b_4c42;

/// The guest knows how to drive the device.
pub const DRIVER: u8 = 2;
/// The driver accepted its features and waits for our opinion.
pub const FEATURES_OK: u8 = 8;
/// The driver is ready.
pub const DRIVER_OK: u8 = 4;
/// We cannot go on.
pub const DEVICE_NEEDS_RESET: u8 = 64;

/// The device follows virtio 1.
pub const F_VERSION_1: u64 = 1 << 32;
/// Notifications are suppressed by index.
pub const F_EVENT_IDX: u64 = 1 << 29;

//! The description of one VM.

use serde::{Deserialize, Serialize};

/// Version of [`VmConfig`], of the control protocol and of [`crate::ExitRecord`].
pub const VERSION: u32 = 1;
/// The descriptor on which the VMM inherits its sealed configuration.
pub const CONFIG_FD: i32 = 3;
/// virtio-mmio windows of a VM: the most devices it can have at once.
pub const WINDOWS: u8 = 24;
/// The most vCPUs a VM can have.
pub const MAX_VCPUS: u8 = 64;

/// The most pairs of queues of a network interface.
pub const MAX_QUEUE_PAIRS: usize = 8;

/// An open descriptor: in a [`VmConfig`] the number under which the VMM inherits it, in a control
/// request the index among the descriptors that came with the packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fd(pub i32);

/// One VM, complete. Serialised as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// [`VERSION`] of the writer; the reader takes its own and the one before.
    pub version: u32,
    /// The pod's id. Only for messages.
    pub id: String,
    /// `/dev/kvm`.
    pub kvm: Fd,
    /// An uncompressed x86_64 ELF kernel, read-only.
    pub kernel: Fd,
    /// An initramfs, read-only.
    pub initramfs: Option<Fd>,
    /// Kernel command line, to which the VMM adds what describes its own devices.
    pub command_line: String,
    /// Guest memory in MiB, 32 or more.
    pub memory_mib: u32,
    /// vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// The guest's vsock address, 3 or more.
    pub guest_cid: u32,
    /// A listening `SOCK_SEQPACKET` unix socket: `control.sock`.
    pub control: Fd,
    /// A regular file, empty and writable, for the [`crate::ExitRecord`].
    pub exit_record: Fd,
    /// Where the guest's console also goes as it comes, besides the tail that is kept: a file, pipe
    /// or terminal. Bytes it does not take at once are lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<Fd>,
    /// The open `cgroup.procs` of the cgroup that the VMM enters before it does anything else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup_procs: Option<Fd>,
    /// The devices present at boot, from window 2 on; vsock is in window 0, the entropy device in
    /// window 1.
    pub devices: Vec<Device>,
}

/// A device that a window can hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Device {
    /// A virtio-blk disk.
    Block(Block),
    /// A virtio-net interface.
    Net(Net),
}

/// A raw disk, put together from extents in their order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Block {
    /// 1 to 20 ASCII bytes which the guest reads back to know the disk (virtio 1.2 §5.2.6).
    pub serial: String,
    /// Whether the guest may not write.
    pub read_only: bool,
    /// One or more; every length but the last a multiple of 4096.
    pub extents: Vec<Extent>,
}

/// A piece of a file that stands at the next free place of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Extent {
    /// A regular file.
    pub file: Fd,
    /// Where the piece starts, in bytes.
    pub offset: u64,
    /// Its length in bytes, a multiple of 512, not 0.
    pub length: u64,
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Net {
    /// A tap with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, vnet header size 12, attached to its
    /// interface.
    pub tap: Fd,
    /// Further queues of the same tap, which then has `IFF_MULTI_QUEUE`, all attached: the guest
    /// may use as many pairs of queues as there are taps, at most [`MAX_QUEUE_PAIRS`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub more_taps: Vec<Fd>,
    /// The guest's hardware address, unicast.
    pub mac: [u8; 6],
    /// Largest frame payload in bytes, 68 to 65535.
    pub mtu: u16,
}

/// Why a description of a VM or device is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The writer is too new or too old.
    #[error("VM configuration has version {0}; this VMM reads version {VERSION}")]
    Version(u32),
    /// A field is out of range.
    #[error("VM configuration of pod {id}: {field} is {value}; allowed is {allowed}")]
    Range {
        /// The pod.
        id: String,
        /// Which field.
        field: &'static str,
        /// What it held.
        value: String,
        /// What it may hold.
        allowed: &'static str,
    },
    /// The bytes are not a configuration.
    #[error("VM configuration cannot be read: {0}")]
    Syntax(String),
}

impl VmConfig {
    /// Parses and validates a configuration.
    pub fn parse(bytes: &[u8]) -> Result<Self, ConfigError> {
        let config: Self = serde_json::from_slice(bytes)
            .map_err(|error| ConfigError::Syntax(error.to_string()))?;
        config.validate()?;
        Ok(config)
    }

    /// Checks every range that the documentation of the fields names.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.version != VERSION {
            return Err(ConfigError::Version(self.version));
        }
        self.check(
            "memory_mib",
            self.memory_mib,
            self.memory_mib >= 32,
            "32 or more",
        )?;
        self.check(
            "vcpus",
            self.vcpus,
            (1..=MAX_VCPUS).contains(&self.vcpus),
            "1 to 64",
        )?;
        self.check(
            "guest_cid",
            self.guest_cid,
            self.guest_cid >= 3,
            "3 or more",
        )?;
        let spare = usize::from(WINDOWS) - 2;
        self.check(
            "devices",
            self.devices.len(),
            self.devices.len() <= spare,
            "at most 22",
        )?;
        self.devices
            .iter()
            .try_for_each(|device| device.validate(&self.id))
    }

    fn check(
        &self,
        field: &'static str,
        value: impl ToString,
        holds: bool,
        allowed: &'static str,
    ) -> Result<(), ConfigError> {
        check(&self.id, field, value, holds, allowed)
    }
}

impl Device {
    /// Checks every range that the documentation of the fields names; `id` is the pod's.
    pub fn validate(&self, id: &str) -> Result<(), ConfigError> {
        match self {
            Self::Block(block) => block.validate(id),
            Self::Net(net) => {
                check(
                    id,
                    "queues",
                    net.more_taps.len() + 1,
                    net.more_taps.len() < MAX_QUEUE_PAIRS,
                    "1 to 8",
                )?;
                check(id, "mtu", net.mtu, net.mtu >= 68, "68 to 65535")?;
                let mac = net.mac;
                check(
                    id,
                    "mac",
                    format!("{mac:02x?}"),
                    mac[0] & 1 == 0,
                    "a unicast address",
                )
            }
        }
    }
}

impl Block {
    fn validate(&self, id: &str) -> Result<(), ConfigError> {
        let serial = &self.serial;
        let holds =
            (1..=20).contains(&serial.len()) && serial.bytes().all(|b| b.is_ascii_graphic());
        check(id, "serial", serial, holds, "1 to 20 visible ASCII bytes")?;
        check(
            id,
            "extents",
            self.extents.len(),
            !self.extents.is_empty(),
            "1 or more",
        )?;
        let mut total = 0u64;
        for (index, extent) in self.extents.iter().enumerate() {
            let last = index + 1 == self.extents.len();
            let unit = if last { 512 } else { 4096 };
            let holds = extent.length > 0 && extent.length.is_multiple_of(unit);
            check(
                id,
                "extent length",
                extent.length,
                holds,
                "a multiple of 4096, the last of 512",
            )?;
            let end = extent.offset.checked_add(extent.length);
            check(
                id,
                "extent offset",
                extent.offset,
                end.is_some(),
                "an end below 2^64",
            )?;
            let sum = total.checked_add(extent.length);
            check(id, "disk size", total, sum.is_some(), "below 2^64 bytes")?;
            total = sum.unwrap_or(u64::MAX);
        }
        Ok(())
    }

    /// The disk's size in bytes; saturates where [`Device::validate`] would refuse.
    pub fn size(&self) -> u64 {
        self.extents
            .iter()
            .fold(0u64, |sum, extent| sum.saturating_add(extent.length))
    }
}

fn check(
    id: &str,
    field: &'static str,
    value: impl ToString,
    holds: bool,
    allowed: &'static str,
) -> Result<(), ConfigError> {
    if holds {
        return Ok(());
    }
    Err(ConfigError::Range {
        id: id.to_owned(),
        field,
        value: value.to_string(),
        allowed,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VmConfig {
        VmConfig {
            version: VERSION,
            id: "pod".into(),
            kvm: Fd(4),
            kernel: Fd(5),
            initramfs: None,
            command_line: "quiet".into(),
            memory_mib: 128,
            vcpus: 1,
            guest_cid: 3,
            control: Fd(6),
            exit_record: Fd(7),
            console: None,
            cgroup_procs: None,
            devices: vec![Device::Block(Block {
                serial: "scratch".into(),
                read_only: false,
                extents: vec![Extent {
                    file: Fd(8),
                    offset: 0,
                    length: 1 << 20,
                }],
            })],
        }
    }

    #[test]
    fn a_valid_configuration_survives_the_wire() {
        let bytes = serde_json::to_vec(&config()).unwrap();
        assert_eq!(VmConfig::parse(&bytes).unwrap(), config());
    }

    #[test]
    fn every_field_out_of_range_is_named() {
        let refuse = |change: fn(&mut VmConfig), name: &str| {
            let mut bad = config();
            change(&mut bad);
            let message = bad.validate().unwrap_err().to_string();
            assert!(message.contains(name), "{message}");
        };
        refuse(|c| c.version = 9, "version 9");
        refuse(|c| c.memory_mib = 31, "memory_mib");
        refuse(|c| c.vcpus = 0, "vcpus");
        refuse(|c| c.vcpus = 65, "vcpus");
        refuse(|c| c.guest_cid = 2, "guest_cid");
        refuse(|c| c.devices = vec![c.devices[0].clone(); 23], "devices");
        fn block(c: &mut VmConfig) -> &mut Block {
            let Device::Block(block) = &mut c.devices[0] else {
                unreachable!()
            };
            block
        }
        refuse(|c| block(c).serial.clear(), "serial");
        refuse(|c| block(c).serial = "x".repeat(21), "serial");
        refuse(|c| block(c).extents.clear(), "extents");
        refuse(|c| block(c).extents[0].length = 100, "extent length");
        refuse(|c| block(c).extents[0].offset = u64::MAX, "extent offset");
    }

    #[test]
    fn unknown_fields_are_refused() {
        let mut value = serde_json::to_value(config()).unwrap();
        value["surprise"] = 1.into();
        assert!(VmConfig::parse(value.to_string().as_bytes()).is_err());
    }
}

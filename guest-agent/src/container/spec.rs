//! The parts of an OCI runtime specification (1.2, config.md and config-linux.md) that the agent
//! acts on; `plan` names those it refuses, `FIELDS.md` all. Unknown fields are ignored, as the
//! specification's "Extensibility" asks.

use std::collections::BTreeMap;

use serde::Deserialize;

/// config.md.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    /// The first process.
    pub process: Option<Process>,
    /// Only `readonly` counts.
    pub root: Option<Root>,
    /// In the order in which they are made.
    pub mounts: Vec<Mount>,
    /// Refused when it holds anything.
    pub hooks: Option<BTreeMap<String, serde_json::Value>>,
    /// config-linux.md.
    pub linux: Option<Linux>,
}

/// The root file system, which the request names by other means.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Root {
    /// Whether the container may not write to it.
    pub readonly: bool,
}

/// A mount.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Mount {
    /// Absolute path in the container.
    pub destination: String,
    /// File system, or `bind`.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// Device, or the guest's path to bind.
    pub source: Option<String>,
    /// mount(8)-like.
    pub options: Vec<String>,
    /// Refused when it holds anything.
    pub uid_mappings: Vec<serde_json::Value>,
    /// Refused when it holds anything.
    pub gid_mappings: Vec<serde_json::Value>,
}

/// A process.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Process {
    /// Whether its stdio is a terminal.
    pub terminal: bool,
    /// The terminal's first size.
    pub console_size: Option<ConsoleSize>,
    /// By number.
    pub user: User,
    /// At least the program.
    pub args: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// Absolute path in the container.
    pub cwd: String,
    /// Absent: none.
    pub capabilities: Option<Capabilities>,
    /// Limits.
    pub rlimits: Vec<Rlimit>,
    /// Whether exec may not gain privileges.
    pub no_new_privileges: bool,
    /// -1000 to 1000.
    pub oom_score_adj: Option<i32>,
}

/// A terminal's size, in characters.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default)]
pub struct ConsoleSize {
    /// Rows.
    pub height: u32,
    /// Columns.
    pub width: u32,
}

/// A user.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Permission bits new files do not get.
    pub umask: Option<u32>,
    /// Supplementary groups.
    pub additional_gids: Vec<u32>,
    /// `user[:group]`, names or numbers; goes before the numbers above and is looked up in the
    /// image.
    pub username: Option<String>,
}

/// Capability sets, names as in capabilities(7).
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Capabilities {
    /// The most a process can get.
    pub bounding: Vec<String>,
    /// In effect.
    pub effective: Vec<String>,
    /// Kept by exec of a file that inherits.
    pub inheritable: Vec<String>,
    /// What effective may hold.
    pub permitted: Vec<String>,
    /// Kept by exec of any file.
    pub ambient: Vec<String>,
}

/// A limit of getrlimit(2).
#[derive(Debug, Clone, Deserialize)]
pub struct Rlimit {
    /// Such as `RLIMIT_NOFILE`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The ceiling.
    pub hard: u64,
    /// In effect.
    pub soft: u64,
}

/// config-linux.md.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Linux {
    /// Of these only `pid` decides something, see `ARCHITECTURE.md`.
    pub namespaces: Vec<Namespace>,
    /// Limits.
    pub resources: Option<Resources>,
    /// Nodes.
    pub devices: Vec<Device>,
    /// Refused when it holds anything: a pod's sysctls come with Prepare.
    pub sysctl: BTreeMap<String, String>,
    /// Refused when it holds anything.
    pub uid_mappings: Vec<serde_json::Value>,
    /// Refused when it holds anything.
    pub gid_mappings: Vec<serde_json::Value>,
    /// Which system calls may be made. Absent: all but those no container may make.
    pub seccomp: Option<Seccomp>,
    /// Hidden paths.
    pub masked_paths: Vec<String>,
    /// Paths that cannot be written.
    pub readonly_paths: Vec<String>,
}

/// A namespace.
#[derive(Debug, Clone, Deserialize)]
pub struct Namespace {
    /// Such as `pid`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Refused.
    #[serde(default)]
    pub path: Option<String>,
}

/// Which system calls may be made.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Seccomp {
    /// `SCMP_ACT_*`.
    pub default_action: String,
    /// An error's number.
    pub default_errno_ret: Option<u32>,
    /// `SCMP_ARCH_*`, besides the guest's own.
    pub architectures: Vec<String>,
    /// `SECCOMP_FILTER_FLAG_*`.
    pub flags: Vec<String>,
    /// Refused when it holds anything.
    pub listener_path: String,
    /// Refused when it holds anything.
    pub listener_metadata: String,
    /// Rules.
    pub syscalls: Vec<Syscall>,
}

/// A rule about system calls.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Syscall {
    /// At least one.
    pub names: Vec<String>,
    /// `SCMP_ACT_*`.
    pub action: String,
    /// An error's number.
    pub errno_ret: Option<u32>,
    /// Conditions.
    pub args: Vec<SeccompArgument>,
}

/// A condition of a rule.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SeccompArgument {
    /// 0 to 5.
    pub index: u32,
    /// To compare with; for `SCMP_CMP_MASKED_EQ` the bits that count.
    pub value: u64,
    /// For `SCMP_CMP_MASKED_EQ`: to compare with.
    pub value_two: u64,
    /// `SCMP_CMP_*`.
    pub op: String,
}

/// A device node.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Device {
    /// `c`, `u`, `b` or `p`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Absolute path in the container.
    pub path: String,
    /// Needed but for `p`.
    pub major: Option<i64>,
    /// Needed but for `p`.
    pub minor: Option<i64>,
    /// Permission bits; 0666.
    pub file_mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
}

/// Whether devices may be opened or made nodes of.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct DeviceRule {
    /// Else it denies.
    pub allow: bool,
    /// `a` (both), `c` or `b`.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// Absent or -1: each.
    pub major: Option<i64>,
    /// Absent or -1: each.
    pub minor: Option<i64>,
    /// Of the letters `r`, `w`, `m`.
    pub access: Option<String>,
}

/// Limits of the container's cgroup.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Resources {
    /// What may be done with devices.
    pub devices: Vec<DeviceRule>,
    /// Processor time.
    pub cpu: Option<Cpu>,
    /// Memory.
    pub memory: Option<Memory>,
    /// Tasks.
    pub pids: Option<Pids>,
    /// Disk input and output.
    #[serde(rename = "blockIO")]
    pub block_io: Option<BlockIo>,
    /// Huge pages.
    pub hugepage_limits: Vec<HugepageLimit>,
    /// Files of cgroup v2 as they are.
    pub unified: BTreeMap<String, String>,
}

/// Processor time, in the terms of cgroup v1 that the specification keeps.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Cpu {
    /// 2 to 262144.
    pub shares: Option<u64>,
    /// Microseconds in each period; not positive: no limit.
    pub quota: Option<i64>,
    /// Microseconds.
    pub period: Option<u64>,
    /// Microseconds.
    pub burst: Option<u64>,
    /// 1: SCHED_IDLE.
    pub idle: Option<i64>,
    /// A list such as `0-2,5`.
    pub cpus: Option<String>,
    /// As `cpus`, of memory nodes.
    pub mems: Option<String>,
}

/// Memory, in bytes; -1: no limit.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Memory {
    /// The most.
    pub limit: Option<i64>,
    /// What is kept from reclaim.
    pub reservation: Option<i64>,
    /// Memory and swap together.
    pub swap: Option<i64>,
}

/// Tasks.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Pids {
    /// The most; not positive: no limit.
    pub limit: Option<i64>,
}

/// Disk input and output.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BlockIo {
    /// 10 to 1000.
    pub weight: Option<u16>,
    /// Bytes a second.
    pub throttle_read_bps_device: Vec<Throttle>,
    /// Bytes a second.
    pub throttle_write_bps_device: Vec<Throttle>,
    /// Operations a second.
    #[serde(rename = "throttleReadIOPSDevice")]
    pub throttle_read_iops_device: Vec<Throttle>,
    /// Operations a second.
    #[serde(rename = "throttleWriteIOPSDevice")]
    pub throttle_write_iops_device: Vec<Throttle>,
}

/// A rate of one device.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct Throttle {
    /// Its major number.
    pub major: u32,
    /// Its minor number.
    pub minor: u32,
    /// The rate.
    pub rate: u64,
}

/// Huge pages of one size.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HugepageLimit {
    /// Such as `2MB`.
    pub page_size: String,
    /// Bytes.
    pub limit: u64,
}

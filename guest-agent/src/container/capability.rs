//! Capability sets: names to bits, and bits to the thread.

use std::io;

use rustix::thread::{CapabilitySet, CapabilitySets};
use serde::{Deserialize, Serialize};

use crate::container::spec::Capabilities;

/// In the order of linux/capability.h.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The five sets as bits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sets {
    /// The most a process can get.
    pub bounding: u64,
    /// In effect.
    pub effective: u64,
    /// What effective may hold.
    pub permitted: u64,
    /// Kept by exec of a file that inherits.
    pub inheritable: u64,
    /// Kept by exec of any file.
    pub ambient: u64,
}

/// Reads the sets; an unknown name is the error.
pub fn sets(names: &Capabilities) -> Result<Sets, String> {
    let permitted = bits(&names.permitted)?;
    let inheritable = bits(&names.inheritable)?;
    Ok(Sets {
        bounding: bits(&names.bounding)?,
        effective: bits(&names.effective)? & permitted,
        permitted,
        inheritable,
        // The kernel refuses others, capabilities(7).
        ambient: bits(&names.ambient)? & permitted & inheritable,
    })
}

fn bits(names: &[String]) -> Result<u64, String> {
    names.iter().try_fold(0, |bits, name| {
        let short = name.strip_prefix("CAP_").unwrap_or(name);
        match NAMES.iter().position(|known| *known == short) {
            Some(bit) => Ok(bits | 1 << bit),
            None => Err(name.clone()),
        }
    })
}

/// Gives up for ever what is not in the bounding set. To be called while still root.
pub fn bound(sets: &Sets) -> io::Result<()> {
    for bit in 0..NAMES.len() {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        if sets.bounding & (1 << bit) == 0 {
            match rustix::thread::remove_capability_from_bounding_set(capability) {
                // A capability newer than the kernel.
                Ok(()) | Err(rustix::io::Errno::INVAL) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

/// Takes on the other sets, and `besides` until the program is executed: execve(2) works out
/// effective and permitted anew, from the others, unless no_new_privs is set. To be called after
/// the user is changed.
pub fn take(sets: &Sets, besides: CapabilitySet) -> io::Result<()> {
    let set = CapabilitySet::from_bits_retain;
    rustix::thread::clear_ambient_capability_set()?;
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: set(sets.effective) | besides,
            permitted: set(sets.permitted) | besides,
            inheritable: set(sets.inheritable),
        },
    )?;
    for bit in 0..NAMES.len() {
        if sets.ambient & (1 << bit) != 0 {
            rustix::thread::configure_capability_in_ambient_set(set(1 << bit), true)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn names_are_the_kernels_bits() {
        assert_eq!(bits(&names(&["CAP_CHOWN", "NET_RAW"])), Ok(1 | 1 << 13));
        assert_eq!(bits(&names(&["CAP_CHECKPOINT_RESTORE"])), Ok(1 << 40));
        assert_eq!(bits(&names(&["CAP_FLY"])), Err("CAP_FLY".to_owned()));
    }

    #[test]
    fn ambient_holds_only_what_the_kernel_allows() {
        let asked = Capabilities {
            permitted: names(&["CAP_CHOWN", "CAP_KILL"]),
            inheritable: names(&["CAP_KILL"]),
            ambient: names(&["CAP_CHOWN", "CAP_KILL"]),
            ..Capabilities::default()
        };
        assert_eq!(sets(&asked).unwrap().ambient, 1 << 5);
    }
}

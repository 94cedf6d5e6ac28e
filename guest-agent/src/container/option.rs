//! Names of mount options and resource limits.

use serde::{Deserialize, Serialize};

use crate::mount::{Attributes, NO_DEV, NO_EXEC, NO_SUID, READ_ONLY};

/// A mount's options, taken apart.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountOptions {
    /// Of the mount itself.
    pub attributes: Attributes,
    /// Of the mounts below it too.
    pub recursive: Attributes,
    /// For the file system.
    pub data: Vec<String>,
    /// `bind` (false) or `rbind` (true).
    pub bind: Option<bool>,
}

impl MountOptions {
    /// Of a single file made for the container.
    pub fn file(read_only: bool) -> Self {
        let mut attributes = Attributes {
            set: NO_DEV | NO_SUID,
            clear: 0,
        };
        if read_only {
            attributes.set |= READ_ONLY;
        }
        Self {
            attributes,
            ..Self::default()
        }
    }

    /// Lets device nodes be opened.
    pub fn with_devices(mut self) -> Self {
        self.attributes.set &= !NO_DEV;
        self
    }

    /// Drops what is for a file system.
    pub fn without_data(mut self) -> Self {
        self.data.clear();
        self
    }
}

/// The access-time field of mount attributes, which is set as a whole.
const ATIME: u64 = 0x70;
const NO_ATIME: u64 = 0x10;
const STRICT_ATIME: u64 = 0x20;
const NO_DIR_ATIME: u64 = 0x80;

/// (name, bits to set, bits to clear).
const NAMES: [(&str, u64, u64); 15] = [
    ("ro", READ_ONLY, 0),
    ("rw", 0, READ_ONLY),
    ("nosuid", NO_SUID, 0),
    ("suid", 0, NO_SUID),
    ("nodev", NO_DEV, 0),
    ("dev", 0, NO_DEV),
    ("noexec", NO_EXEC, 0),
    ("exec", 0, NO_EXEC),
    ("noatime", NO_ATIME, ATIME),
    ("strictatime", STRICT_ATIME, ATIME),
    ("relatime", 0, ATIME),
    ("atime", 0, ATIME),
    ("norelatime", 0, ATIME),
    ("nodiratime", NO_DIR_ATIME, 0),
    ("diratime", 0, NO_DIR_ATIME),
];

/// Takes options apart. Propagation to and from the host does not exist in a guest, so its names
/// say nothing. Device nodes stay unusable unless `dev` asks for them: a container may make nodes
/// (CAP_MKNOD) for the pod's disks.
pub fn parse(options: &[String]) -> Result<MountOptions, String> {
    let mut parsed = MountOptions {
        attributes: Attributes {
            set: NO_DEV,
            clear: 0,
        },
        ..MountOptions::default()
    };
    for option in options {
        let known = |name: &str| NAMES.iter().find(|(known, ..)| *known == name);
        match option.as_str() {
            "bind" => parsed.bind = Some(false),
            "rbind" => parsed.bind = Some(true),
            "defaults" | "private" | "rprivate" | "slave" | "rslave" | "shared" | "rshared"
            | "unbindable" | "runbindable" => {}
            name if name.is_empty() || name.len() > 256 || name.contains(['\0', ',']) => {
                return Err(format!("option {name:?} is malformed"));
            }
            name => {
                let recursive = name.strip_prefix('r').and_then(known);
                if let Some((_, set, clear)) = known(name) {
                    apply(&mut parsed.attributes, *set, *clear);
                } else if let Some((_, set, clear)) = recursive {
                    apply(&mut parsed.attributes, *set, *clear);
                    apply(&mut parsed.recursive, *set, *clear);
                } else {
                    parsed.data.push(name.to_owned());
                }
            }
        }
    }
    Ok(parsed)
}

fn apply(attributes: &mut Attributes, set: u64, clear: u64) {
    attributes.set = (attributes.set & !clear) | set;
    // Only the access-time field may be in both, so that it is set as a whole.
    attributes.clear = ((attributes.clear & !set) | clear) & !(set & !ATIME);
    if set & ATIME != 0 {
        attributes.clear |= ATIME;
    }
}

/// The number of a resource of getrlimit(2).
pub fn resource(name: &str) -> Option<u32> {
    const NAMES: [&str; 16] = [
        "CPU",
        "FSIZE",
        "DATA",
        "STACK",
        "CORE",
        "RSS",
        "NPROC",
        "NOFILE",
        "MEMLOCK",
        "AS",
        "LOCKS",
        "SIGPENDING",
        "MSGQUEUE",
        "NICE",
        "RTPRIO",
        "RTTIME",
    ];
    let name = name.strip_prefix("RLIMIT_")?;
    let at = NAMES.iter().position(|known| *known == name)?;
    u32::try_from(at).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(names: &[&str]) -> MountOptions {
        parse(&names.iter().map(ToString::to_string).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn later_options_win() {
        assert_eq!(options(&["ro", "rw"]).attributes.set, NO_DEV);
        assert_eq!(options(&["rw", "ro"]).attributes.set, NO_DEV | READ_ONLY);
        assert_eq!(options(&["dev"]).attributes.set, 0);
        let times = options(&["strictatime", "noatime"]).attributes;
        assert_eq!((times.set, times.clear), (NO_DEV | NO_ATIME, ATIME));
    }

    #[test]
    fn what_is_not_a_flag_goes_to_the_file_system() {
        let parsed = options(&["nosuid", "mode=755", "size=65536k", "rprivate", "rro"]);
        assert_eq!(parsed.data, ["mode=755", "size=65536k"]);
        assert_eq!(parsed.recursive.set, READ_ONLY);
        assert!(parse(&["size=1,lowerdir=/".to_owned()]).is_err());
    }

    #[test]
    fn resources_have_the_kernels_numbers() {
        assert_eq!(resource("RLIMIT_NOFILE"), Some(libc::RLIMIT_NOFILE));
        assert_eq!(resource("RLIMIT_RTTIME"), Some(libc::RLIMIT_RTTIME));
        assert_eq!(resource("NOFILE"), None);
    }
}

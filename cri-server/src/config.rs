//! The server's configuration file, read once and validated.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::container::log::WhenFull;
use crate::{image, metrics, network, streaming};

/// Where the configuration is when the command line does not say.
pub const DEFAULT_PATH: &str = "/etc/bulkhead/config.toml";
/// Where the artefacts are when they are not beside the executable.
const LIBRARY: &str = "/usr/lib/bulkhead";

/// The server's configuration. Every field may be left out.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// What outlives a reboot: images, records.
    pub root: PathBuf,
    /// What does not: sockets, namespaces.
    pub run: PathBuf,
    /// Where the CRI is served; `bulkhead.sock` in `run` unless given.
    pub socket: Option<PathBuf>,
    /// The VMs.
    pub vm: Vm,
    /// Registries by `host` or `host:port`.
    pub registry: image::Registries,
    /// The pods' network.
    pub network: network::Config,
    /// The containers' logs.
    pub log: Log,
    /// The server's own figures.
    pub metrics: metrics::Config,
    /// The streaming server, for exec, attach and port-forward.
    pub streaming: streaming::Config,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            root: "/var/lib/bulkhead".into(),
            run: "/run/bulkhead".into(),
            socket: None,
            vm: Vm::default(),
            registry: image::Registries::default(),
            network: network::Config::default(),
            log: Log::default(),
            metrics: metrics::Config::default(),
            streaming: streaming::Config::default(),
        }
    }
}

/// The containers' logs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// `lose`: what a log does not take for 10 seconds, on a full disk perhaps, is dropped and
    /// counted. `wait`: the container waits.
    pub when_full: WhenFull,
}

/// What VMs are like.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Vm {
    /// Memory of a guest in MiB, 64 to 1,048,576.
    pub memory_mib: u32,
    /// vCPUs of a guest, 1 to 64.
    pub vcpus: u8,
    /// The most that a pod's containers can write, in MiB, 64 to 16,777,216; taken from the host's
    /// disk only as it is written.
    pub scratch_mib: u32,
    /// How long a guest may take until it is ready, 1 to 3600 seconds.
    pub boot_timeout_seconds: u32,
}

impl Default for Vm {
    fn default() -> Self {
        Self {
            memory_mib: 256,
            vcpus: 1,
            scratch_mib: 10_240,
            boot_timeout_seconds: 60,
        }
    }
}

impl Vm {
    /// How long a guest may take until it is ready.
    pub fn boot_timeout(&self) -> Duration {
        Duration::from_secs(self.boot_timeout_seconds.into())
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("The configuration {path} cannot be read: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The file is no configuration.
    #[error("The configuration {path} is wrong: {reason}")]
    Wrong {
        /// The file.
        path: PathBuf,
        /// Where and why.
        reason: String,
    },
}

impl Config {
    /// Reads `path`, or [`DEFAULT_PATH`] if that exists, or takes the defaults.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let chosen = path.unwrap_or(Path::new(DEFAULT_PATH));
        let text = match std::fs::read_to_string(chosen) {
            Ok(text) => text,
            Err(error) if path.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
                String::new()
            }
            Err(source) => {
                return Err(ConfigError::Read {
                    path: chosen.to_owned(),
                    source,
                });
            }
        };
        Self::parse(&text).map_err(|reason| ConfigError::Wrong {
            path: chosen.to_owned(),
            reason,
        })
    }

    /// Where the CRI is served.
    pub fn socket(&self) -> PathBuf {
        match &self.socket {
            Some(socket) => socket.clone(),
            None => self.run.join("bulkhead.sock"),
        }
    }

    fn parse(text: &str) -> Result<Self, String> {
        let config: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        let range = |name: &str, value: u32, allowed: std::ops::RangeInclusive<u32>| {
            if allowed.contains(&value) {
                return Ok(());
            }
            let (low, high) = (allowed.start(), allowed.end());
            Err(format!("{name} is {value}; allowed is {low} to {high}"))
        };
        range("vm.memory_mib", config.vm.memory_mib, 64..=1 << 20)?;
        range("vm.vcpus", config.vm.vcpus.into(), 1..=64)?;
        range("vm.scratch_mib", config.vm.scratch_mib, 64..=16 << 20)?;
        let seconds = config.vm.boot_timeout_seconds;
        range("vm.boot_timeout_seconds", seconds, 1..=3600)?;
        let seconds = config.network.cni_timeout_seconds;
        range("network.cni_timeout_seconds", seconds, 1..=3600)?;
        if let Some(mtu) = config.network.mtu {
            range("network.mtu", mtu, 576..=65_521)?;
        }
        config.streaming.tls()?;
        for (name, path) in [("root", &config.root), ("run", &config.run)] {
            if !path.is_absolute() {
                return Err(format!("{name} is {}; it must be absolute", path.display()));
            }
        }
        Ok(config)
    }
}

/// What a VM is started from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artefacts {
    /// `bulkhead-vmm`.
    pub vmm: PathBuf,
    /// The guest's kernel, `vmlinux`.
    pub kernel: PathBuf,
    /// The guest's `initramfs`.
    pub initramfs: PathBuf,
}

impl Artefacts {
    /// Looks for each beside the executable, then in `/usr/lib/bulkhead`. The error is a sentence
    /// that names what is missing.
    pub fn find() -> Result<Self, String> {
        let beside = std::env::current_exe().ok();
        let beside = beside.as_deref().and_then(Path::parent);
        Self::find_in(&[beside.unwrap_or(Path::new(LIBRARY)), Path::new(LIBRARY)])
    }

    fn find_in(places: &[&Path]) -> Result<Self, String> {
        let find = |name: &str| {
            let mut paths = places.iter().map(|place| place.join(name));
            paths.find(|path| path.is_file()).ok_or_else(|| {
                let places: Vec<_> = places.iter().map(|place| place.to_string_lossy()).collect();
                format!("{name} is missing: it is not in {}", places.join(" or "))
            })
        };
        Ok(Self {
            vmm: find("bulkhead-vmm")?,
            kernel: find("vmlinux")?,
            initramfs: find("initramfs")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_is_the_default() {
        let config = Config::parse("").unwrap();
        assert_eq!(config, Config::default());
        assert_eq!(config.socket(), Path::new("/run/bulkhead/bulkhead.sock"));
    }

    #[test]
    fn every_mistake_is_named() {
        let refuse = |text: &str, word: &str| {
            let refusal = Config::parse(text).unwrap_err();
            assert!(refusal.contains(word), "{refusal}");
        };
        refuse("rot = \"/x\"", "rot");
        refuse("root = \"x\"", "root");
        refuse("[vm]\nmemory_mib = 1", "memory_mib");
        refuse("[vm]\nvcpus = 65", "vcpus");
        refuse("[vm]\nboot_timeout_seconds = 0", "boot_timeout_seconds");
        refuse("[log]\nwhen_full = \"burst\"", "when_full");
        refuse("[network]\ncni_timeout_seconds = 0", "cni_timeout_seconds");
        refuse(
            "[network]\nmtu = 68",
            "network.mtu is 68; allowed is 576 to 65521",
        );
        refuse("[streaming]\naddress = \"localhost\"", "address");
        refuse("[streaming]\nkey = \"/key\"", "streaming.certificate");
        refuse("[streaming]\ncertificate = \"/pem\"", "streaming.key");
    }

    #[test]
    fn a_file_asked_for_must_exist() {
        let absent = Path::new("/nonexistent/config.toml");
        assert!(matches!(
            Config::load(Some(absent)),
            Err(ConfigError::Read { .. })
        ));
    }

    #[test]
    fn artefacts_are_found_in_the_first_place_that_has_them() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let places = [one.path(), two.path()];
        for name in ["vmlinux", "bulkhead-vmm"] {
            std::fs::write(two.path().join(name), "").unwrap();
        }
        let missing = Artefacts::find_in(&places).unwrap_err();
        assert!(missing.contains("initramfs"), "{missing}");
        std::fs::write(two.path().join("initramfs"), "").unwrap();
        std::fs::write(one.path().join("vmlinux"), "").unwrap();
        let found = Artefacts::find_in(&places).unwrap();
        assert_eq!(found.kernel, one.path().join("vmlinux"));
        assert_eq!(found.vmm, two.path().join("bulkhead-vmm"));
    }
}

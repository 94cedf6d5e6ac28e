//! The open descriptors that a configuration or a request names.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bulkhead_vmm_api::{CONFIG_FD, Device, Fd, VmConfig};
use rustix::fs::SealFlags;

use crate::sys;

/// The largest configuration, in bytes.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Descriptors by their number. Each is used once, except that several extents of a disk may name
/// the same file.
pub struct Files {
    unused: BTreeMap<i32, OwnedFd>,
    shared: BTreeMap<i32, Arc<File>>,
}

/// Why descriptors cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// The configuration is not there, or could still change.
    #[error(
        "descriptor {CONFIG_FD} is not a sealed memfd of at most 1 MiB with a VM configuration"
    )]
    Config,
    /// It is no configuration.
    #[error(transparent)]
    Syntax(#[from] bulkhead_vmm_api::ConfigError),
    /// It could not be read.
    #[error("the VM configuration could not be read: {0}")]
    Read(std::io::Error),
    /// A number leads nowhere.
    #[error("descriptor {0} was named for the {1} but is not open, or was named twice")]
    Missing(i32, &'static str),
}

/// Reads the configuration that this process inherited, takes the descriptors that it names, and
/// closes all others.
pub fn inherit() -> Result<(VmConfig, Files), FilesError> {
    let file = File::from(sys::inherited(CONFIG_FD).ok_or(FilesError::Config)?);
    let config = read_sealed(&file)?;
    let numbers = named(&config);
    // From here on the number of the configuration can be given out again.
    drop(file);
    let mut next = CONFIG_FD;
    for number in numbers.iter().copied().chain([i32::MAX]) {
        if let (Ok(first), Ok(last)) = (u32::try_from(next), u32::try_from(number - 1))
            && first <= last
        {
            sys::close_range(first, last);
        }
        next = number.saturating_add(1);
    }
    let taken = numbers
        .into_iter()
        .filter_map(|number| Some((number, sys::inherited(number)?)));
    Ok((
        config,
        Files {
            unused: taken.collect(),
            shared: BTreeMap::new(),
        },
    ))
}

fn read_sealed(file: &File) -> Result<VmConfig, FilesError> {
    let needed = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW;
    let seals = rustix::fs::fcntl_get_seals(file).map_err(|_| FilesError::Config)?;
    let length = file.metadata().map_err(FilesError::Read)?.len();
    if !seals.contains(needed) || length > MAX_CONFIG_BYTES {
        return Err(FilesError::Config);
    }
    let mut bytes = vec![0; length as usize];
    std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, 0).map_err(FilesError::Read)?;
    Ok(VmConfig::parse(&bytes)?)
}

/// All numbers that a configuration names, in ascending order.
fn named(config: &VmConfig) -> Vec<i32> {
    let Fd(first) = config.kvm;
    let mut numbers = vec![
        first,
        config.kernel.0,
        config.control.0,
        config.exit_record.0,
    ];
    numbers.extend(
        config
            .initramfs
            .iter()
            .chain(&config.console)
            .chain(&config.cgroup_procs)
            .map(|fd| fd.0),
    );
    for device in &config.devices {
        match device {
            Device::Block(block) => numbers.extend(block.extents.iter().map(|e| e.file.0)),
            Device::Net(net) => {
                numbers.push(net.tap.0);
                numbers.extend(net.more_taps.iter().map(|tap| tap.0));
            }
        }
    }
    numbers.retain(|number| *number > CONFIG_FD);
    numbers.sort_unstable();
    numbers.dedup();
    numbers
}

impl Files {
    /// The descriptors that came with a request, numbered from 0.
    pub fn received(descriptors: Vec<OwnedFd>) -> Self {
        Self {
            unused: (0..).zip(descriptors).collect(),
            shared: BTreeMap::new(),
        }
    }

    /// Takes a descriptor; `purpose` says for what.
    pub fn take(&mut self, fd: Fd, purpose: &'static str) -> Result<OwnedFd, FilesError> {
        self.unused
            .remove(&fd.0)
            .ok_or(FilesError::Missing(fd.0, purpose))
    }

    /// The file of an extent.
    pub fn extent(&mut self, fd: Fd) -> Result<Arc<File>, FilesError> {
        if let Some(file) = self.shared.get(&fd.0) {
            return Ok(file.clone());
        }
        let file = Arc::new(File::from(self.take(fd, "extent of a disk")?));
        self.shared.insert(fd.0, file.clone());
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(count: usize) -> Files {
        Files::received(
            (0..count)
                .map(|_| tempfile::tempfile().unwrap().into())
                .collect(),
        )
    }

    #[test]
    fn a_descriptor_is_used_once_but_an_extents_file_more_often() {
        let mut files = files(2);
        assert!(files.take(Fd(0), "tap").is_ok());
        assert!(files.take(Fd(0), "tap").is_err());
        let file = files.extent(Fd(1)).unwrap();
        assert!(Arc::ptr_eq(&file, &files.extent(Fd(1)).unwrap()));
        assert!(files.take(Fd(1), "tap").is_err());
        assert!(files.extent(Fd(-1)).is_err());
    }

    #[test]
    fn every_descriptor_of_a_configuration_is_kept_open() {
        let config = r#"{"version": 1, "id": "pod", "kvm": 4, "kernel": 5, "initramfs": 6,
            "command_line": "", "memory_mib": 64, "vcpus": 1, "guest_cid": 3, "control": 7,
            "exit_record": 8, "console": 9, "cgroup_procs": 10, "devices": [
            {"block": {"serial": "a", "read_only": true, "extents": [
                {"file": 11, "offset": 0, "length": 4096}, {"file": 12, "offset": 0, "length": 512}
            ]}},
            {"net": {"tap": 13, "mac": [2, 0, 0, 0, 0, 1], "mtu": 1500}}]}"#;
        let config = VmConfig::parse(config.as_bytes()).unwrap();
        assert_eq!(named(&config), (4..=13).collect::<Vec<_>>());
    }

    #[test]
    fn an_unsealed_configuration_is_refused() {
        assert!(matches!(
            read_sealed(&tempfile::tempfile().unwrap()),
            Err(FilesError::Config)
        ));
    }
}

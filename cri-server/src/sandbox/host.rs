//! What all pods of a server share: the machine, and the other rooms.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulkhead_cri_api::v1 as cri;
use rustix::rand::GetRandomFlags;

use super::SandboxError;
use super::event::Events;
use super::record::{Container, Records, hexadecimal};
use crate::cgroup::{Hierarchy, PodCgroup};
use crate::config::{Artefacts, Config};
use crate::container::log::Place;
use crate::image::ImageStore;
use crate::metrics::Metrics;
use crate::network::Network;
use crate::vm;

/// Where pods are made.
pub struct Host {
    /// The server's configuration.
    pub config: Config,
    /// The pods' records.
    pub records: Records,
    /// The pods' network.
    pub network: Network,
    /// The images.
    pub images: ImageStore,
    /// The server's own figures.
    pub metrics: Arc<Metrics>,
    /// Where it is told what happens to pods.
    pub events: Events,
    /// This boot of the machine.
    pub boot: String,
    hierarchy: Result<Hierarchy, String>,
}

/// What a VMM is started from, open.
#[derive(Debug)]
pub struct OpenArtefacts {
    /// `bulkhead-vmm`.
    pub vmm: PathBuf,
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// The kernel.
    pub kernel: OwnedFd,
    /// The initramfs.
    pub initramfs: OwnedFd,
}

impl Host {
    /// Looks at the machine. What is missing is told when a pod is asked for. Blocks.
    pub fn new(config: Config, network: Network, images: ImageStore) -> std::io::Result<Self> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        Ok(Self {
            records: Records::under(&config.root),
            network,
            images,
            metrics: Arc::default(),
            events: Events::default(),
            boot: boot.trim().to_owned(),
            hierarchy: Hierarchy::detect().map_err(|error| error.to_string()),
            config,
        })
    }

    /// Whether pods can run here; why not. Blocks.
    pub fn ready(&self) -> Result<(), String> {
        self.artefacts()?;
        self.hierarchy.as_ref().map_err(String::clone)?;
        Ok(())
    }

    /// Opens what a VMM is started from. Blocks.
    pub fn artefacts(&self) -> Result<OpenArtefacts, String> {
        let found = Artefacts::find()?;
        let mut options = OpenOptions::new();
        let kvm = options.read(true).write(true).open("/dev/kvm");
        let kvm = kvm.map_err(|error| {
            format!("/dev/kvm cannot be opened ({error}): pods need hardware virtualisation")
        })?;
        let open = |path: &Path| {
            File::open(path)
                .map(OwnedFd::from)
                .map_err(|error| format!("{} cannot be opened: {error}", path.display()))
        };
        Ok(OpenArtefacts {
            vmm: found.vmm,
            kvm: kvm.into(),
            kernel: open(&found.kernel)?,
            initramfs: open(&found.initramfs)?,
        })
    }

    /// The cgroup of a pod; it may not exist.
    pub fn cgroup(&self, id: &str, pod: &cri::PodSandboxConfig) -> Result<PodCgroup, SandboxError> {
        let hierarchy = self.hierarchy.as_ref();
        let hierarchy = hierarchy.map_err(|why| SandboxError::Unavailable(why.clone()))?;
        let linux = pod.linux.as_ref();
        let parent = linux.map_or("", |linux| &linux.cgroup_parent);
        Ok(hierarchy.pod(parent, id)?)
    }

    /// The pod's directory for sockets.
    pub fn run_directory(&self, id: &str) -> PathBuf {
        self.config.run.join("sandboxes").join(id)
    }

    /// The files of the pod's VMM.
    pub fn vm_files(&self, id: &str) -> vm::Files {
        vm::Files::under(&self.run_directory(id))
    }

    /// Where a container's log is, and how far its output is in it.
    pub fn log_place(&self, pod: &str, container: &Container) -> Place {
        let record = format!("{}.offsets", container.id);
        Place {
            log: container.log_path.clone(),
            record: self.run_directory(pod).join(record),
        }
    }

    /// The pod's scratch disk.
    pub fn scratch(&self, id: &str) -> PathBuf {
        self.records.directory(id).join("scratch.ext4")
    }

    /// Where formatted disks are kept to be copied.
    pub fn templates(&self) -> PathBuf {
        self.config.root.join("templates")
    }
}

/// Bytes nobody can guess.
pub fn random() -> Result<[u8; 32], SandboxError> {
    let mut bytes = [0; 32];
    // Requests of up to 256 bytes are answered whole.
    match rustix::rand::getrandom(&mut bytes, GetRandomFlags::empty()) {
        Ok(32) => Ok(bytes),
        Ok(count) => Err(SandboxError::Random(format!("only {count} bytes came"))),
        Err(error) => Err(SandboxError::Random(error.to_string())),
    }
}

/// A new id for a pod, a container or an operation: 64 hexadecimal digits.
///
/// Guest and VMM remember what they answered to an operation, failures too. So each attempt is an
/// operation of its own; only what can be done but once keeps its id when it is asked for again.
pub fn new_id() -> Result<String, SandboxError> {
    Ok(hexadecimal(&random()?))
}

/// Nanoseconds since 1970.
pub fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since
        .ok()
        .and_then(|since| i64::try_from(since.as_nanos()).ok())
        .unwrap_or(0)
}

//! The machine a suite runs on, with what its cases share: a registry, a server, scratch space.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_cri_api::v1::PodSandboxConfig;

use crate::fake_registry::FakeRegistry;
use crate::footprint::Footprint;
use crate::registry::Registry;
use crate::request::{self, CGROUP_PARENT, Pod};
use crate::server::{Plan, Runtime, Server};
use crate::{Cri, leak};

/// The image most cases use: a shell, users and some awkward files in three layers.
pub const BASE: &str = "test/base:1";
/// A Debian image with a web server and perl.
pub const WEB: &str = "demo/web:1";

/// Where `bulkhead`, `bulkhead-vmm`, `vmlinux` and `initramfs` are.
const PROGRAMS: &str = "BULKHEAD_BIN_DIR";
/// Where the registry's storage is.
const ASSETS: &str = "BULKHEAD_TEST_ASSETS";
/// How long the pods' cgroup may take to be empty.
const CGROUP_LIMIT: Duration = Duration::from_secs(20);
/// `reference` to test the reference.
const RUNTIME: &str = "BULKHEAD_TEST_RUNTIME";

/// By how much a soak multiplies the counts.
const FACTOR: &str = "BULKHEAD_TEST_FACTOR";

/// Whether the reference is what is tested.
pub fn is_reference() -> bool {
    std::env::var_os(RUNTIME).is_some_and(|value| value == "reference")
}

/// How often to do what is to be done `count` times: so many times more in a soak.
pub fn counted(count: u32) -> u32 {
    let factor = std::env::var(FACTOR).ok();
    let factor = factor.and_then(|factor| factor.parse().ok()).unwrap_or(1);
    count.saturating_mul(factor)
}

/// The machine.
pub struct Node {
    /// Serves the test images.
    pub registry: Registry,
    /// Serves images that are not what they seem.
    pub fake_registry: FakeRegistry,
    runtime: Runtime,
    programs: PathBuf,
    server: OnceLock<Server>,
    spoiled: AtomicBool,
    /// The host's network before anything ran.
    footprint: Mutex<Footprint>,
    // Last, so that it goes after what lies in it.
    scratch: Scratch,
}

impl Node {
    /// Starts the registry. Fails, with what to do, where the tests cannot run.
    pub fn open(suite: &str) -> Result<Self> {
        let directory = |name: &str| -> Result<PathBuf> {
            let value = std::env::var_os(name).with_context(|| {
                format!("{name} is not set: run the suites by `cargo xtask test`")
            })?;
            PathBuf::from(value)
                .canonicalize()
                .with_context(|| name.to_owned())
        };
        let runtime = if is_reference() {
            Runtime::Reference
        } else {
            Runtime::Bulkhead
        };
        let programs = match runtime {
            Runtime::Bulkhead => directory(PROGRAMS)?,
            Runtime::Reference => PathBuf::new(),
        };
        let assets = directory(ASSETS)?;
        ensure!(rustix::process::geteuid().is_root(), "the suites need root");
        let scratch = Scratch::mount(suite, "size=75%")?;
        make_cgroup_parent()?;
        let footprint = Mutex::new(Footprint::look()?);
        Ok(Self {
            registry: Registry::start(&assets.join("registry"), scratch.path())?,
            fake_registry: FakeRegistry::start()?,
            runtime,
            programs,
            server: OnceLock::new(),
            spoiled: AtomicBool::new(false),
            footprint,
            scratch,
        })
    }

    /// The server the suite's cases share.
    pub fn server(&self) -> Result<&Server> {
        if let Some(server) = self.server.get() {
            return Ok(server);
        }
        let server = self.plan("shared").start()?;
        Ok(self.server.get_or_init(|| server))
    }

    /// Speaks to the shared server.
    pub fn cri(&self) -> Result<&Cri> {
        Ok(&self.server()?.cri)
    }

    /// A server of a case's own, named in its paths; to be changed and started.
    pub fn plan(&self, name: &str) -> Plan {
        Plan {
            runtime: self.runtime,
            home: self.scratch.path().join(name),
            programs: self.programs.clone(),
            registry: self.registry.address().to_string(),
            fake_registry: self.fake_registry.address().to_string(),
            root: None,
            settings: String::new(),
            cni: None,
            network: String::new(),
            private_mounts: None,
        }
    }

    /// Where `bulkhead` and what belongs to it are.
    pub fn programs(&self) -> &Path {
        &self.programs
    }

    /// Room for files of a case's own, in memory.
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// Makes an image of the registry present on the shared server and answers its full name.
    pub fn image(&self, image: &str) -> Result<String> {
        self.image_on(self.cri()?, image)
    }

    /// As [`Node::image`], on another server.
    pub fn image_on(&self, cri: &Cri, image: &str) -> Result<String> {
        let name = self.registry.name(image);
        if cri.image(&name)?.is_none() {
            cri.pull(&name)
                .with_context(|| format!("PullImage {name}"))?;
        }
        Ok(name)
    }

    /// The base image on the shared server.
    pub fn base(&self) -> Result<String> {
        self.image(BASE)
    }

    /// A pod's configuration, its log directory made as a kubelet would.
    pub fn pod_config(&self, name: &str) -> Result<PodSandboxConfig> {
        let config = request::pod(name, &self.scratch.path().join("logs"));
        // Names come again in other cases, their logs must not.
        if Path::new(&config.log_directory).exists() {
            fs::remove_dir_all(&config.log_directory)?;
        }
        fs::create_dir_all(&config.log_directory)?;
        Ok(config)
    }

    /// A running pod on the shared server.
    pub fn pod(&self, name: &str) -> Result<Pod<'_>> {
        Pod::run(self.cri()?, self.pod_config(name)?)
    }

    /// Removes what a case made on the shared server, except images.
    pub fn clean(&self) -> Result<()> {
        self.server.get().map_or(Ok(()), Server::remove_pods)
    }

    /// Remembers that a case has failed, which may have left a server of its own with its pods: what
    /// there is of them is told with the case.
    pub fn spoil(&self) {
        self.spoiled.store(true, Ordering::Relaxed);
        let mut footprint = self
            .footprint
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = footprint.excuse() {
            eprintln!("the host's network cannot be looked at: {error:#}");
        }
    }

    /// Ends the server and checks that it leaves nothing that runs or is mounted, and the host's
    /// network as it was. What a case that failed has left was told with it, and is no fault of the
    /// end. The reference's plugins leave their bridge; of them only the rules are compared.
    pub fn close(self) -> Result<()> {
        let Some(server) = self.server.into_inner() else {
            return Ok(());
        };
        let home = self.scratch.path().to_owned();
        server.stop()?;
        let before = self
            .footprint
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        match self.runtime {
            Runtime::Bulkhead => before.expect_again()?,
            Runtime::Reference => before.expect_of_plugins()?,
        }
        if self.spoiled.into_inner() {
            return Ok(());
        }
        leak::expect_unused(&home)?;
        remove_cgroup_parent()
    }
}

/// Where the pods' cgroups are.
fn cgroup_parent() -> PathBuf {
    Path::new("/sys/fs/cgroup").join(CGROUP_PARENT.trim_start_matches('/'))
}

/// Removes it, as soon as the last pod's is gone; the error says what is in it.
fn remove_cgroup_parent() -> Result<()> {
    let path = cgroup_parent();
    let begun = Instant::now();
    loop {
        let Err(error) = fs::remove_dir(&path) else {
            return Ok(());
        };
        if error.kind() != ErrorKind::ResourceBusy || begun.elapsed() > CGROUP_LIMIT {
            let below = fs::read_dir(&path)?.flatten().map(|entry| entry.path());
            let groups: Vec<_> = below.filter(|path| path.is_dir()).collect();
            let events = fs::read_to_string(path.join("cgroup.events"))?;
            return Err(error).context(format!("the pods' cgroup: {groups:?}, {events}"));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The cgroup a kubelet would have made for the node's pods.
fn make_cgroup_parent() -> Result<()> {
    let top = Path::new("/sys/fs/cgroup");
    ensure!(
        top.join("cgroup.controllers").exists(),
        "cgroup v2 is not mounted at /sys/fs/cgroup: run the suites by `cargo xtask test`"
    );
    let parent = cgroup_parent();
    fs::create_dir_all(&parent)?;
    for group in [top, &parent] {
        let control = group.join("cgroup.subtree_control");
        fs::write(&control, "+cpu +memory +pids").with_context(|| control.display().to_string())?;
    }
    Ok(())
}

/// A memory file system of a test's own: the bed's root cannot hold overlays.
pub struct Scratch(PathBuf);

impl Scratch {
    /// Mounts one, with tmpfs options such as `size=16m`.
    pub fn mount(name: &str, options: &str) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("bulkhead-{name}-{}", std::process::id()));
        fs::create_dir_all(&path)?;
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "bulkhead-tests"])
            .arg(&path)
            .status()?;
        ensure!(
            status.success(),
            "mount of a tmpfs on {}: {status}",
            path.display()
        );
        Ok(Self(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Lazily: a server that was killed may still be going. The machine is thrown away anyway.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
        let _ = fs::remove_dir(&self.0);
    }
}

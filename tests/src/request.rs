//! What a kubelet would ask for: configurations to start from, and a pod to do it in.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use bulkhead_cri_api::v1::*;

use crate::cri::{Cri, image_spec};
use crate::log::{self, Line, Stream};

/// The cgroup below which all pods of the tests live.
pub const CGROUP_PARENT: &str = "/bulkhead-tests";

/// A pod's configuration, with logs in `logs/NAME`.
pub fn pod(name: &str, logs: &std::path::Path) -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.to_owned(),
            uid: format!("{name}-uid"),
            namespace: "tests".to_owned(),
            attempt: 0,
        }),
        hostname: name.to_owned(),
        log_directory: logs.join(name).display().to_string(),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: CGROUP_PARENT.to_owned(),
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces()),
                ..LinuxSandboxSecurityContext::default()
            }),
            ..LinuxPodSandboxConfig::default()
        }),
        ..PodSandboxConfig::default()
    }
}

/// A container's configuration: `command` in place of the image's.
pub fn container(name: &str, image: &str, command: &[&str]) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata {
            name: name.to_owned(),
            attempt: 0,
        }),
        image: Some(image_spec(image)),
        command: command.iter().map(|&word| word.to_owned()).collect(),
        log_path: format!("{name}.log"),
        linux: Some(LinuxContainerConfig {
            resources: None,
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(namespaces()),
                ..LinuxContainerSecurityContext::default()
            }),
        }),
        ..ContainerConfig::default()
    }
}

/// A container that runs a line of shell.
pub fn shell(name: &str, image: &str, line: &str) -> ContainerConfig {
    container(name, image, &["/bin/sh", "-c", line])
}

/// A container that stays until it is stopped, and then goes at once.
pub fn sleeper(name: &str, image: &str) -> ContainerConfig {
    shell(name, image, "trap 'exit 0' TERM; while :; do sleep 1; done")
}

/// The namespaces a kubelet asks for: the pod's network and IPC, a PID namespace per container.
fn namespaces() -> NamespaceOption {
    NamespaceOption {
        network: NamespaceMode::Pod.into(),
        pid: NamespaceMode::Container.into(),
        ipc: NamespaceMode::Pod.into(),
        ..NamespaceOption::default()
    }
}

/// A container's security settings, to be changed in place.
pub fn security(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default()
}

/// A container's limits, to be changed in place.
pub fn resources(config: &mut ContainerConfig) -> &mut LinuxContainerResources {
    let linux = config.linux.get_or_insert_default();
    linux.resources.get_or_insert_default()
}

/// A pod's security settings, to be changed in place.
pub fn pod_security(config: &mut PodSandboxConfig) -> &mut LinuxSandboxSecurityContext {
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default()
}

/// A pod's limits, to be changed in place.
pub fn pod_resources(config: &mut PodSandboxConfig) -> &mut LinuxContainerResources {
    let linux = config.linux.get_or_insert_default();
    linux.resources.get_or_insert_default()
}

/// A number that is present.
pub fn number(value: i64) -> Option<Int64Value> {
    Some(Int64Value { value })
}

/// A pod that runs. It is removed by whoever made the server, at the end of the case.
pub struct Pod<'a> {
    /// Its server.
    pub cri: &'a Cri,
    /// What it was made with.
    pub config: PodSandboxConfig,
    /// Its id.
    pub id: String,
}

/// A container that has run to its end.
pub struct Ended {
    /// Its last status.
    pub status: ContainerStatus,
    /// Its log.
    pub log: Vec<Line>,
}

impl Ended {
    /// What it wrote to standard output.
    pub fn stdout(&self) -> String {
        log::text(&self.log, Stream::Stdout)
    }

    /// What it wrote to standard error.
    pub fn stderr(&self) -> String {
        log::text(&self.log, Stream::Stderr)
    }
}

impl<'a> Pod<'a> {
    /// Runs a pod.
    pub fn run(cri: &'a Cri, config: PodSandboxConfig) -> Result<Self> {
        let id = cri.run_pod(&config).context("RunPodSandbox")?;
        Ok(Self { cri, config, id })
    }

    /// Creates a container.
    pub fn create(&self, config: &ContainerConfig) -> Result<String> {
        let id = self.cri.create(&self.id, config, &self.config);
        id.context("CreateContainer")
    }

    /// Creates and starts a container.
    pub fn start(&self, config: &ContainerConfig) -> Result<String> {
        let id = self.create(config)?;
        self.cri.start(&id).context("StartContainer")?;
        Ok(id)
    }

    /// Runs a container to its end.
    pub fn run_to_end(&self, config: &ContainerConfig) -> Result<Ended> {
        let id = self.start(config)?;
        let status = self.cri.wait(&id)?;
        let path = self.log_path(config);
        let mut log = log::read(&path)?;
        if crate::node::is_reference() {
            // It may report an exit before it has written all the container said.
            std::thread::sleep(Duration::from_millis(500));
            log = log::read(&path)?;
        }
        Ok(Ended { status, log })
    }

    /// Where a container's log lies.
    pub fn log_path(&self, config: &ContainerConfig) -> PathBuf {
        PathBuf::from(&self.config.log_directory).join(&config.log_path)
    }
}

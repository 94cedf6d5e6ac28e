//! A CRI server with state of its own, started as its user would start it.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bulkhead_cri_api::v1::{PodSandboxFilter, VersionRequest};
use rustix::process::{Pid, Signal, kill_process};

use crate::Cri;

/// How long a server may take until it answers.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How long it may take to end after SIGTERM.
const STOP_LIMIT: Duration = Duration::from_secs(30);
/// Bytes of its log shown with a failure.
const TAIL_BYTES: usize = 6 << 10;

/// Which server it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    /// This project's.
    Bulkhead,
    /// Debian's containerd with runc.
    Reference,
}

/// How to start a server.
pub struct Plan {
    /// Which one.
    pub runtime: Runtime,
    /// A directory of its own: configuration, state, sockets and log go there.
    pub home: PathBuf,
    /// Where `bulkhead` is, with what it needs beside it.
    pub programs: PathBuf,
    /// The registry of the test images, `host:port`.
    pub registry: String,
    /// The registry that lies, `host:port`.
    pub fake_registry: String,
    /// What outlives a reboot; in `home` unless given.
    pub root: Option<PathBuf>,
    /// Further lines of the configuration, before its first table.
    pub settings: String,
    /// The only network of its CNI directory; the runtime's own way to have a network unless given.
    pub cni: Option<serde_json::Value>,
    /// Further lines of the configuration's table `network`.
    pub network: String,
    /// Shell that changes the mounts the server sees, and nobody else.
    pub private_mounts: Option<String>,
}

/// A running server.
pub struct Server {
    /// Speaks to it.
    pub cri: Cri,
    runtime: Runtime,
    home: PathBuf,
    root: PathBuf,
    log: PathBuf,
    child: Child,
}

impl Plan {
    /// Starts the server and waits until it answers.
    pub fn start(self) -> Result<Server> {
        fs::create_dir_all(self.home.join("run"))?;
        self.write_network()?;
        let root = self.root.clone().unwrap_or_else(|| self.home.join("root"));
        fs::create_dir_all(&root)?;
        let socket = self.home.join("run/cri.sock");
        let config = self.home.join("config.toml");
        let mut command = match self.runtime {
            Runtime::Bulkhead => {
                fs::write(&config, self.bulkhead_config(&root, &socket))?;
                let mut command = self.command(&self.programs.join("bulkhead"));
                command.arg("serve").arg("--config").arg(&config);
                command
            }
            Runtime::Reference => {
                fs::write(&config, self.containerd_config(&root, &socket)?)?;
                let mut command = self.command(Path::new("containerd"));
                command.arg("--config").arg(&config);
                command
            }
        };
        let log = self.home.join("log");
        let out = File::create(&log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .with_context(|| format!("{command:?}"))?;
        let mut server = Server {
            cri: Cri::new(&socket)?,
            runtime: self.runtime,
            home: self.home,
            root,
            log,
            child,
        };
        let begun = Instant::now();
        while !socket.exists() || server.cri.version(VersionRequest::default()).is_err() {
            let ended = server.child.try_wait()?;
            if ended.is_some() || begun.elapsed() > START_LIMIT {
                bail!(
                    "the server does not answer: {ended:?}\n{}",
                    server.log_tail()
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(server)
    }

    /// `program`, in a mount namespace of its own if it shall see other mounts.
    fn command(&self, program: &Path) -> Command {
        let Some(setup) = &self.private_mounts else {
            return Command::new(program);
        };
        let mut command = Command::new("unshare");
        command.args(["--mount", "--", "/bin/sh", "-ec"]);
        command
            .arg(format!("{setup}\nexec \"$@\""))
            .arg("sh")
            .arg(program);
        command
    }

    /// Writes the CNI network that the server shall have, if any.
    fn write_network(&self) -> Result<()> {
        let own = match self.runtime {
            Runtime::Bulkhead => None,
            Runtime::Reference => Some(serde_json::json!({
                "cniVersion": "0.4.0", "name": "tests", "plugins": [{
                    "type": "bridge", "bridge": "cni-tests", "isGateway": true,
                    "ipam": {"type": "host-local", "dataDir": self.home.join("addresses"),
                        "ranges": [[{"subnet": "10.101.0.0/16"}]],
                        "routes": [{"dst": "0.0.0.0/0"}]}}]})),
        };
        let Some(network) = self.cni.clone().or(own) else {
            return Ok(());
        };
        let (directory, programs) = (self.cni_directory(), self.home.join("cni-plugins"));
        fs::create_dir_all(&directory)?;
        fs::create_dir_all(&programs)?;
        // One directory for plugins is all that containerd takes.
        for entry in fs::read_dir("/usr/lib/cni").context("CNI plugins")? {
            let path = entry?.path();
            let link = programs.join(path.file_name().unwrap_or_default());
            if !link.exists() {
                std::os::unix::fs::symlink(&path, link)?;
            }
        }
        fs::write(directory.join("10-tests.conflist"), network.to_string())?;
        Ok(())
    }

    fn bulkhead_config(&self, root: &Path, socket: &Path) -> String {
        let Self {
            home,
            settings,
            network,
            registry,
            fake_registry,
            ..
        } = self;
        format!(
            r#"root = "{root}"
run = "{home}/run"
socket = "{socket}"
{settings}
[network]
cni = "{cni}"
cni_plugins = ["{home}/cni-plugins", "/usr/lib/cni"]
{network}
[registry."{registry}"]
plain_http = true
[registry."{fake_registry}"]
plain_http = true
[registry."mirrored.test"]
mirrors = ["{registry}"]
"#,
            root = root.display(),
            home = home.display(),
            socket = socket.display(),
            cni = self.cni_directory().display(),
        )
    }

    /// Where this server looks for CNI networks. Without one it does not exist.
    pub fn cni_directory(&self) -> PathBuf {
        self.home.join("cni")
    }

    fn containerd_config(&self, root: &Path, socket: &Path) -> Result<String> {
        let Self { home, registry, .. } = self;
        let (cni, hosts) = (self.cni_directory(), home.join("hosts"));
        fs::create_dir_all(hosts.join("mirrored.test"))?;
        fs::write(
            hosts.join("mirrored.test/hosts.toml"),
            format!("[host.\"http://{registry}\"]\ncapabilities = [\"pull\", \"resolve\"]\n"),
        )?;
        Ok(format!(
            r#"version = 2
root = "{root}"
state = "{home}/run"
[grpc]
address = "{socket}"
[debug]
level = "warn"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{registry}/test/pause:1"
disable_apparmor = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{home}/cni-plugins"
conf_dir = "{cni}"
[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "{hosts}"
"#,
            root = root.display(),
            home = home.display(),
            socket = socket.display(),
            cni = cni.display(),
            hosts = hosts.display(),
        ))
    }
}

impl Server {
    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has of memory that no file lies behind, in KiB.
    pub fn memory(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"));
        let number = line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok());
        number.with_context(|| format!("no RssAnon in {status}"))
    }

    /// Which one it is.
    pub fn runtime(&self) -> Runtime {
        self.runtime
    }

    /// Where it serves the CRI.
    pub fn socket(&self) -> PathBuf {
        self.home.join("run/cri.sock")
    }

    /// What outlives a reboot.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Directories in which nothing may be left when there is no pod.
    pub fn pod_state(&self) -> Vec<PathBuf> {
        match self.runtime {
            Runtime::Bulkhead => vec![self.root.join("sandboxes"), self.home.join("run")],
            Runtime::Reference => {
                let cri = self.root.join("io.containerd.grpc.v1.cri");
                vec![
                    cri.join("sandboxes"),
                    cri.join("containers"),
                    self.home.join("run/io.containerd.runtime.v2.task"),
                    self.home.join("addresses"),
                ]
            }
        }
    }

    /// How long its log is.
    pub fn log_length(&self) -> usize {
        fs::metadata(&self.log).map_or(0, |log| usize::try_from(log.len()).unwrap_or(usize::MAX))
    }

    /// The end of what it logged since its log had a length.
    pub fn log_since(&self, length: usize) -> String {
        let log = fs::read(&self.log).unwrap_or_default();
        let from = length.max(log.len().saturating_sub(TAIL_BYTES));
        String::from_utf8_lossy(log.get(from..).unwrap_or_default()).into_owned()
    }

    /// The end of what it logged.
    pub fn log_tail(&self) -> String {
        self.log_since(0)
    }

    /// Removes every pod.
    pub fn remove_pods(&self) -> Result<()> {
        for pod in self.cri.pod_ids(PodSandboxFilter::default())? {
            self.cri.stop_pod(&pod)?;
            self.cri.remove_pod(&pod)?;
        }
        Ok(())
    }

    /// Removes every pod and ends the server, which must end well.
    pub fn stop(mut self) -> Result<()> {
        self.remove_pods()?;
        let status = self.terminate()?;
        let well = status.success() || status.signal() == Some(Signal::TERM.as_raw());
        ensure!(well, "the server ended with {status}\n{}", self.log_tail());
        Ok(())
    }

    /// Ends the server at once, as if by accident. Its pods run on.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    fn terminate(&mut self) -> Result<ExitStatus> {
        if let Some(pid) = Pid::from_raw(self.child.id().cast_signed()) {
            kill_process(pid, Signal::TERM)?;
        }
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if begun.elapsed() > STOP_LIMIT {
                bail!("the server goes on after SIGTERM\n{}", self.log_tail());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A case that failed leaves it running; one that stopped it finds nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How long a phase of the last pod's start took, which no client sees, by what a server's log says
/// of it; in nanoseconds.
pub fn phase(log: &str, name: &str) -> Result<u64> {
    let line = log.lines().rfind(|line| line.contains("guest_us="));
    let line = line.context("the server's log says nothing of how its guest started")?;
    let mut words = line.split_whitespace();
    let figure = words.find_map(|word| word.strip_prefix(name)?.strip_prefix("_us="));
    let microseconds: Option<u64> = figure.and_then(|figure| figure.parse().ok());
    Ok(microseconds.with_context(|| format!("no {name} in: {line}"))? * 1000)
}

//! What pods may leave behind: processes, mounts, network namespaces, interfaces, cgroups, files,
//! and open descriptors of the server.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::server::Runtime;
use crate::{Node, Server};

/// How long what was removed may take to be gone.
const SETTLE_LIMIT: Duration = Duration::from_secs(20);

/// The machine at one moment, as far as pods change it. Everything is a line of text that says
/// what and which.
#[derive(Debug, PartialEq, Eq)]
pub struct Machine(BTreeSet<String>);

impl Machine {
    /// Looks at the machine as a node's shared server sees it.
    pub fn look(node: &Node) -> Result<Self> {
        Self::look_at(node.server()?)
    }

    /// Looks at the machine as a server sees it.
    pub fn look_at(server: &Server) -> Result<Self> {
        let mut found = BTreeSet::new();
        processes(server.pid(), &mut found)?;
        mounts(server.pid(), &mut found)?;
        interfaces(&mut found)?;
        cgroups(Path::new("/sys/fs/cgroup"), 0, &mut found);
        for directory in server.pod_state() {
            files(&directory, &mut found);
        }
        if server.runtime() == Runtime::Bulkhead {
            descriptors(server.pid(), &mut found)?;
        }
        Ok(Self(found))
    }

    /// Waits until there is no more than at this moment.
    pub fn settles_again(&self, node: &Node) -> Result<()> {
        self.settles_again_at(node.server()?)
    }

    /// As [`Machine::settles_again`], seen by another server.
    pub fn settles_again_at(&self, server: &Server) -> Result<()> {
        let begun = Instant::now();
        loop {
            let now = Self::look_at(server)?;
            let left: Vec<_> = now.0.difference(&self.0).cloned().collect();
            if left.is_empty() {
                return Ok(());
            }
            if begun.elapsed() > SETTLE_LIMIT {
                bail!("left behind:\n  {}", left.join("\n  "));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Fails if a mount lies in a directory.
pub fn expect_unused(directory: &Path) -> Result<()> {
    let text = directory.display().to_string();
    let mut left = BTreeSet::new();
    mounts(std::process::id(), &mut left)?;
    left.retain(|line| line.contains(&format!("{text}/")));
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}

/// Processes and the network namespaces they are in; kernel threads do not count, nor do
/// processes that have ended and wait for somebody other than the server.
fn processes(server: u32, found: &mut BTreeSet<String>) -> Result<()> {
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let Some(pid) = path
            .file_name()
            .and_then(|name| name.to_str()?.parse::<u32>().ok())
        else {
            continue;
        };
        // A process that ends while it is looked at is none.
        let Ok(stat) = fs::read_to_string(path.join("stat")) else {
            continue;
        };
        let Some((state, parent)) = state_and_parent(&stat) else {
            continue;
        };
        let waits = state == 'Z' && parent != server;
        if pid == 2 || parent == 2 || waits {
            continue;
        }
        let command = fs::read(path.join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        found.insert(format!("process {pid} {command}"));
        if let Ok(namespace) = fs::read_link(path.join("ns/net")) {
            found.insert(format!("netns {}", namespace.display()));
        }
    }
    Ok(())
}

/// Fields 3 and 4 of `/proc/PID/stat`; the name before them may hold anything.
fn state_and_parent(stat: &str) -> Option<(char, u32)> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    let state = fields.next()?.chars().next()?;
    Some((state, fields.next()?.parse().ok()?))
}

/// Mount points in a process's mount namespace; pinned network namespaces are mounts too.
fn mounts(process: u32, found: &mut BTreeSet<String>) -> Result<()> {
    let path = format!("/proc/{process}/mountinfo");
    let table = fs::read_to_string(&path).context(path)?;
    for line in table.lines() {
        let mut fields = line.split(' ').skip(4);
        let point = fields.next().unwrap_or_default();
        let kind = line.split(" - ").nth(1).unwrap_or_default();
        found.insert(format!("mount {point} {kind}"));
    }
    Ok(())
}

/// Interfaces of the host, except bridges: a server keeps its own as long as it lives.
fn interfaces(found: &mut BTreeSet<String>) -> Result<()> {
    for entry in fs::read_dir("/sys/class/net")? {
        let path = entry?.path();
        if !path.join("bridge").exists() {
            found.insert(format!("interface {}", path.display()));
        }
    }
    Ok(())
}

/// Cgroups below the top level, where servers and kubelets keep lasting ones.
fn cgroups(directory: &Path, depth: u32, found: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    for path in entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
    {
        if depth > 0 {
            found.insert(format!("cgroup {}", path.display()));
        }
        cgroups(&path, depth + 1, found);
    }
}

/// Files in a directory, however deep.
fn files(directory: &PathBuf, found: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        // Made for the first pod and kept; what is in them counts.
        let lasting = [
            "k8s.io",
            "last_reserved_ip.0",
            "lock",
            "netns",
            "sandboxes",
            "tests",
        ];
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files(&path, found);
        }
        if lasting.iter().any(|name| path.ends_with(name)) {
            continue;
        }
        found.insert(format!("file {}", path.display()));
    }
}

/// What the server has open, by kind; the n-th of a kind is a line of its own, so that one more
/// than before is seen whatever its number.
///
/// Connections over TCP do not count: those to a registry are kept for the next request and go
/// away by themselves.
fn descriptors(server: u32, found: &mut BTreeSet<String>) -> Result<()> {
    let of_tcp = tcp_sockets(server)?;
    let mut kinds = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{server}/fd"))? {
        // One that is closed while it is looked at is none.
        let Ok(target) = fs::read_link(entry?.path()) else {
            continue;
        };
        let target = target.display().to_string();
        if of_tcp.contains(&target) {
            continue;
        }
        // `socket:[4711]` and `pipe:[4711]`, but `anon_inode:[pidfd]` and paths.
        let kind = match target.split_once(":[") {
            Some((kind @ ("socket" | "pipe"), _)) => kind.to_owned(),
            _ => target,
        };
        let count = kinds.entry(kind.clone()).or_insert(0u32);
        *count += 1;
        found.insert(format!("descriptor {count} of {kind}"));
    }
    Ok(())
}

/// Targets of the descriptors that are TCP sockets, in a process's network namespace.
fn tcp_sockets(process: u32) -> Result<BTreeSet<String>> {
    let mut sockets = BTreeSet::new();
    for table in ["tcp", "tcp6"] {
        let path = format!("/proc/{process}/net/{table}");
        let rows = fs::read_to_string(&path).context(path)?;
        let inodes = rows
            .lines()
            .skip(1)
            .filter_map(|row| row.split_whitespace().nth(9));
        sockets.extend(inodes.map(|inode| format!("socket:[{inode}]")));
    }
    Ok(sockets)
}

//! Ports of the host that lead to pods of the embedded bridge, and whose they are.
//!
//! What a pod holds is a file `<root>/network/ports/<sandbox>`, written before the rules are, so
//! that a server that starts anew makes the same rules and takes the right ones back.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv6Addr};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use bulkhead_cri_api::v1 as cri;
use serde::{Deserialize, Serialize};

use super::error::NetworkError;
use crate::replace::replace;

/// Where the files are, below a server's state.
const DIRECTORY: &str = "network/ports";
/// The most ports of one pod.
const MOST: usize = 1024;

/// A port of the host that leads to a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPort {
    /// Of both ports.
    pub protocol: Protocol,
    /// The address of the host it is bound to; all zeros is every one of a family, none is every
    /// one of both.
    pub host: Option<IpAddr>,
    /// On the host.
    pub port: u16,
    /// In the pod.
    pub target: u16,
}

/// Why no port leads to a pod by SCTP.
pub const NO_SCTP: &str = "SCTP is not spoken by the guests' kernel";

/// A protocol with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host {
            Some(IpAddr::V6(host)) => write!(f, "[{host}]:")?,
            Some(IpAddr::V4(host)) => write!(f, "{host}:")?,
            None => {}
        }
        write!(f, "{}/{}", self.port, self.protocol)
    }
}

impl HostPort {
    /// Those that a pod asks for, each once. A mapping without a host port is none.
    pub fn of_pod(pod: &cri::PodSandboxConfig) -> Result<Vec<Self>, NetworkError> {
        let mut ports: Vec<Self> = Vec::new();
        for mapping in &pod.port_mappings {
            if mapping.host_port == 0 {
                continue;
            }
            let port = Self::read(mapping).map_err(NetworkError::HostPort)?;
            match ports.iter().find(|other| other.meets(port)) {
                None => ports.push(port),
                Some(other) if *other == port => {}
                Some(other) => {
                    let why = format!("the pod asks for {other} and for {port}");
                    return Err(NetworkError::HostPort(why));
                }
            }
        }
        if ports.len() > MOST {
            let why = format!(
                "the pod asks for {} of them; {MOST} are possible",
                ports.len()
            );
            return Err(NetworkError::HostPort(why));
        }
        Ok(ports)
    }

    fn read(mapping: &cri::PortMapping) -> Result<Self, String> {
        let number = |what: &str, number: i32| {
            let port = u16::try_from(number).ok().filter(|port| *port > 0);
            port.ok_or_else(|| format!("{what} {number} is not from 1 to 65535"))
        };
        let host = match mapping.host_ip.as_str() {
            "" => None,
            text => {
                let wrong = |_| format!("host_ip {text:?} is no address");
                Some(text.parse().map_err(wrong)?)
            }
        };
        if host == Some(Ipv6Addr::LOCALHOST.into()) {
            let why =
                "host_ip ::1 leads to no pod, for the kernel does not route it; take 127.0.0.1";
            return Err(why.to_owned());
        }
        Ok(Self {
            protocol: match mapping.protocol() {
                cri::Protocol::Tcp => Protocol::Tcp,
                cri::Protocol::Udp => Protocol::Udp,
                cri::Protocol::Sctp => return Err(NO_SCTP.to_owned()),
            },
            host,
            port: number("host_port", mapping.host_port)?,
            target: number("container_port", mapping.container_port)?,
        })
    }

    /// Whether it is bound to IPv6 alone.
    pub fn is_ipv6(&self) -> bool {
        self.host.is_some_and(|host| host.is_ipv6())
    }

    /// Whether packets to one could be packets to the other.
    fn meets(self, other: Self) -> bool {
        let hosts = match (self.host, other.host) {
            (Some(one), Some(two)) => {
                one.is_ipv4() == two.is_ipv4()
                    && (one == two || one.is_unspecified() || two.is_unspecified())
            }
            _ => true,
        };
        hosts && self.protocol == other.protocol && self.port == other.port
    }
}

/// What a pod holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Held {
    /// The pod's namespace and name, for people.
    pod: String,
    ports: Vec<HostPort>,
}

/// The ports of one server's pods.
#[derive(Debug)]
pub struct HostPorts {
    directory: PathBuf,
    held: BTreeMap<String, Held>,
}

impl HostPorts {
    /// Reads what is held under `root`. Blocks.
    pub fn open(root: &Path) -> Result<Self, NetworkError> {
        let directory = root.join(DIRECTORY);
        let fail = |source| NetworkError::state(&directory, source);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(fail)?;
        let held = read(&directory).map_err(|(path, source)| NetworkError::state(&path, source))?;
        Ok(Self { directory, held })
    }

    /// Gives the sandbox its ports, instead of what it held; refuses what another pod has. Blocks.
    pub fn claim(
        &mut self,
        sandbox: &str,
        pod: &str,
        ports: &[HostPort],
    ) -> Result<(), NetworkError> {
        let others = self.held.iter().filter(|(holder, _)| *holder != sandbox);
        if let Some((port, other)) = met(others.map(|(_, other)| other), ports) {
            return Err(NetworkError::HostPortTaken {
                port: port.to_string(),
                holder: other.pod.clone(),
            });
        }
        if ports.is_empty() {
            return self.release(sandbox);
        }
        let held = Held {
            pod: pod.to_owned(),
            ports: ports.to_vec(),
        };
        let path = self.directory.join(sandbox);
        let fail = |source| NetworkError::state(&path, source);
        let text = serde_json::to_vec(&held).map_err(|error| fail(error.into()))?;
        replace(&path, &text).map_err(fail)?;
        self.held.insert(sandbox.to_owned(), held);
        Ok(())
    }

    /// Gives back what the sandbox holds; nothing when it holds nothing. Blocks.
    pub fn release(&mut self, sandbox: &str) -> Result<(), NetworkError> {
        if !self.held.contains_key(sandbox) {
            return Ok(());
        }
        let path = self.directory.join(sandbox);
        gone(fs::remove_file(&path)).map_err(|source| NetworkError::state(&path, source))?;
        self.held.remove(sandbox);
        Ok(())
    }

    /// Whether the sandbox holds any.
    pub fn has(&self, sandbox: &str) -> bool {
        self.held.contains_key(sandbox)
    }

    /// What the sandbox holds.
    pub fn of(&self, sandbox: &str) -> &[HostPort] {
        let held = self.held.get(sandbox);
        held.map(|held| held.ports.as_slice()).unwrap_or_default()
    }

    /// Every port with the sandbox that holds it.
    pub fn all(&self) -> impl Iterator<Item = (&str, HostPort)> {
        self.held.iter().flat_map(|(sandbox, held)| {
            let ports = held.ports.iter();
            ports.map(|port| (sandbox.as_str(), *port))
        })
    }
}

/// Refuses ports that pods of another server hold, whose state is under `root`. Blocks.
pub fn refuse_held(root: &Path, ports: &[HostPort]) -> Result<(), NetworkError> {
    let held = match read(&root.join(DIRECTORY)) {
        Ok(held) => held,
        Err((_, source)) if source.kind() == ErrorKind::NotFound => return Ok(()),
        Err((path, source)) => return Err(NetworkError::state(&path, source)),
    };
    match met(held.values(), ports) {
        None => Ok(()),
        Some((port, other)) => Err(NetworkError::HostPortTaken {
            port: port.to_string(),
            holder: format!("{} of the server with {}", other.pod, root.display()),
        }),
    }
}

/// The first of `ports` that somebody holds, and who.
fn met<'a>(
    mut held: impl Iterator<Item = &'a Held>,
    ports: &[HostPort],
) -> Option<(HostPort, &'a Held)> {
    held.find_map(|held| {
        let mut ports = ports.iter();
        let port = ports.find(|port| held.ports.iter().any(|held| held.meets(**port)))?;
        Some((*port, held))
    })
}

/// What the files of a directory say, by sandbox; or which could not be read.
fn read(directory: &Path) -> Result<BTreeMap<String, Held>, (PathBuf, io::Error)> {
    let fail = |source| (directory.to_owned(), source);
    let mut held = BTreeMap::new();
    for entry in fs::read_dir(directory).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let Some(name) = name.filter(|name| !name.contains('.')) else {
            continue; // A kill left it half written.
        };
        let text = fs::read(&path).map_err(|source| (path.clone(), source))?;
        let read = serde_json::from_slice(&text);
        let read = read.map_err(|error| (path.clone(), error.into()))?;
        held.insert(name.to_owned(), read);
    }
    Ok(held)
}

fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(host_ip: &str, host_port: i32, container_port: i32) -> cri::PortMapping {
        cri::PortMapping {
            protocol: cri::Protocol::Tcp.into(),
            container_port,
            host_port,
            host_ip: host_ip.to_owned(),
        }
    }

    fn of(mappings: &[cri::PortMapping]) -> Result<Vec<HostPort>, String> {
        let pod = cri::PodSandboxConfig {
            port_mappings: mappings.to_vec(),
            ..Default::default()
        };
        HostPort::of_pod(&pod).map_err(|error| error.to_string())
    }

    #[test]
    fn only_mappings_with_a_host_port_count_and_each_once() {
        let twice = [
            mapping("", 8080, 80),
            mapping("", 8080, 80),
            mapping("", 0, 81),
        ];
        let ports = of(&twice).unwrap();
        assert_eq!(ports.len(), 1);
        assert_eq!((ports[0].port, ports[0].target), (8080, 80));
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for (mapping, why) in [
            (mapping("", 65_536, 80), "host_port 65536"),
            (mapping("", -1, 80), "host_port -1"),
            (mapping("", 80, 0), "container_port 0"),
            (mapping("localhost", 80, 80), "\"localhost\""),
            (mapping("::1", 80, 80), "does not route it"),
        ] {
            let error = of(&[mapping]).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
        let error = of(&[mapping("", 80, 80), mapping("192.0.2.1", 80, 81)]).unwrap_err();
        assert!(error.contains("80/tcp and for 192.0.2.1:80/tcp"), "{error}");
    }

    #[test]
    fn ports_meet_on_an_address_that_both_have() {
        let root = tempfile::tempdir().unwrap();
        let mut all = HostPorts::open(root.path()).unwrap();
        let at = |host| of(&[mapping(host, 80, 80)]).unwrap();
        all.claim("a", "shop/web", &at("192.0.2.1")).unwrap();
        all.claim("b", "shop/db", &at("192.0.2.2")).unwrap();
        all.claim("c", "shop/six", &at("::")).unwrap();
        for taken in ["", "0.0.0.0", "192.0.2.1", "fd00::1"] {
            let error = all.claim("d", "shop/late", &at(taken)).unwrap_err();
            assert!(
                matches!(error, NetworkError::HostPortTaken { .. }),
                "{error}"
            );
        }
        let error = all.claim("d", "shop/late", &at("192.0.2.2")).unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains("192.0.2.2:80/tcp") && error.contains("shop/db"),
            "{error}"
        );
        all.release("b").unwrap();
        all.claim("d", "shop/late", &at("192.0.2.2")).unwrap();
    }

    #[test]
    fn what_is_held_is_known_after_a_restart() {
        let root = tempfile::tempdir().unwrap();
        let mut all = HostPorts::open(root.path()).unwrap();
        let ports = of(&[mapping("", 80, 8080)]).unwrap();
        all.claim("a", "shop/web", &ports).unwrap();
        fs::write(root.path().join("network/ports/b.new"), "{").unwrap();
        let mut all = HostPorts::open(root.path()).unwrap();
        assert_eq!(all.all().collect::<Vec<_>>(), [("a", ports[0])]);
        assert!(all.claim("b", "shop/other", &ports).is_err());
        all.release("a").unwrap();
        all.release("a").unwrap();
        assert!(HostPorts::open(root.path()).unwrap().all().next().is_none());
    }
}

//! A pod's network: a namespace of its own, a link in it, and a tap for the guest's card.
//!
//! The link comes from CNI plugins where the machine has a directory for their configuration, else
//! from the embedded bridge. Frames are mirrored between it and the tap, so the guest is on the
//! link as if the link were its own.

mod bridge;
mod card;
mod cni;
mod dns;
mod error;
mod firewall;
mod flows;
mod forwarding;
mod guard;
mod interface;
mod link;
mod mirror;
mod nat;
mod netfilter;
mod netns;
mod owner;
mod pool;
mod ports;
mod prefix;
mod subnets;
mod sys;
mod sysctl;
mod tap;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use bulkhead_cri_api::v1 as cri;
use serde::{Deserialize, Serialize};

pub use cni::CniError;
pub use dns::Dns;
pub use error::NetworkError;
pub use firewall::closed as closed_firewalls;
pub use interface::{Address, Interface, Neighbour, PodNetwork, Route};
pub use ports::NO_SCTP;
pub use prefix::{Ipv4Prefix, Ipv6Prefix};
pub use tap::Tap;

use cni::{Cni, Promise};
use guard::Guard;
use link::{Link, Links};
use netns::Namespace;
use owner::{Attachment, Owner, Wanted};
use ports::HostPort;

/// The pod's link in its namespace, and the guest's name for its card.
const POD_LINK: &str = "eth0";
/// "IPv6 requires that every link in the Internet have an MTU of 1280 octets or greater" (RFC 8200
/// §5); Linux takes IPv6 off a link that has less.
const IPV6_MTU: u32 = 1280;
/// The most cards of a pod: each takes a window of its VM.
const CARDS: usize = 8;

/// What the operator may choose.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where the configuration of CNI networks is. When the directory exists, pods have such a
    /// network, and none before it is configured; else they have the embedded bridge.
    pub cni: PathBuf,
    /// A network that is written into `cni` when the kubelet has told which addresses are this
    /// node's, unless there is one (CRI `UpdateRuntimeConfig`); what stands in it for them, see
    /// `cni/template.rs`.
    pub cni_template: Option<PathBuf>,
    /// Where CNI plugins are, the first one counts.
    pub cni_plugins: Vec<PathBuf>,
    /// How long one call of one plugin may take, in seconds.
    pub cni_timeout_seconds: u32,
    /// The pods' IPv4 addresses. Default: those the kubelet gives this node, else a /20 that
    /// overlaps no route of the host.
    pub pool: Option<Ipv4Prefix>,
    /// Their IPv6 addresses. Default: likewise, else a unique local /64 drawn once (RFC 4193).
    pub pool6: Option<Ipv6Prefix>,
    /// Largest payload of a frame in bytes, 576 (RFC 791) to 65521 (a tap's); below 1280 pods have no
    /// IPv6. Default: that of the host's way out, at most 1500.
    pub mtu: Option<u32>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            cni: "/etc/cni/net.d".into(),
            cni_template: None,
            cni_plugins: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            cni_timeout_seconds: 60,
            pool: None,
            pool6: None,
            mtu: None,
        }
    }
}

/// The pods' networks of one server.
#[derive(Debug, Clone)]
pub struct Network {
    owner: Owner,
    cni: Cni,
    namespaces: PathBuf,
}

impl Network {
    /// Takes up the leases under `root` and the namespaces under `run`. Changes nothing on the
    /// host until the first pod comes, apart from removing a bridge of ours that nobody needs.
    pub async fn open(config: Config, root: &Path, run: &Path) -> Result<Self, NetworkError> {
        let namespaces = run.join("netns");
        let cni = Cni::new(config.clone(), root);
        let (orphans, of) = (cni.clone(), namespaces.clone());
        let configured = subnets::Pair {
            v4: config.pool,
            v6: config.pool6,
        };
        let root = root.to_owned();
        let (plan, pool, ports) = blocking(move || {
            orphans.end_orphans(&of);
            let pool = pool::Pool::open(&root)?;
            let choice = subnets::Choice::open(&root, configured)?;
            let plan = bridge::Plan::new(&root, choice, config.mtu)?;
            Ok((plan, pool, ports::HostPorts::open(&root)?))
        })
        .await?;
        Ok(Self {
            owner: Owner::start(plan, pool, ports).await?,
            cni,
            namespaces,
        })
    }

    /// Makes the sandbox's network, and returns `queues` queues of each interface's tap for its
    /// VMM. What an interrupted attempt left is replaced; after a failure nothing is left.
    pub async fn set_up(
        &self,
        sandbox: &str,
        pod: &cri::PodSandboxConfig,
        queues: usize,
    ) -> Result<(PodNetwork, Vec<Tap>), NetworkError> {
        let path = self.namespace(sandbox)?;
        self.cni.detach(sandbox).await?;
        let made = self.make(sandbox, path, pod, queues).await;
        if made.is_err()
            && let Err(error) = self.tear_down(sandbox).await
        {
            tracing::warn!(sandbox, %error, "a failed network was not cleaned up");
        }
        made
    }

    async fn make(
        &self,
        sandbox: &str,
        path: PathBuf,
        pod: &cri::PodSandboxConfig,
        queues: usize,
    ) -> Result<(PodNetwork, Vec<Tap>), NetworkError> {
        let namespace = Namespace::create(path.clone()).await?;
        let host = blocking(|| Ok(Dns::of_host())).await?;
        let mut network = PodNetwork {
            netns: path.clone(),
            interfaces: Vec::new(),
            dns: host,
            sysctls: BTreeMap::new(),
        };
        if !self.cni.is_wanted() {
            let (interface, tap) = self.join_bridge(sandbox, &namespace, pod, queues).await?;
            network.interfaces.push(interface);
            return Ok((network, vec![tap]));
        }
        let promise = self.cni.attach(sandbox, &path, pod).await?;
        if let Some(dns) = &promise.dns {
            network.dns = dns.clone();
        }
        let add = move || async move {
            // After the plugins, so these are the values they have given.
            let sysctls = sysctl::read(&promise.sysctls)?;
            Ok((add_cards(promise, queues).await?, sysctls))
        };
        let (cards, sysctls) = namespace.run(add).await?;
        let (interfaces, taps) = cards.into_iter().unzip();
        (network.interfaces, network.sysctls) = (interfaces, sysctls);
        Ok((network, taps))
    }

    async fn join_bridge(
        &self,
        sandbox: &str,
        namespace: &Namespace,
        pod: &cri::PodSandboxConfig,
        queues: usize,
    ) -> Result<(Interface, Tap), NetworkError> {
        let copy = namespace
            .as_fd()
            .try_clone_to_owned()
            .map_err(|source| NetworkError::state(namespace.path(), source))?;
        let metadata = pod.metadata.clone().unwrap_or_default();
        let wanted = Wanted {
            sandbox: sandbox.to_owned(),
            pod: format!("{}/{}", metadata.namespace, metadata.name),
            link: POD_LINK,
            namespace: copy,
            ports: HostPort::of_pod(pod)?,
        };
        let attachment = self.owner.attach(wanted).await?;
        let guard = attachment.guard();
        let add = move || async move {
            let links = Links::open()?;
            let pod = present(&links, POD_LINK).await?;
            add_tap(&links, &pod, &tap_name(0), queues, Some(&guard)).await
        };
        let tap = namespace.run(add).await?;
        // The bridge opens its port, the host's end sends, and the first pod's bridge answers by
        // IPv6, only after a worker of the kernel has seen the carrier come on. Looking at the
        // links makes that happen now (from Linux 6.8 on; before, the first frames of a very quick
        // guest could be lost).
        let links = Links::open()?;
        links.find(&owner::host_link(sandbox)).await?;
        links.find(&attachment.bridge).await?;
        Ok((interface(&attachment), tap))
    }

    /// Takes the sandbox's network away. Steps that never happened, or happened already, are no
    /// error; call it again after a failure. The VMM must be gone: its tap keeps a namespace alive.
    pub async fn tear_down(&self, sandbox: &str) -> Result<(), NetworkError> {
        let path = self.namespace(sandbox)?;
        let detached = match self.cni.detach(sandbox).await {
            // Its plugins need the namespace another time.
            Err(error) => return Err(error),
            Ok(true) => Ok(()),
            Ok(false) => self.owner.detach(sandbox).await,
        };
        blocking(move || netns::remove(&path)).await.and(detached)
    }

    /// Takes back what sandboxes that are not among `known` left on the host.
    pub async fn collect(&self, known: &[String]) {
        self.cni.collect(known).await;
    }

    /// Looks whether sandboxes still have their networks; says in the log which have not.
    pub async fn check(&self, sandboxes: &[String]) {
        self.cni.check_all(sandboxes).await;
    }

    /// Takes the addresses that the kubelet gives to this node's pods (CRI `UpdateRuntimeConfig`):
    /// one network, or one of each family with a comma between; nothing changes nothing. They
    /// become a CNI network by its template, or those of the bridge when its last pod has gone.
    pub async fn tell(&self, pod_cidr: &str) -> Result<(), NetworkError> {
        if pod_cidr.is_empty() {
            return Ok(());
        }
        let networks = subnets::Pair::read(pod_cidr).map_err(NetworkError::PodCidr)?;
        // Kept for plugins too, which may ask for it as `ipRanges`.
        let kept = self.owner.tell(networks).await?;
        if self.cni.is_wanted() {
            return self.cni.tell(networks).await;
        }
        match kept {
            None => tracing::info!(pod_cidr, "pods have addresses of the node's networks"),
            Some(kept) => tracing::warn!(
                pod_cidr, in_use = %kept.v4,
                "pods keep the networks that are in use until the last of them has gone"
            ),
        }
        Ok(())
    }

    /// What `verbose` tells of a sandbox's CNI network: its name, its file, what its plugins
    /// answered, and why it is broken, if they have found that.
    pub async fn details(&self, sandbox: &str) -> serde_json::Value {
        self.cni.details(sandbox).await
    }

    /// What brings the pods' links, in words.
    pub fn kind(&self) -> &'static str {
        match self.cni.is_wanted() {
            true => "CNI",
            false => "embedded bridge",
        }
    }

    /// Whether pods can have a network here; why not.
    pub async fn ready(&self) -> Result<(), String> {
        if self.cni.is_wanted() {
            self.cni.ready().await.map_err(|error| error.to_string())?;
        } else if nat::program().is_none() {
            return Err("there is no `nft` program; install nftables".to_owned());
        }
        if !Path::new("/dev/net/tun").exists() {
            return Err("there is no /dev/net/tun; load the `tun` module".to_owned());
        }
        Ok(())
    }

    fn namespace(&self, sandbox: &str) -> Result<PathBuf, NetworkError> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if sandbox.is_empty() || sandbox.len() > 128 || !sandbox.bytes().all(plain) {
            return Err(NetworkError::SandboxId(sandbox.chars().take(200).collect()));
        }
        Ok(self.namespaces.join(sandbox))
    }
}

/// Runs in the pod's namespace: a tap and a mirror for each link that plugins have brought. Fails
/// when an address that was promised is not there.
async fn add_cards(promise: Promise, queues: usize) -> Result<Vec<(Interface, Tap)>, NetworkError> {
    let links = Links::open()?;
    let names = match promise.interfaces.as_slice() {
        // Plugins of old need not list what they were told to make.
        [] => vec![POD_LINK.to_owned()],
        names => names.to_vec(),
    };
    if names.len() > CARDS {
        return Err(NetworkError::Cards(names.len()));
    }
    let mut cards = Vec::new();
    for (number, name) in names.iter().enumerate() {
        let pod = present(&links, name).await?;
        let tap = tap_name(number);
        let interface = card::read(&links, &pod, &tap).await?;
        let descriptor = add_tap(&links, &pod, &tap, queues, None).await?;
        cards.push((interface, descriptor));
    }
    let missing: Vec<String> = promise
        .addresses
        .iter()
        .filter(|(address, place)| {
            let mut on = cards.iter().map(|(interface, _)| interface);
            !on.any(|interface| {
                place.as_ref().is_none_or(|place| *place == interface.name)
                    && interface.addresses.contains(address)
            })
        })
        .map(|(address, place)| {
            let text = format!("{}/{}", address.address, address.prefix);
            let mut on = cards.iter().map(|(interface, _)| interface);
            let small = on.find(|interface| {
                interface.mtu < IPV6_MTU
                    && place.as_ref().is_none_or(|place| *place == interface.name)
            });
            match small {
                Some(Interface { name, mtu, .. }) if address.address.is_ipv6() => {
                    format!("{text} (IPv6 needs an MTU of {IPV6_MTU} bytes; {name} has {mtu})")
                }
                _ => text,
            }
        })
        .collect();
    match missing.is_empty() {
        true => Ok(cards),
        false => Err(NetworkError::Missing(missing)),
    }
}

/// Makes the tap of a link in this namespace, and the mirror between them; `guard` is what the
/// guest's frames have to pass.
async fn add_tap(
    links: &Links,
    pod: &Link,
    name: &str,
    queues: usize,
    guard: Option<&Guard>,
) -> Result<Tap, NetworkError> {
    let opened = tap::open(name, queues)?;
    let tap = present(links, name).await?;
    links.set_mtu(&tap, pod.mtu).await?;
    // The mirror before the pod's link, so that no frame reaches the namespace's own stack.
    links.up(&tap).await?;
    mirror::join(links, pod.index, tap.index, guard).await?;
    links.up(pod).await?;
    Ok(opened)
}

async fn present(links: &Links, name: &str) -> Result<Link, NetworkError> {
    let found = links.find(name).await?;
    found.ok_or_else(|| NetworkError::Netlink {
        step: format!("find link {name} in the pod's namespace"),
        source: std::io::ErrorKind::NotFound.into(),
    })
}

fn tap_name(number: usize) -> String {
    format!("tap{number}")
}

fn interface(attachment: &Attachment) -> Interface {
    let subnets = attachment.subnets;
    let default = |zero: IpAddr, gateway: IpAddr| Route {
        destination: zero,
        prefix: 0,
        gateway: Some(gateway),
        metric: 0,
        mtu: 0,
        advertised_mss: 0,
        scope: 0,
        on_link: false,
        source: None,
    };
    let mut addresses = vec![Address {
        address: attachment.address.into(),
        prefix: subnets.v4.length(),
    }];
    let mut routes = vec![default(
        Ipv4Addr::UNSPECIFIED.into(),
        subnets.v4.gateway().into(),
    )];
    if let (Some(six), Some(address)) = (subnets.v6, subnets.beside(attachment.address)) {
        addresses.push(Address {
            address: address.into(),
            prefix: six.length(),
        });
        routes.push(default(Ipv6Addr::UNSPECIFIED.into(), six.gateway().into()));
    }
    Interface {
        name: POD_LINK.to_owned(),
        mac: attachment.mac,
        mtu: attachment.mtu,
        addresses,
        routes,
        exact_routes: false,
        neighbours: Vec::new(),
        tap: tap_name(0),
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NetworkError> + Send + 'static,
) -> Result<T, NetworkError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| NetworkError::Ended)?
}

/// Makes and removes a pod's network away from the host's own, in a network namespace that ends
/// with this call; says which step failed. Blocks, and needs root.
pub fn trial() -> Result<(), String> {
    let thread = std::thread::spawn(|| {
        let said = |error: &dyn std::fmt::Display| error.to_string();
        sys::unshare_network().map_err(|error| format!("no network namespace: {error}"))?;
        let directory = scratch_directory().map_err(|error| said(&error))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| said(&error))?;
        let result = runtime.block_on(async {
            let config = Config {
                cni: directory.join("none"),
                ..Config::default()
            };
            let network = Network::open(config, &directory, &directory).await?;
            let pod = cri::PodSandboxConfig::default();
            network.set_up("trial", &pod, 1).await?;
            network.tear_down("trial").await
        });
        // Only our own few entries are in it.
        let _ = std::fs::remove_dir_all(&directory);
        result.map_err(|error: NetworkError| said(&error))
    });
    thread
        .join()
        .unwrap_or_else(|_| Err("the trial's thread panicked".to_owned()))
}

fn scratch_directory() -> std::io::Result<PathBuf> {
    use std::os::unix::fs::DirBuilderExt;
    let name = format!("bulkhead-doctor-{}", std::process::id());
    let path = std::env::temp_dir().join(name);
    std::fs::DirBuilder::new().mode(0o700).create(&path)?;
    Ok(path)
}

//! A pod's network: a namespace of its own, a link in it, and a tap for the guest's card.
//!
//! Whatever brings the link (the embedded bridge here; a CNI plugin fits the same place), frames
//! are mirrored between it and the tap, so the guest is on the link as if the link were its own.

mod bridge;
mod dns;
mod error;
mod link;
mod mirror;
mod nat;
mod netns;
mod owner;
mod pool;
mod prefix;
mod sys;
mod tap;
#[cfg(test)]
mod tests;

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use dns::Dns;
pub use error::NetworkError;
pub use prefix::Ipv4Prefix;

use link::Links;
use netns::Namespace;
use owner::{Attachment, Owner};

/// The pod's link in its namespace, and the guest's name for its card.
const POD_LINK: &str = "eth0";
const TAP: &str = "tap0";

/// What the operator may choose.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The pods' addresses. Default: a /20 that overlaps no route of the host.
    pub pool: Option<Ipv4Prefix>,
    /// Largest payload of a frame in bytes. Default: that of the host's way out, at most 1500.
    pub mtu: Option<u32>,
}

/// A pod's network as its record and its guest know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodNetwork {
    /// Where the pod's network namespace is mounted.
    pub netns: PathBuf,
    /// The guest's cards, the first one primary.
    pub interfaces: Vec<Interface>,
    /// The host's resolver, for pods that bring no configuration.
    pub dns: Dns,
}

/// One network card of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name in the guest, such as `eth0`.
    pub name: String,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Largest payload of a frame, in bytes.
    pub mtu: u32,
    /// Its addresses.
    pub addresses: Vec<Address>,
    /// Its routes, those on the link first.
    pub routes: Vec<Route>,
    /// Name of its tap in the pod's namespace.
    pub tap: String,
}

/// An address with the length of its network's prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// The address.
    pub address: IpAddr,
    /// Bits of the network part.
    pub prefix: u8,
}

/// A route of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// The network it leads to; all zeros with prefix 0 is everything.
    pub destination: IpAddr,
    /// Bits of the network part.
    pub prefix: u8,
    /// The next hop; none on the link.
    pub gateway: Option<IpAddr>,
}

/// The pods' networks of one server.
#[derive(Debug, Clone)]
pub struct Network {
    owner: Owner,
    namespaces: PathBuf,
}

impl Network {
    /// Takes up the leases under `root` and the namespaces under `run`. Changes nothing on the
    /// host until the first pod comes, apart from removing a bridge of ours that nobody needs.
    pub async fn open(config: Config, root: &Path, run: &Path) -> Result<Self, NetworkError> {
        let plan = bridge::Plan::new(root, config.pool, config.mtu)?;
        let root = root.to_owned();
        let pool = blocking(move || pool::Pool::open(&root)).await?;
        Ok(Self {
            owner: Owner::start(plan, pool).await?,
            namespaces: run.join("netns"),
        })
    }

    /// Makes the sandbox's network, and returns the tap of each interface for its VMM. What an
    /// interrupted attempt left is replaced; after a failure nothing is left.
    pub async fn set_up(&self, sandbox: &str) -> Result<(PodNetwork, Vec<OwnedFd>), NetworkError> {
        let path = self.namespace(sandbox)?;
        let made = self.make(sandbox, path).await;
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
    ) -> Result<(PodNetwork, Vec<OwnedFd>), NetworkError> {
        let namespace = Namespace::create(path.clone()).await?;
        let copy = namespace
            .as_fd()
            .try_clone_to_owned()
            .map_err(|source| NetworkError::state(&path, source))?;
        let attachment = self.owner.attach(sandbox, POD_LINK, copy).await?;
        let mtu = attachment.mtu;
        let tap = namespace.run(move || add_tap(mtu)).await?;
        // The bridge opens its port, and the host's end sends, only after a worker of the kernel
        // has seen the carrier come on. Looking at the link makes that happen now (from Linux 6.8
        // on; before, the first frames of a very quick guest could be lost).
        Links::open()?.find(&owner::host_link(sandbox)).await?;
        let dns = blocking(|| Ok(Dns::of_host())).await?;
        let interfaces = vec![interface(&attachment)];
        Ok((
            PodNetwork {
                netns: path,
                interfaces,
                dns,
            },
            vec![tap],
        ))
    }

    /// Takes the sandbox's network away. Steps that never happened, or happened already, are no
    /// error; call it again after a failure. The VMM must be gone: its tap keeps a namespace alive.
    pub async fn tear_down(&self, sandbox: &str) -> Result<(), NetworkError> {
        let path = self.namespace(sandbox)?;
        // Both are tried; the first failure is told.
        let detached = self.owner.detach(sandbox).await;
        blocking(move || netns::remove(&path)).await.and(detached)
    }

    /// Whether pods can have a network here; why not.
    pub fn ready(&self) -> Result<(), String> {
        if nat::program().is_none() {
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

/// Runs in the pod's namespace: the tap, and the mirror between it and the pod's link.
async fn add_tap(mtu: u32) -> Result<OwnedFd, NetworkError> {
    let descriptor = tap::open(TAP)?;
    let links = Links::open()?;
    let find = async |name: &str| {
        links
            .find(name)
            .await?
            .ok_or_else(|| NetworkError::Netlink {
                step: format!("find link {name} in the pod's namespace"),
                source: std::io::ErrorKind::NotFound.into(),
            })
    };
    let pod = find(POD_LINK).await?;
    let tap = find(TAP).await?;
    links.set_mtu(&tap, mtu).await?;
    // The mirror before the pod's link, so that no frame reaches the namespace's own stack.
    links.up(&tap).await?;
    mirror::join(&links, pod.index, tap.index).await?;
    links.up(&pod).await?;
    Ok(descriptor)
}

fn interface(attachment: &Attachment) -> Interface {
    let pool = attachment.pool;
    Interface {
        name: POD_LINK.to_owned(),
        mac: attachment.mac,
        mtu: attachment.mtu,
        addresses: vec![Address {
            address: attachment.address.into(),
            prefix: pool.length(),
        }],
        routes: vec![Route {
            destination: Ipv4Addr::UNSPECIFIED.into(),
            prefix: 0,
            gateway: Some(pool.gateway().into()),
        }],
        tap: TAP.to_owned(),
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
            let network = Network::open(Config::default(), &directory, &directory).await?;
            network.set_up("trial").await?;
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

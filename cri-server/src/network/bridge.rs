//! The bridge that joins the pods of one server, and the way out of it.
//!
//! The kernel is the record: a bridge is ours when its alias names our state directory. So a
//! server finds its bridge again after a kill, and servers with other state directories (such as
//! those of `bulkhead run`) take another name and another pool beside it.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use super::IPV6_MTU;
use super::error::NetworkError;
use super::forwarding;
use super::link::{Link, Links};
use super::nat;
use super::subnets::{Choice, Subnets};

/// Bridge names are this and a number from 0 to 255.
const NAME: &str = "bulkhead";
/// Kernel's `IFALIASZ` less the end mark.
const ALIAS_BYTES: usize = 255;
const DEFAULT_MTU: u32 = 1500;

/// A bridge that is up.
#[derive(Debug, Clone)]
pub struct Bridge {
    pub link: Link,
    pub subnets: Subnets,
}

/// How this server's bridge is known, and what it is to be.
#[derive(Debug, Clone)]
pub struct Plan {
    alias: String,
    mtu: Option<u32>,
    /// Its networks.
    pub choice: Choice,
}

impl Plan {
    /// For the server whose state is under `root`.
    pub fn new(root: &Path, choice: Choice, mtu: Option<u32>) -> Result<Self, NetworkError> {
        let alias = format!("{NAME} {}", root.display());
        if alias.len() > ALIAS_BYTES {
            let message = format!("the path is too long; {ALIAS_BYTES} bytes are the limit");
            return Err(NetworkError::state(root, io::Error::other(message)));
        }
        Ok(Self { alias, mtu, choice })
    }

    /// The bridge of this server as it is, if there is one.
    pub async fn find(&self, links: &Links) -> Result<Option<Link>, NetworkError> {
        let all = links.all().await?;
        Ok(all
            .into_iter()
            .find(|link| link.alias.as_deref() == Some(&self.alias)))
    }

    /// Where other servers, whose bridges are on this host, have their state.
    pub async fn others(&self, links: &Links) -> Result<Vec<PathBuf>, NetworkError> {
        let all = links.all().await?;
        let aliases = all.into_iter().filter_map(|link| link.alias);
        let others = aliases.filter(|alias| *alias != self.alias);
        let roots = others.filter_map(|alias| {
            let root = alias.strip_prefix(NAME)?.strip_prefix(' ')?;
            root.starts_with('/').then(|| PathBuf::from(root))
        });
        Ok(roots.collect())
    }

    /// The bridge of this server with its networks, if it is complete.
    pub async fn existing(&self, links: &Links) -> Result<Option<Bridge>, NetworkError> {
        let Some(link) = self.find(links).await? else {
            return Ok(None);
        };
        let (v4, v6) = links.networks(&link).await?;
        Ok(v4.map(|v4| Bridge {
            link,
            subnets: Subnets { v4, v6 },
        }))
    }

    /// Makes the bridge, or completes the one there is; its translation is to be set then. The
    /// host's other links stay as they are; forwarding is switched on for the host.
    pub async fn ensure(&mut self, links: &Links) -> Result<Bridge, NetworkError> {
        let _lock = lock()?;
        let found = self.existing(links).await?;
        let fresh = found.is_none();
        let mut bridge = match found {
            Some(bridge) => bridge,
            None => {
                if let Some(link) = self.find(links).await? {
                    // Its making was interrupted before any pod could be on it.
                    links.remove(&link).await?;
                }
                self.create(links).await?
            }
        };
        let ready = self.complete(links, &mut bridge).await;
        if ready.is_err() && fresh {
            // The first failure is the one to report.
            let _ = discard(links, &bridge.link).await;
        }
        ready.map(|()| bridge)
    }

    /// Removes the bridge with its translation; nothing when there is none.
    pub async fn remove(&self, links: &Links) -> Result<(), NetworkError> {
        let _lock = lock()?;
        match self.find(links).await? {
            Some(link) => discard(links, &link).await,
            None => Ok(()),
        }
    }

    async fn create(&self, links: &Links) -> Result<Bridge, NetworkError> {
        let v4 = self.choice.v4(links).await?;
        let mtu = match self.mtu {
            Some(mtu) => mtu,
            None => uplink_mtu(links).await?,
        };
        for number in 0..=255 {
            let name = format!("{NAME}{number}");
            let Some(link) = links.add_bridge(&name, mac(v4.gateway()), mtu).await? else {
                continue;
            };
            let marked = async {
                links.set_alias(&link, &self.alias).await?;
                // Setting it, even to what it is, keeps it from following the ports.
                links.set_mtu(&link, mtu).await?;
                let gateway = v4.gateway().into();
                links.add_address(&link, gateway, v4.length()).await
            };
            return match marked.await {
                Ok(()) => Ok(Bridge {
                    link: Link { mtu, ..link },
                    subnets: Subnets { v4, v6: None },
                }),
                Err(error) => {
                    let _ = links.remove(&link).await;
                    Err(error)
                }
            };
        }
        Err(NetworkError::NoFreeBridge(NAME))
    }

    /// The steps that may be repeated on a bridge that is there.
    async fn complete(&mut self, links: &Links, bridge: &mut Bridge) -> Result<(), NetworkError> {
        let ipv6 = forwarding::has_ipv6() && bridge.link.mtu >= IPV6_MTU;
        forwarding::settle(&bridge.link.name, ipv6)?;
        if ipv6 && bridge.subnets.v6.is_none() {
            let v6 = self.choice.v6(links, bridge.subnets.v4).await?;
            let gateway = v6.gateway().into();
            links
                .add_address(&bridge.link, gateway, v6.length())
                .await?;
            bridge.subnets.v6 = Some(v6);
        }
        forwarding::switch_on(ipv6)?;
        links.up(&bridge.link).await
    }
}

/// A hardware address for an IPv4 address, unique on the bridge: locally administered, and the
/// address in its last four bytes.
pub fn mac(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x0a, 0x58, a, b, c, d]
}

async fn uplink_mtu(links: &Links) -> Result<u32, NetworkError> {
    let Some(index) = links.default_link().await? else {
        return Ok(DEFAULT_MTU);
    };
    let all = links.all().await?;
    // A pod must not send what the way out cannot carry (tunnels, clouds).
    let mtu = all
        .iter()
        .find(|link| link.index == index)
        .map(|link| link.mtu);
    Ok(mtu.unwrap_or(DEFAULT_MTU).clamp(576, DEFAULT_MTU))
}

async fn discard(links: &Links, link: &Link) -> Result<(), NetworkError> {
    // The table first: a bridge without table is found again by its alias.
    nat::remove(&link.name).await?;
    links.remove(link).await
}

/// Keeps servers from choosing the same name and pool, or port of the host: a lock on the network namespace itself,
/// which leaves no file behind and spans exactly those who share it.
pub fn lock() -> Result<File, NetworkError> {
    let path = Path::new("/proc/thread-self/ns/net");
    let file = File::open(path).map_err(|source| NetworkError::state(path, source))?;
    rustix::fs::flock(&file, FlockOperation::LockExclusive)
        .map_err(|errno| NetworkError::state(path, errno.into()))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::super::subnets::Pair;
    use super::*;

    #[test]
    fn a_state_directory_whose_name_does_not_fit_an_alias_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let choice = Choice::open(root.path(), Pair::default()).unwrap();
        let long = "x".repeat(ALIAS_BYTES);
        assert!(Plan::new(Path::new(&long), choice, None).is_err());
    }
}

//! The bridge that joins the pods of one server, and the way out of it.
//!
//! The kernel is the record: a bridge is ours when its alias names our state directory. So a
//! server finds its bridge again after a kill, and servers with other state directories (such as
//! those of `bulkhead run`) take another name and another pool beside it.

use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use rustix::fs::FlockOperation;

use super::dns::Dns;
use super::error::NetworkError;
use super::link::{Link, Links};
use super::nat;
use super::prefix::Ipv4Prefix;

/// Bridge names are this and a number from 0 to 255.
const NAME: &str = "bulkhead";
/// Kernel's `IFALIASZ` less the end mark.
const ALIAS_BYTES: usize = 255;
const DEFAULT_MTU: u32 = 1500;

/// A bridge that is up, with its translation.
#[derive(Debug, Clone)]
pub struct Bridge {
    pub link: Link,
    pub pool: Ipv4Prefix,
}

/// How this server's bridge is known, and what it is to be.
#[derive(Debug, Clone)]
pub struct Plan {
    alias: String,
    pool: Option<Ipv4Prefix>,
    mtu: Option<u32>,
}

impl Plan {
    /// For the server whose state is under `root`.
    pub fn new(
        root: &Path,
        pool: Option<Ipv4Prefix>,
        mtu: Option<u32>,
    ) -> Result<Self, NetworkError> {
        let alias = format!("{NAME} {}", root.display());
        if alias.len() > ALIAS_BYTES {
            let message = format!("the path is too long; {ALIAS_BYTES} bytes are the limit");
            return Err(NetworkError::state(root, io::Error::other(message)));
        }
        if let Some(pool) = pool
            && pool.pod_count() == 0
        {
            let reason = "it has no room for a pod".to_owned();
            return Err(NetworkError::Pool { pool, reason });
        }
        Ok(Self { alias, pool, mtu })
    }

    /// The bridge of this server as it is, if there is one.
    pub async fn find(&self, links: &Links) -> Result<Option<Link>, NetworkError> {
        let all = links.all().await?;
        Ok(all
            .into_iter()
            .find(|link| link.alias.as_deref() == Some(&self.alias)))
    }

    /// Makes the bridge, or completes the one there is. The host's other links stay untouched;
    /// forwarding of IPv4 is switched on for the host and stays on, since others may have come
    /// to need it.
    pub async fn ensure(&self, links: &Links) -> Result<Bridge, NetworkError> {
        let _lock = lock()?;
        let found = match self.find(links).await? {
            Some(link) => match links.address(&link).await? {
                Some((_, pool)) => Some(Bridge { link, pool }),
                // Its making was interrupted before any pod could be on it.
                None => {
                    links.remove(&link).await?;
                    None
                }
            },
            None => None,
        };
        let fresh = found.is_none();
        let bridge = match found {
            Some(bridge) => bridge,
            None => self.create(links).await?,
        };
        let ready = complete(links, &bridge).await;
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
        let pool = self.choose_pool(links).await?;
        let mtu = match self.mtu {
            Some(mtu) => mtu,
            None => uplink_mtu(links).await?,
        };
        for number in 0..=255 {
            let name = format!("{NAME}{number}");
            let Some(link) = links.add_bridge(&name, mac(pool.gateway()), mtu).await? else {
                continue;
            };
            let marked = async {
                links.set_alias(&link, &self.alias).await?;
                // Setting it, even to what it is, keeps it from following the ports.
                links.set_mtu(&link, mtu).await?;
                links
                    .add_address(&link, pool.gateway(), pool.length())
                    .await
            };
            return match marked.await {
                Ok(()) => Ok(Bridge {
                    link: Link { mtu, ..link },
                    pool,
                }),
                Err(error) => {
                    let _ = links.remove(&link).await;
                    Err(error)
                }
            };
        }
        Err(NetworkError::NoFreeBridge(NAME))
    }

    async fn choose_pool(&self, links: &Links) -> Result<Ipv4Prefix, NetworkError> {
        let mut taken = links.destinations().await?;
        if let Some(pool) = self.pool {
            return match taken.iter().find(|other| other.overlaps(pool)) {
                Some(other) => {
                    let reason = format!("this host has a route to {other}");
                    Err(NetworkError::Pool { pool, reason })
                }
                None => Ok(pool),
            };
        }
        // A resolver behind the default route must stay reachable, too.
        taken.extend(
            Dns::of_host()
                .nameservers
                .iter()
                .filter_map(|address| match address {
                    IpAddr::V4(address) => Ipv4Prefix::around(*address, 32),
                    IpAddr::V6(_) => None,
                }),
        );
        candidates()
            .find(|pool| !taken.iter().any(|other| other.overlaps(*pool)))
            .ok_or(NetworkError::NoFreePool)
    }
}

/// A hardware address for an IPv4 address, unique on the bridge: locally administered, and the
/// address in its last four bytes.
pub fn mac(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x0a, 0x58, a, b, c, d]
}

/// Pools of 4093 pods, away from what other software takes by default: 10.231.0.0/16, then
/// 172.29.0.0/16, in steps of a /20.
fn candidates() -> impl Iterator<Item = Ipv4Prefix> {
    [(10, 231), (172, 29)].into_iter().flat_map(|(a, b)| {
        (0..=240_u8)
            .step_by(16)
            .filter_map(move |c| Ipv4Prefix::around(Ipv4Addr::new(a, b, c, 0), 20))
    })
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

/// The steps that may be repeated on a bridge that is there.
async fn complete(links: &Links, bridge: &Bridge) -> Result<(), NetworkError> {
    let name = &bridge.link.name;
    // Pods must not be able to give this host an IPv6 address or route by advertisements.
    write(
        Path::new(&format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6")),
        "1",
    )?;
    write(Path::new("/proc/sys/net/ipv4/ip_forward"), "1")?;
    nat::set(name, bridge.pool).await?;
    links.up(&bridge.link).await
}

async fn discard(links: &Links, link: &Link) -> Result<(), NetworkError> {
    // The table first: a bridge without table is found again by its alias.
    nat::remove(&link.name).await?;
    links.remove(link).await
}

fn write(path: &Path, value: &str) -> Result<(), NetworkError> {
    let current = match fs::read_to_string(path) {
        // No IPv6 in this kernel.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|source| NetworkError::state(path, source))?,
    };
    // Writing would reset other settings of the host even when the value stays.
    if current.trim() == value {
        return Ok(());
    }
    fs::write(path, value).map_err(|source| NetworkError::state(path, source))
}

/// Keeps servers from choosing the same name and pool: a lock on the network namespace itself,
/// which leaves no file behind and spans exactly those who share it.
fn lock() -> Result<File, NetworkError> {
    let path = Path::new("/proc/thread-self/ns/net");
    let file = File::open(path).map_err(|source| NetworkError::state(path, source))?;
    rustix::fs::flock(&file, FlockOperation::LockExclusive)
        .map_err(|errno| NetworkError::state(path, errno.into()))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_do_not_overlap_each_other() {
        let all: Vec<Ipv4Prefix> = candidates().collect();
        assert_eq!(all.len(), 32);
        for (index, pool) in all.iter().enumerate() {
            assert!(
                !all.iter()
                    .skip(index + 1)
                    .any(|other| other.overlaps(*pool)),
                "{pool}"
            );
        }
    }

    #[test]
    fn a_state_directory_whose_name_does_not_fit_an_alias_is_refused() {
        let long = "x".repeat(ALIAS_BYTES);
        assert!(Plan::new(Path::new(&long), None, None).is_err());
    }

    #[test]
    fn a_pool_without_room_is_refused() {
        let tiny = "10.0.0.0/31".parse().unwrap();
        let refusal = Plan::new(Path::new("/x"), Some(tiny), None).unwrap_err();
        assert!(refusal.to_string().contains("10.0.0.0/31"));
    }
}

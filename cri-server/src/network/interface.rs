//! A pod's network in its record: what the guest is to have.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Dns;

/// A pod's network as its record and its guest know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodNetwork {
    /// Where the pod's network namespace is mounted.
    pub netns: PathBuf,
    /// The guest's cards, the first one primary.
    pub interfaces: Vec<Interface>,
    /// The host's resolver, for pods that bring no configuration.
    pub dns: Dns,
    /// Sysctls that CNI plugins have set in the namespace, with dots, for the guest to have.
    #[serde(default)]
    pub sysctls: BTreeMap<String, String>,
}

impl PodNetwork {
    /// The pod's own sysctls and those of plugins, of which the pod's count more.
    pub fn sysctls_under<M>(&self, own: M) -> M
    where
        M: IntoIterator<Item = (String, String)> + FromIterator<(String, String)>,
    {
        let mut all = self.sysctls.clone();
        for (name, value) in own {
            // It may be written with slashes, as sysctl(8) allows.
            all.remove(&name.replace('/', "."));
            all.insert(name, value);
        }
        all.into_iter().collect()
    }
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
    /// Its routes.
    pub routes: Vec<Route>,
    /// Whether these are all routes there are; else its addresses bring those to their networks.
    #[serde(default)]
    pub exact_routes: bool,
    /// Neighbours that are not to be asked for.
    #[serde(default)]
    pub neighbours: Vec<Neighbour>,
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
    /// The lower one is preferred; 0 is the kernel's default.
    #[serde(default)]
    pub metric: u32,
    /// The largest packet in bytes; 0 is the card's.
    #[serde(default)]
    pub mtu: u32,
    /// The largest TCP segment to ask for, in bytes; 0 is by the MTU.
    #[serde(default)]
    pub advertised_mss: u32,
    /// `rtm_scope` of rtnetlink(7).
    #[serde(default)]
    pub scope: u8,
    /// The next hop is on the link, though no route says so.
    #[serde(default)]
    pub on_link: bool,
    /// The own address to prefer.
    #[serde(default)]
    pub source: Option<IpAddr>,
}

/// A neighbour with its hardware address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    /// The address.
    pub address: IpAddr,
    /// The hardware address.
    pub mac: [u8; 6],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pods_own_sysctls_count_more_than_a_plugins() {
        let map = |all: &[(&str, &str)]| -> BTreeMap<String, String> {
            let all = all.iter();
            all.map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect()
        };
        let network = PodNetwork {
            netns: PathBuf::new(),
            interfaces: Vec::new(),
            dns: Dns::default(),
            sysctls: map(&[("net.a", "1"), ("net.b", "1"), ("net.c", "1")]),
        };
        let own = map(&[("net.a", "2"), ("net/b", "2")]);
        assert_eq!(
            network.sysctls_under(own),
            map(&[("net.a", "2"), ("net/b", "2"), ("net.c", "1")])
        );
    }
}

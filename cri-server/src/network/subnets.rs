//! Which networks a bridge takes: configured, told by the kubelet, or chosen beside those that the
//! host has routes to. What was told and what was chosen is kept in `<root>/network/subnets.json`.

use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::dns::Dns;
use super::error::NetworkError;
use super::link::Links;
use super::prefix::{Ipv4Prefix, Ipv6Prefix};
use crate::replace::replace;

/// Where it is kept, below the server's state.
const FILE: &str = "network/subnets.json";
/// The prefix length of a network that is chosen here (RFC 4193 §3.1: 16 bits of subnet follow
/// the 48 of the prefix, then 64 of the interface).
const CHOSEN_LENGTH: u8 = 64;
/// How often a prefix is drawn: that each of them is taken does not happen by chance.
const DRAWS: usize = 16;

/// The networks of one bridge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subnets {
    pub v4: Ipv4Prefix,
    /// None where the host has no IPv6.
    pub v6: Option<Ipv6Prefix>,
}

impl Subnets {
    /// The IPv6 address that goes with a pod's IPv4 address: the one at the same place.
    pub fn beside(&self, address: Ipv4Addr) -> Option<Ipv6Addr> {
        let place = self.v4.place(address);
        self.v6.map(|six| six.at(place))
    }
}

/// A network of each family, where it is given.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pair {
    pub v4: Option<Ipv4Prefix>,
    pub v6: Option<Ipv6Prefix>,
}

impl Pair {
    /// Reads what the kubelet tells: one network, or one of each family with a comma between.
    /// Says what is wrong with it.
    pub fn read(text: &str) -> Result<Self, String> {
        let mut pair = Self::default();
        for cidr in text.split(',').map(str::trim) {
            let twice = match cidr.contains(':') {
                true => {
                    let six = cidr.parse::<Ipv6Prefix>();
                    let six = six.map_err(|error| error.to_string())?;
                    pair.v6.replace(six).is_some()
                }
                false => {
                    let four = cidr.parse::<Ipv4Prefix>();
                    let four = four.map_err(|error| error.to_string())?;
                    pair.v4.replace(four).is_some()
                }
            };
            if twice {
                return Err(format!("`{text}` has two networks of one family"));
            }
        }
        check(pair).map_err(|error| error.to_string())?;
        Ok(pair)
    }

    /// What the kubelet has told the server whose state is under `root`. Blocks.
    pub fn told(root: &Path) -> Result<Self, NetworkError> {
        Ok(kept(&root.join(FILE))?.told)
    }

    /// Both as CNI has them for host-local: a list of sets, each of ranges that stand for one
    /// another.
    pub fn ranges(&self) -> Value {
        let four = self.v4.map(|four| four.to_string());
        let six = self.v6.map(|six| six.to_string());
        let all = four.iter().chain(&six);
        all.map(|cidr| json!([{"subnet": cidr}])).collect()
    }
}

/// How the networks of this server's bridge are found.
#[derive(Debug, Clone)]
pub struct Choice {
    path: PathBuf,
    configured: Pair,
    kept: Kept,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
struct Kept {
    /// What the kubelet has told.
    told: Pair,
    /// The prefix this server has drawn.
    drawn: Option<Ipv6Prefix>,
}

impl Choice {
    /// Of the server whose state is under `root`. Blocks.
    pub fn open(root: &Path, configured: Pair) -> Result<Self, NetworkError> {
        let path = root.join(FILE);
        let kept = kept(&path)?;
        check(configured)?;
        Ok(Self {
            path,
            configured,
            kept,
        })
    }

    /// Remembers the networks that the kubelet gives this node; what is configured counts more.
    /// Blocks.
    pub fn tell(&mut self, told: Pair) -> Result<(), NetworkError> {
        self.keep(Kept {
            told,
            ..self.kept.clone()
        })
    }

    /// The networks that are wanted, configured or told.
    pub fn wanted(&self) -> Pair {
        Pair {
            v4: self.configured.v4.or(self.kept.told.v4),
            v6: self.configured.v6.or(self.kept.told.v6),
        }
    }

    /// The IPv4 network for a new bridge.
    pub async fn v4(&self, links: &Links) -> Result<Ipv4Prefix, NetworkError> {
        let mut taken = links.destinations().await?;
        if let Some(pool) = self.wanted().v4 {
            return match taken.iter().find(|other| other.overlaps(pool)) {
                Some(other) => Err(used(&pool, other)),
                None => Ok(pool),
            };
        }
        // A resolver behind the default route must stay reachable, too.
        let resolvers = Dns::of_host().nameservers;
        taken.extend(resolvers.iter().filter_map(|address| match address {
            IpAddr::V4(address) => Ipv4Prefix::around(*address, 32),
            IpAddr::V6(_) => None,
        }));
        candidates()
            .find(|pool| !taken.iter().any(|other| other.overlaps(*pool)))
            .ok_or(NetworkError::NoFreePool)
    }

    /// The IPv6 network for a bridge that has `v4`: the one drawn for this server, as long as the
    /// host has no other use for it.
    pub async fn v6(&mut self, links: &Links, v4: Ipv4Prefix) -> Result<Ipv6Prefix, NetworkError> {
        let taken = links.destinations6().await?;
        let met = |pool: Ipv6Prefix| taken.iter().find(|other| other.overlaps(pool));
        if let Some(pool) = self.wanted().v6 {
            if !pool.holds(v4) {
                let reason = format!("it is smaller than the IPv4 pool {v4}");
                return Err(NetworkError::pool(&pool, reason));
            }
            return match met(pool) {
                Some(other) => Err(used(&pool, other)),
                None => Ok(pool),
            };
        }
        if let Some(drawn) = self.kept.drawn
            && met(drawn).is_none()
        {
            return Ok(drawn);
        }
        for _ in 0..DRAWS {
            let drawn = draw()?;
            if met(drawn).is_none() {
                self.keep(Kept {
                    drawn: Some(drawn),
                    ..self.kept.clone()
                })?;
                return Ok(drawn);
            }
        }
        Err(NetworkError::NoFreePool)
    }

    fn keep(&mut self, kept: Kept) -> Result<(), NetworkError> {
        let fail = |source| NetworkError::state(&self.path, source);
        let text = serde_json::to_vec(&kept).map_err(|error| fail(error.into()))?;
        replace(&self.path, &text).map_err(fail)?;
        self.kept = kept;
        Ok(())
    }
}

fn kept(path: &Path) -> Result<Kept, NetworkError> {
    match fs::read(path) {
        Ok(text) => {
            serde_json::from_slice(&text).map_err(|error| NetworkError::state(path, error.into()))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Kept::default()),
        Err(source) => Err(NetworkError::state(path, source)),
    }
}

/// Whether pods can live in these networks.
fn check(pair: Pair) -> Result<(), NetworkError> {
    if let Some(pool) = pair.v4
        && pool.pod_count() == 0
    {
        return Err(NetworkError::pool(&pool, "it has no room for a pod".into()));
    }
    if let (Some(four), Some(six)) = (pair.v4, pair.v6)
        && !six.holds(four)
    {
        let reason = format!("it is smaller than the IPv4 pool {four}");
        return Err(NetworkError::pool(&six, reason));
    }
    Ok(())
}

fn used(pool: &dyn std::fmt::Display, other: &dyn std::fmt::Display) -> NetworkError {
    NetworkError::pool(pool, format!("this host has a route to {other}"))
}

/// A prefix of our own: RFC 4193 §3.1, `fd`, then 40 bits nobody else has, then subnet 0. "Locally
/// assigned Global IDs MUST be generated with a pseudo-random algorithm" (§3.2.1).
fn draw() -> Result<Ipv6Prefix, NetworkError> {
    let mut id = [0; 5];
    let flags = rustix::rand::GetRandomFlags::empty();
    rustix::rand::getrandom(&mut id, flags)
        .map_err(|errno| NetworkError::state(Path::new("getrandom(2)"), errno.into()))?;
    let [a, b, c, d, e] = id.map(u16::from);
    let address = Ipv6Addr::new(0xfd00 | a, b << 8 | c, d << 8 | e, 0, 0, 0, 0, 0);
    Ipv6Prefix::around(address, CHOSEN_LENGTH).ok_or(NetworkError::NoFreePool)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_do_not_overlap_each_other() {
        let all: Vec<Ipv4Prefix> = candidates().collect();
        assert_eq!(all.len(), 32);
        for (index, pool) in all.iter().enumerate() {
            let mut later = all.iter().skip(index + 1);
            assert!(!later.any(|other| other.overlaps(*pool)), "{pool}");
        }
    }

    #[test]
    fn drawn_prefixes_are_local_and_differ() {
        let local: Ipv6Prefix = "fd00::/8".parse().unwrap();
        let (one, two) = (draw().unwrap(), draw().unwrap());
        assert_ne!(one, two);
        assert!(local.overlaps(one) && local.overlaps(two));
        assert_eq!(one.length(), 64);
    }

    #[test]
    fn pools_that_cannot_hold_pods_are_refused_by_name() {
        let pair = |v4: &str, v6: Option<&str>| Pair {
            v4: Some(v4.parse().unwrap()),
            v6: v6.map(|text| text.parse().unwrap()),
        };
        for (pair, name) in [
            (pair("10.0.0.0/31", None), "10.0.0.0/31"),
            (pair("10.0.0.0/16", Some("fd00::/120")), "fd00::/120"),
        ] {
            let root = tempfile::tempdir().unwrap();
            let refusal = Choice::open(root.path(), pair).unwrap_err().to_string();
            assert!(refusal.contains(name), "{refusal}");
        }
    }

    #[test]
    fn the_kubelet_tells_a_network_or_one_of_each_family() {
        let pair = Pair::read("10.7.0.0/24,fd07::/64").unwrap();
        assert_eq!(pair.v4.unwrap().to_string(), "10.7.0.0/24");
        assert_eq!(pair.v6.unwrap().to_string(), "fd07::/64");
        assert_eq!(Pair::read("fd07::/64").unwrap().v4, None);
        for wrong in [
            "",
            "10.7.0.0",
            "10.7.0.0/24,10.8.0.0/24",
            "fd07::/200",
            "x/8",
        ] {
            assert!(Pair::read(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_was_told_is_kept_and_what_is_configured_counts_more() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("network")).unwrap();
        let told = Pair {
            v4: Some("10.7.0.0/24".parse().unwrap()),
            v6: None,
        };
        let mut choice = Choice::open(root.path(), Pair::default()).unwrap();
        choice.tell(told).unwrap();
        let choice = Choice::open(root.path(), Pair::default()).unwrap();
        assert_eq!(choice.wanted(), told);
        let configured = Pair {
            v4: Some("10.8.0.0/24".parse().unwrap()),
            v6: None,
        };
        let choice = Choice::open(root.path(), configured).unwrap();
        assert_eq!(choice.wanted(), configured);
    }
}

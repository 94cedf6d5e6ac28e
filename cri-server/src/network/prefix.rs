//! IPv4 networks in prefix notation.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// An IPv4 network such as 10.231.0.0/20; host bits are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Ipv4Prefix {
    network: u32,
    length: u8,
}

impl Ipv4Prefix {
    /// The network of `length` bits (0 to 32) around `address`; `None` for a longer prefix.
    pub fn around(address: Ipv4Addr, length: u8) -> Option<Self> {
        (length <= 32).then(|| Self {
            network: u32::from(address) & mask(length),
            length,
        })
    }

    /// Bits of the network part.
    pub fn length(self) -> u8 {
        self.length
    }

    /// The all-zeros address of the network.
    pub fn network(self) -> Ipv4Addr {
        self.network.into()
    }

    /// The first host address, which the bridge takes as the pods' gateway.
    pub fn gateway(self) -> Ipv4Addr {
        (self.network | 1).into()
    }

    /// How many addresses pods can have: all but network, gateway and broadcast.
    pub fn pod_count(self) -> u32 {
        (!mask(self.length)).saturating_sub(2)
    }

    /// The pod address number `index`, counted from 0 behind the gateway.
    pub fn pod(self, index: u32) -> Option<Ipv4Addr> {
        (index < self.pod_count()).then(|| (self.network + 2 + index).into())
    }

    /// Whether `address` lies in the network.
    pub fn contains(self, address: Ipv4Addr) -> bool {
        u32::from(address) & mask(self.length) == self.network
    }

    /// Whether the two networks have an address in common.
    pub fn overlaps(self, other: Self) -> bool {
        self.contains(other.network()) || other.contains(self.network())
    }
}

fn mask(length: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0)
}

/// Why a text is not an IPv4 network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an IPv4 network; write it as 10.231.0.0/20, with zero host bits")]
pub struct NotAPrefix(String);

impl FromStr for Ipv4Prefix {
    type Err = NotAPrefix;

    fn from_str(text: &str) -> Result<Self, NotAPrefix> {
        let parse = || {
            let (address, length) = text.split_once('/')?;
            let address: Ipv4Addr = address.parse().ok()?;
            let prefix = Self::around(address, length.parse().ok()?)?;
            (prefix.network() == address).then_some(prefix)
        };
        parse().ok_or_else(|| NotAPrefix(text.to_owned()))
    }
}

impl TryFrom<String> for Ipv4Prefix {
    type Error = NotAPrefix;

    fn try_from(text: String) -> Result<Self, NotAPrefix> {
        text.parse()
    }
}

impl From<Ipv4Prefix> for String {
    fn from(prefix: Ipv4Prefix) -> Self {
        prefix.to_string()
    }
}

impl fmt::Display for Ipv4Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network(), self.length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gateway_comes_first_and_pods_behind_it() {
        let prefix: Ipv4Prefix = "10.9.8.0/30".parse().unwrap();
        assert_eq!(prefix.gateway(), Ipv4Addr::new(10, 9, 8, 1));
        assert_eq!(prefix.pod_count(), 1);
        assert_eq!(prefix.pod(0), Some(Ipv4Addr::new(10, 9, 8, 2)));
        assert_eq!(prefix.pod(1), None);
    }

    #[test]
    fn overlap_is_seen_from_both_sides() {
        let wide: Ipv4Prefix = "10.0.0.0/8".parse().unwrap();
        let narrow: Ipv4Prefix = "10.231.16.0/20".parse().unwrap();
        let other: Ipv4Prefix = "10.231.0.0/20".parse().unwrap();
        assert!(wide.overlaps(narrow) && narrow.overlaps(wide));
        assert!(!narrow.overlaps(other));
    }

    #[test]
    fn texts_with_host_bits_or_long_prefixes_are_refused() {
        for text in ["10.0.0.1/24", "10.0.0.0/33", "10.0.0.0", "::/0", ""] {
            assert!(text.parse::<Ipv4Prefix>().is_err(), "{text}");
        }
    }
}

//! IP networks in prefix notation.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
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

    /// The place of one of its addresses: the address less the network's.
    pub fn place(self, address: Ipv4Addr) -> u32 {
        u32::from(address) & !mask(self.length)
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

/// An IPv6 network such as fd00:1:2:3::/64; host bits are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Ipv6Prefix {
    network: u128,
    length: u8,
}

impl Ipv6Prefix {
    /// The network of `length` bits (0 to 128) around `address`; `None` for a longer prefix.
    pub fn around(address: Ipv6Addr, length: u8) -> Option<Self> {
        (length <= 128).then(|| Self {
            network: u128::from(address) & mask6(length),
            length,
        })
    }

    /// Bits of the network part.
    pub fn length(self) -> u8 {
        self.length
    }

    /// The all-zeros address of the network.
    pub fn network(self) -> Ipv6Addr {
        self.network.into()
    }

    /// The first host address, which the bridge takes as the pods' gateway.
    pub fn gateway(self) -> Ipv6Addr {
        self.at(1)
    }

    /// The address at a place of the network; the network has to be large enough.
    pub fn at(self, place: u32) -> Ipv6Addr {
        (self.network | u128::from(place)).into()
    }

    /// Whether it has a place for each address of `other`.
    pub fn holds(self, other: Ipv4Prefix) -> bool {
        128 - self.length >= 32 - other.length
    }

    /// Whether the two networks have an address in common.
    pub fn overlaps(self, other: Self) -> bool {
        let length = self.length.min(other.length);
        (self.network ^ other.network) & mask6(length) == 0
    }
}

fn mask6(length: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0)
}

fn mask(length: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0)
}

/// Why a text is not a network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not an {family} network; write it as {example}, with zero host bits")]
pub struct NotAPrefix {
    text: String,
    family: &'static str,
    example: &'static str,
}

impl FromStr for Ipv4Prefix {
    type Err = NotAPrefix;

    fn from_str(text: &str) -> Result<Self, NotAPrefix> {
        let parse = || {
            let (address, length) = text.split_once('/')?;
            let address: Ipv4Addr = address.parse().ok()?;
            let prefix = Self::around(address, length.parse().ok()?)?;
            (prefix.network() == address).then_some(prefix)
        };
        parse().ok_or_else(|| NotAPrefix {
            text: text.to_owned(),
            family: "IPv4",
            example: "10.231.0.0/20",
        })
    }
}

impl FromStr for Ipv6Prefix {
    type Err = NotAPrefix;

    fn from_str(text: &str) -> Result<Self, NotAPrefix> {
        let parse = || {
            let (address, length) = text.split_once('/')?;
            let address: Ipv6Addr = address.parse().ok()?;
            let prefix = Self::around(address, length.parse().ok()?)?;
            (prefix.network() == address).then_some(prefix)
        };
        parse().ok_or_else(|| NotAPrefix {
            text: text.to_owned(),
            family: "IPv6",
            example: "fd12:3456:789a::/64",
        })
    }
}

impl TryFrom<String> for Ipv6Prefix {
    type Error = NotAPrefix;

    fn try_from(text: String) -> Result<Self, NotAPrefix> {
        text.parse()
    }
}

impl From<Ipv6Prefix> for String {
    fn from(prefix: Ipv6Prefix) -> Self {
        prefix.to_string()
    }
}

impl fmt::Display for Ipv6Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network(), self.length)
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
        for text in ["fd00::1/64", "fd00::/129", "fd00::", "10.0.0.0/8", ""] {
            assert!(text.parse::<Ipv6Prefix>().is_err(), "{text}");
        }
    }

    #[test]
    fn an_ipv6_network_has_places_like_an_ipv4_network() {
        let six: Ipv6Prefix = "fd00:1:2:3::/64".parse().unwrap();
        let four: Ipv4Prefix = "10.231.0.0/20".parse().unwrap();
        assert!(six.holds(four));
        let place = four.place(Ipv4Addr::new(10, 231, 1, 7));
        assert_eq!(six.at(place).to_string(), "fd00:1:2:3::107");
        let small: Ipv6Prefix = "fd00::/118".parse().unwrap();
        assert!(!small.holds(four));
        let wide: Ipv6Prefix = "fd00::/8".parse().unwrap();
        assert!(wide.overlaps(six) && six.overlaps(wide) && !small.overlaps(six));
    }
}

//! What plugins answer (CNI specification, section 5).

use std::net::IpAddr;

use serde::Deserialize;
use serde_json::Value;

use crate::network::{Address, Dns};

/// The most interfaces and addresses that are taken from a plugin.
const MOST: usize = 256;

/// What ADD promises, as far as it is used. Versions 0.3.0 to 1.1.0 share these fields.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Promise {
    /// Names of the interfaces inside the pod's namespace, in their order.
    pub interfaces: Vec<String>,
    /// Each address with the interface it is promised on, where the plugin says which.
    pub addresses: Vec<(Address, Option<String>)>,
    /// How names are to be resolved, if the plugin says so.
    pub dns: Option<Dns>,
    /// Names of the sysctls that plugins have set, with dots; they are not in the answer.
    pub sysctls: Vec<String>,
}

#[derive(Deserialize)]
struct Reply {
    #[serde(default)]
    interfaces: Vec<Interface>,
    #[serde(default)]
    ips: Vec<Ip>,
    #[serde(default)]
    dns: DnsReply,
}

#[derive(Deserialize)]
struct Interface {
    name: String,
    #[serde(default)]
    sandbox: String,
}

#[derive(Deserialize)]
struct Ip {
    address: String,
    interface: Option<usize>,
}

#[derive(Default, Deserialize)]
struct DnsReply {
    #[serde(default)]
    nameservers: Vec<String>,
    #[serde(default)]
    search: Vec<String>,
    #[serde(default)]
    options: Vec<String>,
}

/// The error of a plugin.
#[derive(Debug, Deserialize)]
pub struct Refusal {
    /// Its number: 1 to 99 are the specification's.
    #[serde(default)]
    pub code: u32,
    /// In short.
    pub msg: String,
    /// At length; may be empty.
    #[serde(default)]
    pub details: String,
}

impl Promise {
    /// Reads the last plugin's answer. Says what is wrong with it.
    pub fn read(reply: &Value) -> Result<Self, String> {
        let reply = Reply::deserialize(reply).map_err(|error| error.to_string())?;
        if reply.interfaces.len() > MOST || reply.ips.len() > MOST {
            return Err(format!(
                "it has {} interfaces and {} addresses; {MOST} of each are possible",
                reply.interfaces.len(),
                reply.ips.len()
            ));
        }
        let mut addresses = Vec::new();
        for ip in &reply.ips {
            let place = match ip.interface {
                None => None,
                Some(index) => {
                    let interface = reply.interfaces.get(index);
                    let interface = interface.ok_or_else(|| {
                        format!(
                            "{} is on interface {index}, which it does not list",
                            ip.address
                        )
                    })?;
                    Some(interface.name.clone())
                }
            };
            addresses.push((address(&ip.address)?, place));
        }
        let inside = reply.interfaces.into_iter();
        let inside = inside.filter(|interface| !interface.sandbox.is_empty());
        Ok(Self {
            sysctls: Vec::new(),
            interfaces: inside.map(|interface| interface.name).collect(),
            addresses,
            dns: dns(reply.dns),
        })
    }
}

fn address(text: &str) -> Result<Address, String> {
    let wrong = || format!("{text:?} is no address with the length of its prefix");
    let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
    let address: IpAddr = address.parse().map_err(|_| wrong())?;
    let prefix: u8 = prefix.parse().map_err(|_| wrong())?;
    if prefix > if address.is_ipv4() { 32 } else { 128 } {
        return Err(wrong());
    }
    Ok(Address { address, prefix })
}

fn dns(reply: DnsReply) -> Option<Dns> {
    let nameservers: Vec<IpAddr> = reply
        .nameservers
        .iter()
        .filter_map(|word| word.parse().ok())
        .collect();
    (!nameservers.is_empty()).then_some(Dns {
        nameservers,
        searches: reply.search,
        options: reply.options,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_what_is_inside_the_pod_is_the_pods() {
        let promise = Promise::read(&json!({
            "cniVersion": "1.0.0",
            "interfaces": [
                {"name": "cni0", "mac": "0e:00:00:00:00:01"},
                {"name": "veth1"},
                {"name": "eth0", "mac": "0e:00:00:00:00:02", "sandbox": "/run/netns/x"}],
            "ips": [{"address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 2},
                    {"version": "6", "address": "fd00::5/64"}],
            "dns": {"nameservers": ["10.0.0.10"], "search": ["lan"]}}))
        .unwrap();
        assert_eq!(promise.interfaces, ["eth0"]);
        let four = Address {
            address: "10.1.0.5".parse().unwrap(),
            prefix: 16,
        };
        assert_eq!(promise.addresses[0], (four, Some("eth0".to_owned())));
        assert_eq!(promise.addresses[1].1, None);
        assert_eq!(promise.dns.unwrap().searches, ["lan"]);
    }

    #[test]
    fn nonsense_is_said() {
        for (reply, why) in [
            (json!({"ips": [{"address": "10.0.0.1"}]}), "10.0.0.1"),
            (json!({"ips": [{"address": "10.0.0.1/33"}]}), "33"),
            (
                json!({"ips": [{"address": "10.0.0.1/8", "interface": 3}]}),
                "interface 3",
            ),
            (json!(7), "struct"),
        ] {
            let error = Promise::read(&reply).unwrap_err();
            assert!(error.contains(why), "{reply}: {error}");
        }
        let many: Vec<_> = (0..300).map(|_| json!({"address": "10.0.0.1/8"})).collect();
        assert!(Promise::read(&json!({ "ips": many })).is_err());
    }
}

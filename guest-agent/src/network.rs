//! The guest's network as the host describes it.

mod figures;
mod netlink;

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use bulkhead_agent_api::v1::Interface;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

pub use figures::figures;
use netlink::LinkChange;

/// Why the network is not as the host wants it.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The request makes no sense.
    #[error("interface {interface:?}: {what}")]
    Invalid {
        /// Its name in the request.
        interface: String,
        /// What is wrong.
        what: &'static str,
    },
    /// No such device in the guest.
    #[error("interface {interface}: no device of the guest has the address {mac}")]
    Missing {
        /// Its name in the request.
        interface: String,
        /// The MAC looked for.
        mac: String,
    },
    /// The kernel refused.
    #[error("interface {interface}: cannot {what}: {source}")]
    Refused {
        /// Its name.
        interface: String,
        /// The step, as the rest of a sentence.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Names one interface and moves it to another network namespace, to be configured there.
pub fn hand_over(interface: &Interface, to: BorrowedFd<'_>) -> Result<(), NetworkError> {
    check(interface)?;
    let index = find(interface)?;
    let change = LinkChange {
        name: Some(&interface.name),
        namespace: Some(to.as_raw_fd()),
        ..LinkChange::default()
    };
    Socket::open()
        .and_then(|socket| socket.ask(netlink::change_link(index, change)))
        .map_err(|source| NetworkError::Refused {
            interface: interface.name.clone(),
            what: "move it to the pod's network namespace".into(),
            source,
        })
}

/// Sets up one interface: name, MTU, addresses, routes. One that was handed over has its name.
pub fn configure(interface: &Interface, handed_over: bool) -> Result<(), NetworkError> {
    check(interface)?;
    let name = interface.name.as_str();
    let refused = |what: String| {
        move |source: io::Error| NetworkError::Refused {
            interface: name.to_owned(),
            what,
            source,
        }
    };
    let socket = Socket::open().map_err(refused("open a netlink socket".into()))?;
    // /sys shows the devices of the guest's first network namespace.
    let index = match handed_over {
        true => rustix::net::netdevice::name_to_index(&socket.socket, name)
            .map_err(|error| refused("find it".into())(error.into()))?,
        false => find(interface)?,
    };
    // A link can be renamed only while it is down, which it is after boot.
    let change = LinkChange {
        name: Some(name),
        mtu: (interface.mtu > 0).then_some(interface.mtu),
        ..LinkChange::default()
    };
    socket
        .ask(netlink::change_link(index, change))
        .map_err(refused(format!("set its name and MTU {}", interface.mtu)))?;
    // Present only in a kernel with IPv6.
    let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/accept_dad"), "0");
    if !interface.exact_routes {
        // Neighbours on such a link are other pods, which have no routes to offer.
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/accept_ra"), "0");
    }
    let up = LinkChange {
        up: true,
        ..LinkChange::default()
    };
    socket
        .ask(netlink::change_link(index, up))
        .map_err(refused("bring it up".into()))?;
    for address in &interface.addresses {
        let what = format!("add {}/{}", show(&address.address), address.prefix_length);
        socket
            .ask(netlink::add_address(
                index,
                &address.address,
                address.prefix_length as u8,
                !interface.exact_routes,
            ))
            .map_err(refused(what))?;
    }
    for neighbour in &interface.neighbours {
        let what = format!("add the neighbour {}", show(&neighbour.address));
        socket
            .ask(netlink::add_neighbour(
                index,
                &neighbour.address,
                &neighbour.mac,
            ))
            .map_err(refused(what))?;
    }
    // Routes on the link first: a gateway must be reachable when its route is added.
    let (direct, far): (Vec<_>, Vec<_>) = interface
        .routes
        .iter()
        .partition(|route| route.gateway.is_empty());
    for route in direct.into_iter().chain(far) {
        let what = format!(
            "add the route to {}/{} by {:?}",
            show(&route.destination),
            route.prefix_length,
            show(&route.gateway)
        );
        socket
            .ask(netlink::add_route(index, route))
            .map_err(refused(what))?;
    }
    Ok(())
}

/// Brings `lo` up.
pub fn raise_loopback() -> io::Result<()> {
    let up = LinkChange {
        up: true,
        ..LinkChange::default()
    };
    Socket::open()?.ask(netlink::change_link(1, up))
}

fn check(interface: &Interface) -> Result<(), NetworkError> {
    let invalid = |what| {
        Err(NetworkError::Invalid {
            interface: interface.name.clone(),
            what,
        })
    };
    let name = &interface.name;
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > 15 || name.starts_with('.') || !name.chars().all(plain) {
        return invalid("the name must be 1 to 15 letters, digits, dots, dashes or underscores");
    }
    if interface.mac.len() != 6 {
        return invalid("the MAC must have 6 bytes");
    }
    let fits = |address: &[u8], prefix: u32| {
        matches!(address.len(), 4 | 16) && prefix as usize <= address.len() * 8
    };
    if interface
        .addresses
        .iter()
        .any(|a| !fits(&a.address, a.prefix_length))
    {
        return invalid("an address must have 4 or 16 bytes and a prefix that fits");
    }
    let routes_fit = interface.routes.iter().all(|route| {
        let alike = |address: &[u8]| address.is_empty() || address.len() == route.destination.len();
        fits(&route.destination, route.prefix_length)
            && alike(&route.gateway)
            && alike(&route.source)
            && route.scope <= 255
    });
    if !routes_fit {
        return invalid("a route's destination, prefix, gateway and source must fit one another");
    }
    let mut neighbours = interface.neighbours.iter();
    if !neighbours.all(|neighbour| fits(&neighbour.address, 0) && neighbour.mac.len() == 6) {
        return invalid("a neighbour must have an address of 4 or 16 bytes and a MAC of 6");
    }
    Ok(())
}

/// The index of the device with the interface's MAC.
fn find(interface: &Interface) -> Result<u32, NetworkError> {
    let wanted = interface
        .mac
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect::<Vec<_>>()
        .join(":");
    let read = |path: std::path::PathBuf| fs::read_to_string(path).unwrap_or_default();
    fs::read_dir("/sys/class/net")
        .into_iter()
        .flatten()
        .flatten()
        .find(|device| read(device.path().join("address")).trim() == wanted)
        .and_then(|device| read(device.path().join("ifindex")).trim().parse().ok())
        .ok_or(NetworkError::Missing {
            interface: interface.name.clone(),
            mac: wanted,
        })
}

fn show(address: &[u8]) -> String {
    if let Ok(four) = <[u8; 4]>::try_from(address) {
        return std::net::Ipv4Addr::from(four).to_string();
    }
    match <[u8; 16]>::try_from(address) {
        Ok(six) => std::net::Ipv6Addr::from(six).to_string(),
        Err(_) => String::from("the link"),
    }
}

/// An rtnetlink socket, one request at a time.
struct Socket {
    socket: OwnedFd,
}

impl Socket {
    fn open() -> io::Result<Self> {
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            // NETLINK_ROUTE is protocol 0.
            None,
        )?;
        rustix::net::connect(&socket, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self { socket })
    }

    fn ask(&self, request: Vec<u8>) -> io::Result<()> {
        rustix::net::send(&self.socket, &request, SendFlags::empty())?;
        let mut answer = [0; 4096];
        loop {
            let (length, _) = rustix::net::recv(&self.socket, &mut answer[..], RecvFlags::empty())?;
            match netlink::acknowledgement(answer.get(..length).unwrap_or_default()) {
                Some(0) => return Ok(()),
                Some(errno) => return Err(io::Error::from_raw_os_error(errno)),
                None => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_agent_api::v1::{Address, Route};

    fn interface() -> Interface {
        Interface {
            name: "eth0".into(),
            mac: vec![2, 0, 0, 0, 0, 1],
            mtu: 1500,
            addresses: vec![Address {
                address: vec![10, 0, 0, 2],
                prefix_length: 24,
            }],
            routes: vec![Route {
                destination: vec![0; 4],
                prefix_length: 0,
                gateway: vec![10, 0, 0, 1],
                ..Route::default()
            }],
            ..Interface::default()
        }
    }

    #[test]
    fn numbers_that_do_not_fit_are_refused() {
        assert!(check(&interface()).is_ok());
        let mut wide = interface();
        wide.addresses[0].prefix_length = 33;
        assert!(check(&wide).is_err());
        let mut mixed = interface();
        mixed.routes[0].gateway = vec![0; 16];
        assert!(check(&mixed).is_err());
        let mut named = interface();
        named.name = "../eth0".into();
        assert!(check(&named).is_err());
    }

    #[test]
    fn a_missing_device_is_named_by_its_mac() {
        let error = configure(&interface(), false).unwrap_err().to_string();
        assert!(error.contains("02:00:00:00:00:01"), "{error}");
    }
}

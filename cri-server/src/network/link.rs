//! Links and addresses of one network namespace, by rtnetlink(7).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};
use std::pin::pin;

use rtnetlink::packet_route::address::{AddressAttribute, AddressHeaderFlags};
use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkAttribute, LinkMessage};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use rtnetlink::{
    LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
};
use tokio_stream::StreamExt;

use super::error::NetworkError;
use super::prefix::{Ipv4Prefix, Ipv6Prefix};

/// A connection to the kernel for the namespace of the thread that opened it. Its task ends
/// with this value.
pub struct Links {
    handle: rtnetlink::Handle,
    connection: tokio::task::JoinHandle<()>,
}

/// What we ask of a link.
#[derive(Debug, Clone)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub alias: Option<String>,
    pub mtu: u32,
}

/// The two ends of a pod's link: one on the bridge, one in the pod's namespace.
pub struct Pair<'a, N> {
    /// Name of the host's end.
    pub host: &'a str,
    /// Index of the bridge it is put on.
    pub bridge: u32,
    /// Name of the pod's end.
    pub pod: &'a str,
    /// Where the pod's end goes.
    pub namespace: N,
    /// Hardware address of the pod's end.
    pub mac: [u8; 6],
    pub mtu: u32,
}

impl Links {
    /// Opens the connection; needs a runtime.
    pub fn open() -> Result<Self, NetworkError> {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(|source| NetworkError::Netlink {
                step: "open an rtnetlink socket".to_owned(),
                source,
            })?;
        Ok(Self {
            handle,
            connection: tokio::spawn(connection),
        })
    }

    /// The connection itself.
    pub fn handle(&self) -> &rtnetlink::Handle {
        &self.handle
    }

    /// The link of that name, if there is one.
    pub async fn find(&self, name: &str) -> Result<Option<Link>, NetworkError> {
        let mut found = pin!(self.handle.link().get().match_name(name).execute());
        match found.next().await {
            Some(Ok(message)) => Ok(Some(link(&message))),
            Some(Err(error)) if is_absent(&error) => Ok(None),
            Some(Err(error)) => Err(netlink(format!("look up link {name}"), error)),
            None => Ok(None),
        }
    }

    /// Every link.
    pub async fn all(&self) -> Result<Vec<Link>, NetworkError> {
        let mut dump = pin!(self.handle.link().get().execute());
        let mut links = Vec::new();
        while let Some(message) = dump.next().await {
            let message = message.map_err(|error| netlink("list links".to_owned(), error))?;
            links.push(link(&message));
        }
        Ok(links)
    }

    /// Makes a bridge, still down. Its hardware address is fixed: otherwise it would change with
    /// its ports, and pods would send to a gateway that is gone.
    pub async fn add_bridge(
        &self,
        name: &str,
        mac: [u8; 6],
        mtu: u32,
    ) -> Result<Option<Link>, NetworkError> {
        let message = LinkMessageBuilder::<LinkBridge>::new(name)
            .address(mac.to_vec())
            .mtu(mtu)
            .build();
        match self.handle.link().add(message).execute().await {
            Ok(()) => self.find(name).await,
            Err(error) if errno(&error) == rustix::io::Errno::EXIST.raw_os_error() => Ok(None),
            Err(error) => Err(netlink(format!("make bridge {name}"), error)),
        }
    }

    /// Makes the pair in one request: named, on the bridge, in its namespace. The host's end is
    /// up; the pod's cannot be before the pair is whole.
    pub async fn add_pair(&self, pair: Pair<'_, impl AsFd>) -> Result<(), NetworkError> {
        let pod = LinkUnspec::new_with_name(pair.pod)
            .address(pair.mac.to_vec())
            .mtu(pair.mtu)
            .setns_by_fd(pair.namespace.as_fd().as_raw_fd())
            .build();
        let message = LinkVeth::new(pair.host, pair.pod)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(pod)))
            .mtu(pair.mtu)
            .controller(pair.bridge)
            .up()
            .build();
        self.handle
            .link()
            .add(message)
            .execute()
            .await
            .map_err(|error| netlink(format!("make link pair {}", pair.host), error))
    }

    /// Brings a link up.
    pub async fn up(&self, link: &Link) -> Result<(), NetworkError> {
        self.set(LinkUnspec::new_with_index(link.index).up().build(), || {
            format!("bring up link {}", link.name)
        })
        .await
    }

    /// Sets a link's alias, by which its owner knows it again.
    pub async fn set_alias(&self, link: &Link, alias: &str) -> Result<(), NetworkError> {
        self.set(
            LinkUnspec::new_with_index(link.index).alias(alias).build(),
            || format!("set the alias of link {}", link.name),
        )
        .await
    }

    /// Sets the largest payload of a link, in bytes.
    pub async fn set_mtu(&self, link: &Link, mtu: u32) -> Result<(), NetworkError> {
        self.set(
            LinkUnspec::new_with_index(link.index).mtu(mtu).build(),
            || format!("set the MTU of link {} to {mtu}", link.name),
        )
        .await
    }

    /// Lets a port of a bridge have back what came in by it, where the host has translated it: a
    /// pod that asks for itself by the host's address.
    pub async fn set_hairpin(&self, port: &Link) -> Result<(), NetworkError> {
        let message = LinkBridgePort::new(port.index).hairpin(true).build();
        let set = self.handle.link().set_port(message).execute().await;
        set.map_err(|error| netlink(format!("set the hairpin mode of link {}", port.name), error))
    }

    async fn set(
        &self,
        message: LinkMessage,
        step: impl FnOnce() -> String,
    ) -> Result<(), NetworkError> {
        self.handle
            .link()
            .set(message)
            .execute()
            .await
            .map_err(|error| netlink(step(), error))
    }

    /// Removes the link; nothing when it is gone.
    pub async fn remove(&self, link: &Link) -> Result<(), NetworkError> {
        match self.handle.link().del(link.index).execute().await {
            Err(error) if !is_absent(&error) => {
                Err(netlink(format!("remove link {}", link.name), error))
            }
            _ => Ok(()),
        }
    }

    /// Gives the link an address, which counts at once; nothing when it has it.
    pub async fn add_address(
        &self,
        link: &Link,
        address: IpAddr,
        length: u8,
    ) -> Result<(), NetworkError> {
        let mut request = self.handle.address().add(link.index, address, length);
        if address.is_ipv6() {
            request.message_mut().header.flags = AddressHeaderFlags::Nodad;
        }
        request
            .replace()
            .execute()
            .await
            .map_err(|error| netlink(format!("give {address} to link {}", link.name), error))
    }

    /// The networks of the link's first address of each family, link-local ones aside.
    pub async fn networks(
        &self,
        link: &Link,
    ) -> Result<(Option<Ipv4Prefix>, Option<Ipv6Prefix>), NetworkError> {
        let mut dump = pin!(
            self.handle
                .address()
                .get()
                .set_link_index_filter(link.index)
                .execute()
        );
        let (mut four, mut six) = (None, None);
        // Read to the end: an answer left half read would be mixed into the next one.
        while let Some(message) = dump.next().await {
            let message = message
                .map_err(|error| netlink(format!("list addresses of {}", link.name), error))?;
            let length = message.header.prefix_len;
            for attribute in &message.attributes {
                match attribute {
                    AddressAttribute::Local(IpAddr::V4(address)) => {
                        four = four.or(Ipv4Prefix::around(*address, length));
                    }
                    AddressAttribute::Address(IpAddr::V6(address))
                        if !address.is_unicast_link_local() =>
                    {
                        six = six.or(Ipv6Prefix::around(*address, length));
                    }
                    _ => {}
                }
            }
        }
        Ok((four, six))
    }

    /// Every IPv4 destination this host has a route to, the default route aside, in all tables.
    pub async fn destinations(&self) -> Result<Vec<Ipv4Prefix>, NetworkError> {
        let request = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let routes = self.routes(request).await?;
        // Multicast and broadcast routes of the local table lie inside networks already listed.
        let known = routes.iter().filter_map(|route| match destination(route)? {
            IpAddr::V4(address) => {
                Ipv4Prefix::around(address, route.header.destination_prefix_length)
            }
            IpAddr::V6(_) => None,
        });
        Ok(known.collect())
    }

    /// As [`Self::destinations`], of IPv6.
    pub async fn destinations6(&self) -> Result<Vec<Ipv6Prefix>, NetworkError> {
        let request = RouteMessageBuilder::<Ipv6Addr>::new().build();
        let routes = self.routes(request).await?;
        let known = routes.iter().filter_map(|route| match destination(route)? {
            IpAddr::V6(address) => {
                Ipv6Prefix::around(address, route.header.destination_prefix_length)
            }
            IpAddr::V4(_) => None,
        });
        Ok(known.collect())
    }

    /// The index of the link the IPv4 default route leaves by, if there is one.
    pub async fn default_link(&self) -> Result<Option<u32>, NetworkError> {
        let request = RouteMessageBuilder::<Ipv4Addr>::new().build();
        Ok(self.routes(request).await?.iter().find_map(|route| {
            let default = route.header.destination_prefix_length == 0
                && route.header.kind == RouteType::Unicast;
            route
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    RouteAttribute::Oif(index) if default => Some(*index),
                    _ => None,
                })
        }))
    }

    async fn routes(&self, request: RouteMessage) -> Result<Vec<RouteMessage>, NetworkError> {
        let mut dump = pin!(self.handle.route().get(request).execute());
        let mut routes = Vec::new();
        while let Some(message) = dump.next().await {
            routes.push(message.map_err(|error| netlink("list routes".to_owned(), error))?);
        }
        Ok(routes)
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// An error of ours around one of rtnetlink's.
pub fn netlink(step: String, source: rtnetlink::Error) -> NetworkError {
    let source = match errno(&source) {
        0 => io::Error::other(source),
        errno => io::Error::from_raw_os_error(errno),
    };
    NetworkError::Netlink { step, source }
}

fn errno(error: &rtnetlink::Error) -> i32 {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.raw_code().saturating_neg(),
        _ => 0,
    }
}

fn is_absent(error: &rtnetlink::Error) -> bool {
    errno(error) == rustix::io::Errno::NODEV.raw_os_error()
}

fn link(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        alias: None,
        mtu: 0,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            _ => {}
        }
    }
    link
}

fn destination(route: &RouteMessage) -> Option<IpAddr> {
    let mut attributes = route.attributes.iter();
    attributes.find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some((*address).into()),
        RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some((*address).into()),
        _ => None,
    })
}

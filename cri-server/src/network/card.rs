//! The guest's card as the link in the pod's namespace is: hardware address, MTU, addresses,
//! routes and neighbours, whoever set them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::pin::pin;

use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteType,
};
use tokio_stream::{Stream, StreamExt};

use super::error::NetworkError;
use super::link::{Link, Links, netlink};
use super::{Address, Interface, Neighbour, Route};

/// The most entries of each kind that one card has.
const MOST: usize = 1024;

/// Reads the card that `link` is, for a guest that reaches it by `tap`.
pub async fn read(links: &Links, link: &Link, tap: &str) -> Result<Interface, NetworkError> {
    let handle = links.handle();
    let of_link = |what: &str| format!("list the {what} of link {}", link.name);
    let mut found = pin!(handle.link().get().match_index(link.index).execute());
    let mut mac = None;
    while let Some(message) = found.next().await {
        let message = message.map_err(|error| netlink(of_link("attributes"), error))?;
        for attribute in message.attributes {
            if let LinkAttribute::Address(bytes) = attribute {
                mac = <[u8; 6]>::try_from(bytes).ok();
            }
        }
    }
    let mac = mac.ok_or_else(|| NetworkError::Unusable {
        link: link.name.clone(),
        why: "it has no hardware address of 6 bytes, so no guest can have it".to_owned(),
    })?;
    let addresses = handle.address().get();
    let addresses = addresses.set_link_index_filter(link.index).execute();
    let addresses = all(addresses, of_link("addresses")).await?;
    let neighbours = all(handle.neighbours().get().execute(), of_link("neighbours")).await?;
    let four = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let mut routes = all(handle.route().get(four).execute(), of_link("routes")).await?;
    let six = RouteMessageBuilder::<Ipv6Addr>::new().build();
    routes.extend(all(handle.route().get(six).execute(), of_link("routes")).await?);
    let unusable = |why| NetworkError::Unusable {
        link: link.name.clone(),
        why,
    };
    Ok(Interface {
        name: link.name.clone(),
        mac,
        mtu: link.mtu,
        addresses: addresses.iter().filter_map(address).collect(),
        exact_routes: true,
        routes: routes
            .iter()
            .filter_map(|message| route(message, link.index).transpose())
            .collect::<Result<_, _>>()
            .map_err(unusable)?,
        neighbours: neighbours
            .iter()
            .filter_map(|message| neighbour(message, link.index))
            .collect(),
        tap: tap.to_owned(),
    })
}

async fn all<T>(
    dump: impl Stream<Item = Result<T, rtnetlink::Error>>,
    step: String,
) -> Result<Vec<T>, NetworkError> {
    let mut dump = pin!(dump);
    let mut kept = Vec::new();
    // Read to the end: an answer left half read would be mixed into the next one.
    while let Some(message) = dump.next().await {
        kept.push(message.map_err(|error| netlink(step.clone(), error))?);
    }
    if kept.len() > MOST {
        let source = std::io::Error::other(format!("there are more than {MOST}"));
        return Err(NetworkError::Netlink { step, source });
    }
    Ok(kept)
}

/// An address that others may use; a guest makes its link-local ones itself.
fn address(message: &AddressMessage) -> Option<Address> {
    // IPv4: the own one, where ADDRESS is the other end's. IPv6 has only ADDRESS.
    let mut local = None;
    let mut address = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => address = Some(*ip),
            _ => {}
        }
    }
    let address = local.or(address)?;
    (!is_link_local(address)).then_some(Address {
        address,
        prefix: message.header.prefix_len,
    })
}

/// A route of the main table by this link, those left out that a guest has by itself; or why it
/// cannot be had in the guest.
fn route(message: &RouteMessage, index: u32) -> Result<Option<Route>, String> {
    let header = &message.header;
    let mut route = Route {
        destination: match header.address_family {
            AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
            _ => Ipv6Addr::UNSPECIFIED.into(),
        },
        prefix: header.destination_prefix_length,
        gateway: None,
        metric: 0,
        mtu: 0,
        advertised_mss: 0,
        scope: u8::from(header.scope),
        on_link: header.flags.contains(RouteFlags::Onlink),
        source: None,
    };
    let mut ours = false;
    let mut several = false;
    let mut other = false;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(oif) => ours = *oif == index,
            RouteAttribute::Destination(to) => {
                route.destination = ip(to).unwrap_or(route.destination)
            }
            RouteAttribute::Gateway(by) => route.gateway = ip(by),
            RouteAttribute::PrefSource(source) => route.source = ip(source),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::MultiPath(hops) => {
                several = hops.iter().any(|hop| hop.interface_index == index);
            }
            RouteAttribute::Via(_) => other = true,
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    match metric {
                        RouteMetric::Mtu(bytes) => route.mtu = *bytes,
                        RouteMetric::Advmss(bytes) => route.advertised_mss = *bytes,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    let main = header.table == RouteHeader::RT_TABLE_MAIN && header.kind == RouteType::Unicast;
    if !main || !(ours || several) || is_link_local(route.destination) {
        return Ok(None);
    }
    if several || other {
        return Err(format!(
            "its route to {}/{} has several next hops, or one of another address family",
            route.destination, route.prefix
        ));
    }
    Ok(Some(route))
}

/// A neighbour that somebody wrote down, rather than one the kernel has found.
fn neighbour(message: &NeighbourMessage, index: u32) -> Option<Neighbour> {
    let fixed = message.header.state == NeighbourState::Permanent;
    if message.header.ifindex != index || !fixed {
        return None;
    }
    let mut address = None;
    let mut mac = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => {
                address = Some(IpAddr::V4(*ip));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => {
                address = Some(IpAddr::V6(*ip));
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = <[u8; 6]>::try_from(bytes.as_slice()).ok();
            }
            _ => {}
        }
    }
    Some(Neighbour {
        address: address?,
        mac: mac?,
    })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

/// Every IPv6 link has these, from its hardware address on; 169.254.0.0/16 is an address like
/// others, which some networks use for a gateway.
fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(six) if six.is_unicast_link_local())
}

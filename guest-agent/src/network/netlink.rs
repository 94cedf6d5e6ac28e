//! The few rtnetlink requests the agent needs, as bytes (rtnetlink(7)).

use bulkhead_agent_api::v1::Route;

/// Header of every message, `struct nlmsghdr`.
const HEADER: usize = 16;

const REQUEST: u16 = 0x1;
const ACKNOWLEDGE: u16 = 0x4;
const REPLACE: u16 = 0x100;
const CREATE: u16 = 0x400;

const NEW_LINK: u16 = 16;
const NEW_ADDRESS: u16 = 20;
const NEW_ROUTE: u16 = 24;
const NEW_NEIGHBOUR: u16 = 28;
const ERROR: u16 = 2;

/// A request under construction.
#[derive(Debug)]
struct Message {
    bytes: Vec<u8>,
}

impl Message {
    fn new(kind: u16, flags: u16, body: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(REQUEST | ACKNOWLEDGE | flags).to_ne_bytes());
        bytes.extend_from_slice(body);
        Self { bytes }
    }

    /// Adds a `struct rtattr` with its padding.
    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = (value.len() + 4) as u16;
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    fn finish(mut self) -> Vec<u8> {
        let length = self.bytes.len() as u32;
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes
    }
}

/// What of a link to change.
#[derive(Debug, Clone, Copy, Default)]
pub struct LinkChange<'a> {
    /// IFLA_IFNAME.
    pub name: Option<&'a str>,
    /// IFLA_MTU.
    pub mtu: Option<u32>,
    /// Sets IFF_UP.
    pub up: bool,
    /// IFLA_NET_NS_FD: to where it moves.
    pub namespace: Option<i32>,
}

/// RTM_NEWLINK of an existing link.
pub fn change_link(index: u32, change: LinkChange<'_>) -> Vec<u8> {
    let up = u32::from(change.up);
    let mut body = [0; 16];
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body[8..12].copy_from_slice(&up.to_ne_bytes());
    body[12..16].copy_from_slice(&up.to_ne_bytes());
    let mut message = Message::new(NEW_LINK, 0, &body);
    if let Some(mtu) = change.mtu {
        message = message.attribute(4, &mtu.to_ne_bytes());
    }
    if let Some(name) = change.name {
        let mut name = name.as_bytes().to_vec();
        name.push(0);
        message = message.attribute(3, &name);
    }
    if let Some(namespace) = change.namespace {
        message = message.attribute(28, &namespace.to_ne_bytes());
    }
    message.finish()
}

fn family(address: &[u8]) -> u8 {
    if address.len() == 4 { 2 } else { 10 }
}

/// RTM_NEWADDR, `routed` with a route to its network. IPv6 addresses skip duplicate address
/// detection: the host has given this one to this pod alone, and a tentative address cannot be
/// used for a second.
pub fn add_address(index: u32, address: &[u8], prefix: u8, routed: bool) -> Vec<u8> {
    const NO_DAD: u32 = 0x02;
    const NO_PREFIX_ROUTE: u32 = 0x200;
    let six = address.len() == 16;
    let mut body = [0; 8];
    body[0] = family(address);
    body[1] = prefix;
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    let flags = if six { NO_DAD } else { 0 } | if routed { 0 } else { NO_PREFIX_ROUTE };
    Message::new(NEW_ADDRESS, CREATE | REPLACE, &body)
        .attribute(2, address)
        .attribute(1, address)
        .attribute(8, &flags.to_ne_bytes())
        .finish()
}

/// RTM_NEWROUTE in the main table. Without a gateway the destination is on the link.
pub fn add_route(index: u32, route: &Route) -> Vec<u8> {
    const MAIN: u8 = 254;
    const BOOT: u8 = 3;
    const UNICAST: u8 = 1;
    const ON_LINK: u32 = 4;
    let [a, b, c, d] = if route.on_link { ON_LINK } else { 0 }.to_ne_bytes();
    let body = [
        family(&route.destination),
        route.prefix_length as u8,
        0,
        0,
        MAIN,
        BOOT,
        route.scope as u8,
        UNICAST,
        a,
        b,
        c,
        d,
    ];
    let mut message = Message::new(NEW_ROUTE, CREATE | REPLACE, &body);
    if route.prefix_length > 0 {
        message = message.attribute(1, &route.destination);
    }
    if !route.gateway.is_empty() {
        message = message.attribute(5, &route.gateway);
    }
    if route.metric > 0 {
        message = message.attribute(6, &route.metric.to_ne_bytes());
    }
    if !route.source.is_empty() {
        message = message.attribute(7, &route.source);
    }
    // RTAX_MTU and RTAX_ADVMSS inside RTA_METRICS.
    let mut metrics = Vec::new();
    for (kind, value) in [(2u16, route.mtu), (8, route.advertised_mss)] {
        if value > 0 {
            metrics.extend_from_slice(&8u16.to_ne_bytes());
            metrics.extend_from_slice(&kind.to_ne_bytes());
            metrics.extend_from_slice(&value.to_ne_bytes());
        }
    }
    if !metrics.is_empty() {
        message = message.attribute(8, &metrics);
    }
    message.attribute(4, &index.to_ne_bytes()).finish()
}

/// RTM_NEWNEIGH of a neighbour that stays.
pub fn add_neighbour(index: u32, address: &[u8], mac: &[u8]) -> Vec<u8> {
    const PERMANENT: u16 = 0x80;
    let mut body = [0; 12];
    body[0] = family(address);
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body[8..10].copy_from_slice(&PERMANENT.to_ne_bytes());
    Message::new(NEW_NEIGHBOUR, CREATE | REPLACE, &body)
        .attribute(1, address)
        .attribute(2, mac)
        .finish()
}

/// The errno of an acknowledgement (0: done), or `None` when the bytes are not one.
pub fn acknowledgement(bytes: &[u8]) -> Option<i32> {
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let code = i32::from_ne_bytes(bytes.get(HEADER..HEADER + 4)?.try_into().ok()?);
    (kind == ERROR).then_some(code.saturating_neg())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_renamed_and_raised_in_one_message() {
        let change = LinkChange {
            name: Some("eth0"),
            mtu: Some(1450),
            up: true,
            namespace: None,
        };
        let bytes = change_link(2, change);
        #[rustfmt::skip]
        let expected = [
            52, 0, 0, 0, 16, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0,
            0, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0,
            8, 0, 4, 0, 0xaa, 5, 0, 0,
            9, 0, 3, 0, b'e', b't', b'h', b'0', 0, 0, 0, 0,
        ];
        assert_eq!(bytes, expected);
    }

    #[test]
    fn a_default_route_names_no_destination() {
        let route = Route {
            destination: vec![0; 4],
            gateway: vec![10, 1, 2, 3],
            ..Route::default()
        };
        let bytes = add_route(2, &route);
        #[rustfmt::skip]
        let expected = [
            44, 0, 0, 0, 24, 0, 5, 5, 0, 0, 0, 0, 0, 0, 0, 0,
            2, 0, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0,
            8, 0, 5, 0, 10, 1, 2, 3,
            8, 0, 4, 0, 2, 0, 0, 0,
        ];
        assert_eq!(bytes, expected);
    }

    #[test]
    fn an_ipv6_address_is_usable_at_once() {
        let bytes = add_address(3, &[0xfd; 16], 64, true);
        assert_eq!(bytes[16..24], [10, 64, 0, 0, 3, 0, 0, 0]);
        assert_eq!(bytes[64..], [8, 0, 8, 0, 2, 0, 0, 0]);
    }

    #[test]
    fn a_route_carries_all_that_the_host_says() {
        let route = Route {
            destination: vec![10, 2, 0, 0],
            prefix_length: 16,
            gateway: vec![169, 254, 1, 1],
            metric: 100,
            mtu: 1400,
            on_link: true,
            source: vec![10, 1, 0, 5],
            ..Route::default()
        };
        #[rustfmt::skip]
        let expected = [
            2, 16, 0, 0, 254, 3, 0, 1, 4, 0, 0, 0,
            8, 0, 1, 0, 10, 2, 0, 0,
            8, 0, 5, 0, 169, 254, 1, 1,
            8, 0, 6, 0, 100, 0, 0, 0,
            8, 0, 7, 0, 10, 1, 0, 5,
            12, 0, 8, 0, 8, 0, 2, 0, 0x78, 5, 0, 0,
            8, 0, 4, 0, 2, 0, 0, 0,
        ];
        assert_eq!(add_route(2, &route)[HEADER..], expected);
    }

    #[test]
    fn a_neighbour_stays() {
        let bytes = add_neighbour(2, &[10, 0, 0, 1], &[2, 0, 0, 0, 0, 9]);
        #[rustfmt::skip]
        let expected = [
            2, 0, 0, 0, 2, 0, 0, 0, 0x80, 0, 0, 0,
            8, 0, 1, 0, 10, 0, 0, 1,
            10, 0, 2, 0, 2, 0, 0, 0, 0, 9, 0, 0,
        ];
        assert_eq!(bytes[HEADER..], expected);
    }

    #[test]
    fn an_acknowledgement_carries_the_errno() {
        let mut bytes = [0; 36];
        bytes[4] = 2;
        bytes[16..20].copy_from_slice(&(-19_i32).to_ne_bytes());
        assert_eq!(acknowledgement(&bytes), Some(19));
        assert_eq!(acknowledgement(&bytes[..10]), None);
    }
}

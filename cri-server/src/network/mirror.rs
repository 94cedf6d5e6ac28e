//! Joins a link and a tap in one namespace: what enters one leaves by the other.
//!
//! Each gets an ingress qdisc with filters (u32, so that only the most common classifier is needed)
//! that redirect frames to the other's egress (tc-mirred(8)): every one, or those that a guard lets
//! pass. What it refuses goes back to its sender, so that no action is needed that drops, which a
//! kernel may lack. Neither the namespace's stack nor its packet filters see any of them.

use rtnetlink::packet_route::tc::{
    TcAction, TcActionAttribute, TcActionGeneric, TcActionMirror, TcActionMirrorOption,
    TcActionOption, TcActionType, TcFilterU32Option, TcMirror, TcMirrorActionType, TcU32Key,
    TcU32Selector, TcU32SelectorFlags,
};

use super::error::NetworkError;
use super::guard::{Guard, Key, Verdict};
use super::link::{Links, netlink};

/// `ETH_P_ALL`.
const EVERY_PROTOCOL: u16 = 0x0003;
/// The handle of an ingress qdisc, `ffff:`.
const INGRESS: u32 = 0xffff_0000;
/// A key that every frame matches.
const EVERYTHING: Key = Key {
    at: 0,
    value: 0,
    mask: 0,
};
/// Redirects both ways between the link and the tap with these indices; from the tap, what `guard`
/// lets pass.
pub async fn join(
    links: &Links,
    link: u32,
    tap: u32,
    guard: Option<&Guard>,
) -> Result<(), NetworkError> {
    let from = Ingress::open(links, link).await?;
    from.add(1, EVERY_PROTOCOL, &[EVERYTHING], redirect(tap))
        .await?;
    let from = Ingress::open(links, tap).await?;
    let mut priority = 1;
    for rule in guard.map(Guard::rules).unwrap_or_default() {
        let action = match rule.verdict {
            Verdict::Pass => redirect(link),
            Verdict::Refuse => redirect(tap),
        };
        from.add(priority, rule.protocol, &rule.keys, action)
            .await?;
        priority += 1;
    }
    let rest = match guard {
        None => redirect(link),
        Some(_) => redirect(tap),
    };
    from.add(priority, EVERY_PROTOCOL, &[EVERYTHING], rest)
        .await
}

/// The filters of what a link receives.
struct Ingress<'a> {
    links: &'a Links,
    index: u32,
}

impl<'a> Ingress<'a> {
    async fn open(links: &'a Links, index: u32) -> Result<Self, NetworkError> {
        let qdisc = links.handle().qdisc().add(index.cast_signed()).ingress();
        let added = qdisc.execute().await;
        let step = || format!("add an ingress qdisc to link {index}");
        added.map_err(|error| netlink(step(), error))?;
        Ok(Self { links, index })
    }

    /// Filters are asked in the order of their priorities.
    async fn add(
        &self,
        priority: u16,
        protocol: u16,
        keys: &[Key],
        action: TcAction,
    ) -> Result<(), NetworkError> {
        let mut selector = TcU32Selector::default();
        selector.flags = TcU32SelectorFlags::Terminal;
        selector.keys = keys.iter().map(key).collect();
        // A rule has a dozen.
        selector.nkeys = u8::try_from(keys.len()).unwrap_or(u8::MAX);
        let options = [
            TcFilterU32Option::Selector(selector),
            TcFilterU32Option::Action(vec![action]),
        ];
        let fail = |error| {
            netlink(
                format!("add filter {priority} to link {}", self.index),
                error,
            )
        };
        let mut filters = self.links.handle().traffic_filter(self.index.cast_signed());
        let filter = filters
            .add()
            .parent(INGRESS)
            .priority(priority)
            .protocol(protocol.to_be())
            .u32(&options)
            .map_err(fail)?;
        filter.execute().await.map_err(fail)
    }
}

fn key(key: &Key) -> TcU32Key {
    let mut own = TcU32Key::default();
    (own.off, own.val, own.mask) = (key.at, key.value, key.mask);
    own
}

fn redirect(to: u32) -> TcAction {
    let mut mirror = TcMirror::default();
    mirror.generic = TcActionGeneric::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let options = TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror));
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![options]),
    ];
    action
}

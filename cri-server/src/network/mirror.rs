//! Joins a link and a tap in one namespace: what enters one leaves by the other.
//!
//! Each gets an ingress qdisc with one filter that takes every frame (u32 with a key that always
//! matches, so that only the most common classifier is needed) and redirects it to the other's
//! egress (tc-mirred(8)). Neither the namespace's stack nor its packet filters see the frames.

use super::error::NetworkError;
use super::link::{Links, netlink};

/// `ETH_P_ALL`, in the byte order of the wire as `tcm_info` wants it.
const EVERY_PROTOCOL: u16 = 0x0003_u16.to_be();
/// The handle of an ingress qdisc, `ffff:`.
const INGRESS: u32 = 0xffff_0000;

/// Redirects both ways between the links with the indices `a` and `b`.
pub async fn join(links: &Links, a: u32, b: u32) -> Result<(), NetworkError> {
    redirect(links, a, b).await?;
    redirect(links, b, a).await
}

async fn redirect(links: &Links, from: u32, to: u32) -> Result<(), NetworkError> {
    let index = from.cast_signed();
    links
        .handle()
        .qdisc()
        .add(index)
        .ingress()
        .execute()
        .await
        .map_err(|error| netlink(format!("add an ingress qdisc to link {from}"), error))?;
    let step = || format!("redirect link {from} to link {to}");
    links
        .handle()
        .traffic_filter(index)
        .add()
        .parent(INGRESS)
        .protocol(EVERY_PROTOCOL)
        .redirect(to)
        .map_err(|error| netlink(step(), error))?
        .execute()
        .await
        .map_err(|error| netlink(step(), error))
}

//! Address translation for pods that speak to the world, and for ports of the host that lead to
//! pods, in an nftables table of our own.
//!
//! One table per bridge, named like it. No other table is read or changed, iptables' neither. It is
//! set as a whole, in one transaction: no rule depends on what was there.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::error::NetworkError;
use super::netfilter::{NF_TABLES, ask, attribute};
use super::ports::HostPort;
use super::subnets::Subnets;

const PLACES: [&str; 4] = [
    "/usr/sbin/nft",
    "/sbin/nft",
    "/usr/local/sbin/nft",
    "/usr/bin/nft",
];
const TIME_LIMIT: Duration = Duration::from_secs(60);

/// The `nft` program, if this host has it.
pub fn program() -> Option<PathBuf> {
    PLACES.iter().map(PathBuf::from).find(|path| path.exists())
}

/// A port of the host with the pod it leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way {
    pub port: HostPort,
    pub v4: Ipv4Addr,
    pub v6: Option<Ipv6Addr>,
}

/// Sets the table of `bridge`, replacing one that is there, in one transaction.
pub async fn set(bridge: &str, subnets: Subnets, ways: &[Way]) -> Result<(), NetworkError> {
    run(bridge, &table(bridge, subnets, ways)).await
}

/// Whether the table of `bridge` is there, whatever is in it: `nft flush ruleset`, which a start of
/// nftables' service does, takes all tables away. Where the kernel does not say, it is not.
pub fn is_set(bridge: &str) -> bool {
    const GET_TABLE: u16 = NF_TABLES | 1;
    const NFPROTO_INET: u8 = 1;
    const TABLE_NAME: u16 = 1;
    let name = [bridge.as_bytes(), &[0]].concat();
    let asked = attribute(TABLE_NAME, &name)
        .and_then(|name| ask(GET_TABLE, 0, NFPROTO_INET, &name, |_| {}));
    asked.is_ok()
}

fn table(bridge: &str, subnets: Subnets, ways: &[Way]) -> String {
    let v4 = subnets.v4;
    let any4 = elements(ways, false, false);
    let one4 = elements(ways, false, true);
    let any6 = elements(ways, true, false);
    let one6 = elements(ways, true, true);
    let (mut only_own, mut masquerade) = (String::new(), String::new());
    if let Some(v6) = subnets.v6 {
        // Neighbours are asked for, and multicast joined, with link-local addresses.
        only_own =
            format!("    iifname \"{bridge}\" ip6 saddr != {{ {v6}, fe80::/10, :: }} drop\n");
        masquerade = format!(
            "    ip6 saddr {v6} oifname \"{bridge}\" ct status dnat masquerade
    ip6 saddr {v6} ip6 daddr != {v6} oifname != \"{bridge}\" masquerade\n"
        );
    }
    // raw: before connection tracking, so a forged source address leaves no trace. The guest is
    // not to be trusted with its address; the bridge would carry any. Nor with its destination:
    // `route_localnet` of the bridge, which ports on 127.0.0.1 need, opens the host's loopback.
    // The first masquerade is for pods that reach pods by an address of the host, or of a service:
    // the answer must come back through here, where it would go straight over the bridge.
    format!(
        "add table inet {bridge}
delete table inet {bridge}
table inet {bridge} {{
  map any4 {{ type inet_proto . inet_service : ipv4_addr . inet_service; {any4} }}
  map one4 {{ type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service; {one4} }}
  map any6 {{ type inet_proto . inet_service : ipv6_addr . inet_service; {any6} }}
  map one6 {{ type ipv6_addr . inet_proto . inet_service : ipv6_addr . inet_service; {one6} }}
  chain raw {{
    type filter hook prerouting priority raw; policy accept;
    iifname \"{bridge}\" ip saddr != {v4} drop
    iifname \"{bridge}\" ip daddr 127.0.0.0/8 drop
{only_own}  }}
  chain ports {{
    dnat ip to ip daddr . meta l4proto . th dport map @one4
    dnat ip to meta l4proto . th dport map @any4
    dnat ip6 to ip6 daddr . meta l4proto . th dport map @one6
    dnat ip6 to meta l4proto . th dport map @any6
  }}
  chain prerouting {{
    type nat hook prerouting priority dstnat; policy accept;
    fib daddr type local jump ports
  }}
  chain output {{
    type nat hook output priority -100; policy accept;
    ip6 daddr ::1 accept
    fib daddr type local jump ports
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {{ {v4}, 127.0.0.0/8 }} oifname \"{bridge}\" ct status dnat masquerade
    ip saddr {v4} ip daddr != {v4} oifname != \"{bridge}\" masquerade
{masquerade}  }}
}}
"
    )
}

/// The ways of a family that are bound to one address of the host, or to every one.
fn elements(ways: &[Way], ipv6: bool, bound: bool) -> String {
    let element = |way: &Way| {
        let HostPort {
            protocol,
            host,
            port,
            target,
        } = way.port;
        let pod: IpAddr = if ipv6 { way.v6?.into() } else { way.v4.into() };
        let to = format!("{protocol} . {port} : {pod} . {target}");
        match host {
            Some(host) if host.is_ipv6() != ipv6 => None,
            Some(host) if !host.is_unspecified() => bound.then(|| format!("{host} . {to}")),
            _ => (!bound).then_some(to),
        }
    };
    let all: Vec<String> = ways.iter().filter_map(element).collect();
    match all.as_slice() {
        [] => String::new(),
        all => format!("elements = {{ {} }}", all.join(", ")),
    }
}

/// Removes the table of `bridge`; nothing when there is none.
pub async fn remove(bridge: &str) -> Result<(), NetworkError> {
    run(
        bridge,
        &format!("add table inet {bridge}\ndelete table inet {bridge}\n"),
    )
    .await
}

async fn run(table: &str, rules: &str) -> Result<(), NetworkError> {
    let fail = |reason: String| NetworkError::Nat {
        table: table.to_owned(),
        reason,
    };
    let program =
        program().ok_or_else(|| fail("there is no `nft` program; install nftables".to_owned()))?;
    let shown = |path: &Path, error| fail(format!("cannot run {}: {error}", path.display()));
    let mut child = Command::new(&program)
        .args(["-f", "-"])
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| shown(&program, error))?;
    if let Some(mut input) = child.stdin.take() {
        // When it cannot read, it says why on stderr and by its status.
        let _ = input.write_all(rules.as_bytes()).await;
    }
    let output = tokio::time::timeout(TIME_LIMIT, child.wait_with_output())
        .await
        .map_err(|_| fail(format!("nft did not end within {} s", TIME_LIMIT.as_secs())))?
        .map_err(|error| shown(&program, error))?;
    if output.status.success() {
        return Ok(());
    }
    let said: String = String::from_utf8_lossy(&output.stderr)
        .chars()
        .take(500)
        .collect();
    Err(fail(format!(
        "nft ended with {}: {}",
        output.status,
        said.trim()
    )))
}

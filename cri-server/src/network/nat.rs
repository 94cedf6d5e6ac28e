//! Address translation for pods that speak to the world, in an nftables table of our own.
//!
//! One table per bridge, named like it. No other table is read or changed, iptables' neither.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::error::NetworkError;
use super::prefix::Ipv4Prefix;

const PLACES: [&str; 4] = [
    "/usr/sbin/nft",
    "/sbin/nft",
    "/usr/local/sbin/nft",
    "/usr/bin/nft",
];
const TIME_LIMIT: Duration = Duration::from_secs(10);

/// The `nft` program, if this host has it.
pub fn program() -> Option<PathBuf> {
    PLACES.iter().map(PathBuf::from).find(|path| path.exists())
}

/// Sets the table of `bridge`, replacing one that is there, in one transaction.
pub async fn set(bridge: &str, pool: Ipv4Prefix) -> Result<(), NetworkError> {
    // raw: before connection tracking, so a forged source address leaves no trace. The guest is
    // not to be trusted with its address; the bridge would carry any.
    let rules = format!(
        "add table ip {bridge}
delete table ip {bridge}
table ip {bridge} {{
  chain prerouting {{
    type filter hook prerouting priority raw; policy accept;
    iifname \"{bridge}\" ip saddr != {pool} drop
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {pool} ip daddr != {pool} oifname != \"{bridge}\" masquerade
  }}
}}
"
    );
    run(bridge, &rules).await
}

/// Removes the table of `bridge`; nothing when there is none.
pub async fn remove(bridge: &str) -> Result<(), NetworkError> {
    run(
        bridge,
        &format!("add table ip {bridge}\ndelete table ip {bridge}\n"),
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

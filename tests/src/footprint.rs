//! What a suite must leave of the host's network as it was: links with their MTUs and queues, routes,
//! packet filters and settings. What CNI plugins leave behind is compared with a list, which holds
//! for containerd too.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Where the settings are that are compared.
const SETTINGS: [&str; 2] = ["/proc/sys/net/ipv4", "/proc/sys/net/ipv6"];

/// The host's network at one moment; everything is a line of text that says what.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    lines: BTreeSet<String>,
    /// Chains and rules of plugins.
    plugins: BTreeSet<String>,
    /// Values by their paths.
    settings: BTreeMap<String, String>,
    /// Whether something was taken for given.
    excused: bool,
}

/// What Debian's plugins leave behind in tables of iptables, under containerd too
/// (`firewall` and `portmap`, of both families).
const LEFT_BY_PLUGINS: [&str; 13] = [
    "filter chain CNI-ADMIN",
    "filter chain CNI-FORWARD",
    "filter chain CNI-FORWARD: counter jump CNI-ADMIN",
    "filter chain FORWARD: counter jump CNI-FORWARD",
    "nat chain CNI-HOSTPORT-DNAT",
    "nat chain CNI-HOSTPORT-MASQ",
    // Of IPv6, nft does not show what iptables calls MASQUERADE.
    "nat chain CNI-HOSTPORT-MASQ: meta mark & 0x00002000 == 0x00002000 counter",
    "nat chain CNI-HOSTPORT-MASQ: meta mark & 0x00002000 == 0x00002000 counter masquerade",
    "nat chain CNI-HOSTPORT-SETMARK",
    "nat chain CNI-HOSTPORT-SETMARK: counter meta mark set mark or 0x2000",
    "nat chain OUTPUT: fib daddr type local counter jump CNI-HOSTPORT-DNAT",
    "nat chain POSTROUTING: counter jump CNI-HOSTPORT-MASQ",
    "nat chain PREROUTING: fib daddr type local counter jump CNI-HOSTPORT-DNAT",
];

impl Footprint {
    /// Looks at the network of this process.
    pub fn look() -> Result<Self> {
        let mut now = Self::default();
        let found = &mut now.lines;
        for link in fs::read_dir("/sys/class/net")? {
            let link = link?;
            let mtu = fs::read_to_string(link.path().join("mtu")).unwrap_or_default();
            found.insert(format!(
                "link {} mtu {}",
                link.file_name().display(),
                mtu.trim()
            ));
        }
        let queues = said("tc", &["qdisc", "show"])?;
        // Who else holds one is no part of it.
        let queues = queues
            .lines()
            .filter_map(|line| line.split(" refcnt").next());
        found.extend(queues.map(|line| line.trim().to_owned()));
        for family in ["-4", "-6"] {
            let routes = said("ip", &[family, "route", "show", "table", "all"])?;
            found.extend(routes.lines().map(|line| route(family, line)));
        }
        // `--stateless`: what a rule has counted is no part of it.
        let (rules, plugins) = rules(&said("nft", &["--stateless", "list", "ruleset"])?);
        found.extend(rules);
        now.plugins = plugins;
        for directory in SETTINGS {
            settings(Path::new(directory), &mut now.settings);
        }
        Ok(now)
    }

    /// Takes what is more by now for given.
    pub fn excuse(&mut self) -> Result<()> {
        let now = Self::look()?;
        self.lines.extend(now.lines);
        self.plugins.extend(now.plugins);
        self.settings.extend(now.settings);
        self.excused = true;
        Ok(())
    }

    /// Fails where plugins have left other chains and rules since than [`LEFT_BY_PLUGINS`].
    pub fn expect_of_plugins(&self) -> Result<()> {
        let now = Self::look()?;
        let left = now.plugins.difference(&self.plugins);
        let left: Vec<_> = left
            .filter(|line| !LEFT_BY_PLUGINS.contains(&line.as_str()))
            .collect();
        ensure!(left.is_empty(), "plugins have left behind {left:#?}");
        Ok(())
    }

    /// Fails with what is more, or less, than at this moment.
    pub fn expect_again(&self) -> Result<()> {
        let now = Self::look()?;
        let left: Vec<_> = now.lines.difference(&self.lines).collect();
        let mut gone: Vec<_> = self.lines.difference(&now.lines).collect();
        if self.excused {
            // What was excused may go.
            gone.clear();
        }
        let changed: Vec<_> = now
            .settings
            .iter()
            .filter(|(path, value)| {
                !is_forwarding(path) && self.settings.get(*path).is_some_and(|was| was != *value)
            })
            .collect();
        ensure!(
            changed.is_empty(),
            "the host's settings are not as they were: {changed:#?}"
        );
        ensure!(
            left.is_empty() && gone.is_empty(),
            "the host's network is not as it was; left behind: {left:#?}, gone: {gone:#?}"
        );
        self.expect_of_plugins()
    }
}

/// Every file below the directory with what it says; of those that can be read.
fn settings(directory: &Path, found: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            settings(&path, found);
        } else if let Ok(value) = fs::read_to_string(&path) {
            found.insert(path.display().to_string(), value.trim().to_owned());
        }
    }
}

/// Forwarding is switched on with the first pod, by plugins too, and for good, since others may come
/// to rely on it. The kernel copies it to each link, and a router takes no redirects.
fn is_forwarding(path: &str) -> bool {
    let names = ["ip_forward", "forwarding", "accept_redirects"];
    names.iter().any(|name| path.ends_with(&format!("/{name}")))
}

fn said(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.with_context(|| program.to_owned())?;
    ensure!(
        output.status.success(),
        "{program} {arguments:?}: {output:?}"
    );
    Ok(String::from_utf8(output.stdout)?)
}

/// A route without the time that it has left.
fn route(family: &str, line: &str) -> String {
    let mut words = line.split_whitespace();
    let mut kept = vec!["route", family];
    while let Some(word) = words.next() {
        match word {
            "expires" => drop(words.next()),
            word => kept.push(word),
        }
    }
    kept.join(" ")
}

/// Rules with their tables and chains, and apart from them those of plugins, whose names begin with
/// CNI-. What iptables makes for those does not count: tables and empty chains.
fn rules(text: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    let (mut found, mut of_plugins) = (BTreeSet::new(), BTreeSet::new());
    let (mut table, mut block) = (String::new(), String::new());
    for line in text.lines().map(str::trim) {
        match line.strip_suffix(" {") {
            Some(head) if head.starts_with("table ") => {
                head.clone_into(&mut table);
                block.clear();
            }
            Some(head) => head.clone_into(&mut block),
            None => {}
        }
        let iptables = matches!(
            table.split_whitespace().collect::<Vec<_>>().as_slice(),
            ["table", "ip" | "ip6", "nat" | "filter" | "mangle" | "raw"]
        );
        let structure = line.ends_with('{') || line == "}" || line.starts_with("type ");
        let plugins = line.contains("CNI-") || block.contains("CNI-");
        if line.is_empty() || line.starts_with('#') || iptables && structure && !plugins {
            continue;
        }
        if iptables && plugins {
            let table = table.split_whitespace().last().unwrap_or_default();
            of_plugins.insert(match structure {
                true => format!("{table} {block}"),
                false => format!("{table} {block}: {line}"),
            });
        } else {
            found.insert(format!("{table}, {block}: {line}"));
        }
    }
    (found, of_plugins)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_of_plugins_do_not_count_and_rules_do() {
        let left = "table ip nat {
            chain POSTROUTING {
                type nat hook postrouting priority srcnat; policy accept;
                counter jump CNI-HOSTPORT-MASQ
            }
            chain CNI-HOSTPORT-MASQ {
                meta mark & 0x00002000 == 0x00002000 counter masquerade
            }
        }
        # Warning: table ip filter is managed by iptables-nft, do not touch!
        table ip filter {
            chain CNI-ADMIN {
            }
        }";
        let (own, plugins) = rules(left);
        assert_eq!(own, BTreeSet::new());
        let jump = "nat chain POSTROUTING: counter jump CNI-HOSTPORT-MASQ";
        assert!(plugins.contains(jump), "{plugins:?}");
        let rule = left.replace("counter jump CNI-HOSTPORT-MASQ", "tcp dport 80 accept");
        let expected = "table ip nat, chain POSTROUTING: tcp dport 80 accept";
        assert_eq!(rules(&rule).0, BTreeSet::from([expected.to_owned()]));
        let own = "table inet bulkhead0 {\n chain raw {\n }\n}";
        assert!(!rules(own).0.is_empty());
    }

    #[test]
    fn a_route_has_no_time_left() {
        let line = "default via fe80::1 dev eth0 proto ra expires 1790sec hoplimit 64";
        let expected = "route -6 default via fe80::1 dev eth0 proto ra hoplimit 64";
        assert_eq!(route("-6", line), expected);
    }
}

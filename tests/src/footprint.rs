//! What a suite must leave of the host's network as it was: links, routes and packet filters.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The host's network at one moment; everything is a line of text that says what.
#[derive(Debug, PartialEq, Eq)]
pub struct Footprint(BTreeSet<String>);

impl Footprint {
    /// Looks at the network of this process.
    pub fn look() -> Result<Self> {
        let mut found = BTreeSet::new();
        for link in std::fs::read_dir("/sys/class/net")? {
            found.insert(format!("link {}", link?.file_name().display()));
        }
        for family in ["-4", "-6"] {
            let routes = said("ip", &[family, "route", "show", "table", "all"])?;
            found.extend(routes.lines().map(|line| route(family, line)));
        }
        // `--stateless`: what a rule has counted is no part of it.
        found.extend(rules(&said("nft", &["--stateless", "list", "ruleset"])?));
        Ok(Self(found))
    }

    /// Fails with what is more, or less, than at this moment.
    pub fn expect_again(&self) -> Result<()> {
        let now = Self::look()?;
        let left: Vec<_> = now.0.difference(&self.0).collect();
        let gone: Vec<_> = self.0.difference(&now.0).collect();
        ensure!(
            left.is_empty() && gone.is_empty(),
            "the host's network is not as it was; left behind: {left:#?}, gone: {gone:#?}"
        );
        Ok(())
    }
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

/// Rules with their tables and chains. Plugins leave chains of their own behind, under containerd
/// too, whose names begin with CNI-, and what iptables makes for those: tables and empty chains.
fn rules(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
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
        if line.is_empty() || line.starts_with('#') || iptables && (structure || plugins) {
            continue;
        }
        found.insert(format!("{table}, {block}: {line}"));
    }
    found
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
        assert_eq!(rules(left), BTreeSet::new());
        let rule = left.replace("counter jump CNI-HOSTPORT-MASQ", "tcp dport 80 accept");
        let expected = "table ip nat, chain POSTROUTING: tcp dport 80 accept";
        assert_eq!(rules(&rule), BTreeSet::from([expected.to_owned()]));
        let own = "table inet bulkhead0 {\n chain raw {\n }\n}";
        assert!(!rules(own).is_empty());
    }

    #[test]
    fn a_route_has_no_time_left() {
        let line = "default via fe80::1 dev eth0 proto ra expires 1790sec hoplimit 64";
        let expected = "route -6 default via fe80::1 dev eth0 proto ra hoplimit 64";
        assert_eq!(route("-6", line), expected);
    }
}

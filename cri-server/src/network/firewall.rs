//! Other firewalls of this host, whose rules are theirs: they are looked at and never changed.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::nat;

/// Where the older kind of iptables is, which `nft` does not see.
const LEGACY: [&str; 2] = ["/usr/sbin/iptables-legacy", "/usr/sbin/ip6tables-legacy"];
/// What a rule says that is meant for our bridges.
const OURS: &str = "bulkhead";

/// The chains that drop forwarded packets they have no rule for, and whose table has no rule that
/// names our bridges. Asks `nft` and iptables; blocks.
pub fn closed() -> Vec<String> {
    let mut found = Vec::new();
    if let Some(nft) = nat::program() {
        for chain in dropping(&said(&nft, &["list", "chains"])) {
            let [family, table, name] = &chain;
            let rules = said(&nft, &["--stateless", "list", "table", family, table]);
            if !rules.contains(OURS) {
                found.push(format!("{name} of nft's table {family} {table}"));
            }
        }
    }
    for (program, tables) in LEGACY
        .iter()
        .zip(["/proc/net/ip_tables_names", "/proc/net/ip6_tables_names"])
    {
        // To ask would load the tables where nobody uses them.
        let used = fs::read_to_string(tables).unwrap_or_default();
        if used.lines().any(|table| table == "filter") {
            let rules = said(Path::new(program), &["-S"]);
            if rules.contains("-P FORWARD DROP") && !rules.contains(OURS) {
                found.push(format!("FORWARD of {program}"));
            }
        }
    }
    found
}

/// What a program says; nothing where it is not there or fails.
fn said(program: &Path, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.ok().filter(|output| output.status.success());
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    text.unwrap_or_default()
}

/// Family, table and name of each chain for forwarded packets whose policy is to drop, of what
/// `nft list chains` says.
fn dropping(chains: &str) -> Vec<[String; 3]> {
    let mut found = Vec::new();
    let (mut table, mut chain) = (["", ""], "");
    for line in chains.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        match words.as_slice() {
            ["table", family, name, "{"] => table = [family, name],
            ["chain", name, "{"] => chain = name,
            ["type", "filter", "hook", "forward", .., "policy", "drop;"]
                if matches!(table, ["ip" | "ip6" | "inet", _]) =>
            {
                found.push([table[0], table[1], chain].map(str::to_owned));
            }
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_that_drop_what_is_forwarded_are_found() {
        let text = "table ip filter {
            chain INPUT {
                type filter hook input priority filter; policy drop;
            }
            chain FORWARD {
                type filter hook forward priority filter; policy drop;
            }
            chain DOCKER {
            }
        }
        table inet own {
            chain forward {
                type filter hook forward priority filter + 10; policy accept;
            }
        }
        table bridge wall {
            chain forward {
                type filter hook forward priority 0; policy drop;
            }
        }";
        let expected = ["ip", "filter", "FORWARD"].map(str::to_owned);
        assert_eq!(dropping(text), [expected]);
        assert!(dropping("").is_empty());
    }
}

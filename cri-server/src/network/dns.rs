//! How pods resolve names when their configuration does not say: as the host does.

use std::fs::File;
use std::io::Read;
use std::net::IpAddr;
use std::path::Path;

/// The host's own file, and the one systemd-resolved keeps for those who cannot use its stub.
const HOST: &str = "/etc/resolv.conf";
const RESOLVED: &str = "/run/systemd/resolve/resolv.conf";

const FILE_BYTES: u64 = 64 << 10;
/// glibc's `MAXNS`.
const NAMESERVERS: usize = 3;
/// What the kubelet allows.
const SEARCHES: usize = 32;
const OPTIONS: usize = 32;

/// The contents of a resolv.conf(5).
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Dns {
    /// At most three.
    pub nameservers: Vec<IpAddr>,
    /// Domains tried behind a short name.
    pub searches: Vec<String>,
    /// Such as `ndots:5`.
    pub options: Vec<String>,
}

impl Dns {
    /// Of this host. Resolvers on the loopback are left out, as a pod has another loopback; when
    /// nothing remains, the list behind systemd-resolved's stub is used. Blocks.
    pub fn of_host() -> Self {
        Self::of_files([HOST, RESOLVED].map(Path::new))
    }

    fn of_files(paths: [&Path; 2]) -> Self {
        let [host, resolved] = paths.map(|path| Self::parse(&read(path)));
        if host.nameservers.is_empty() && !resolved.nameservers.is_empty() {
            resolved
        } else {
            host
        }
    }

    fn parse(text: &str) -> Self {
        let mut dns = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => {
                    // A scope (`%eth0`) means nothing in a pod; such an entry does not parse.
                    let address: Option<IpAddr> = words.next().and_then(|word| word.parse().ok());
                    dns.nameservers
                        .extend(address.filter(|address| !address.is_loopback()));
                }
                // The last of these lines counts, resolv.conf(5).
                Some("search" | "domain") => {
                    dns.searches = words.take(SEARCHES).map(str::to_owned).collect();
                }
                Some("options") => dns.options.extend(words.map(str::to_owned)),
                _ => {}
            }
        }
        dns.nameservers.truncate(NAMESERVERS);
        dns.options.truncate(OPTIONS);
        dns
    }
}

fn read(path: &Path) -> String {
    let mut text = Vec::new();
    // A host without the file has no resolver; that is no error of the pod.
    if let Ok(file) = File::open(path) {
        let _ = file.take(FILE_BYTES).read_to_end(&mut text);
    }
    String::from_utf8_lossy(&text).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loopback_stub_gives_way_to_the_real_resolver() {
        let directory = tempfile::tempdir().unwrap();
        let [host, resolved] = ["host", "resolved"].map(|name| directory.path().join(name));
        std::fs::write(&host, "nameserver 127.0.0.53\nsearch lan\n").unwrap();
        std::fs::write(&resolved, "nameserver 192.0.2.7\nsearch example.org\n").unwrap();
        let dns = Dns::of_files([&host, &resolved]);
        assert_eq!(dns.nameservers, ["192.0.2.7".parse::<IpAddr>().unwrap()]);
        assert_eq!(dns.searches, ["example.org"]);
        std::fs::remove_file(&resolved).unwrap();
        let dns = Dns::of_files([&host, &resolved]);
        assert!(dns.nameservers.is_empty());
        assert_eq!(dns.searches, ["lan"]);
    }

    #[test]
    fn lines_are_read_as_resolv_conf_says() {
        let dns = Dns::parse(
            "# comment\nnameserver 192.0.2.1\nnameserver fe80::1%eth0\nnameserver 2001:db8::1\n\
             nameserver ::1\nnameserver 192.0.2.2\nnameserver 192.0.2.3\n\
             search a b\ndomain c\noptions ndots:5 edns0\n",
        );
        let expected: Vec<IpAddr> = ["192.0.2.1", "2001:db8::1", "192.0.2.2"]
            .iter()
            .map(|text| text.parse().unwrap())
            .collect();
        assert_eq!(dns.nameservers, expected);
        assert_eq!(dns.searches, ["c"]);
        assert_eq!(dns.options, ["ndots:5", "edns0"]);
    }
}

//! The resolv.conf of a pod.

use bulkhead_cri_api::v1 as cri;

use crate::network::Dns;

/// What the CRI's `DNSConfig` asks for; one that is absent or empty means the host's.
pub fn resolv_conf(asked: Option<&cri::DnsConfig>, host: &Dns) -> String {
    let empty = cri::DnsConfig::default();
    match asked {
        Some(config) if *config != empty => {
            write(&config.servers, &config.searches, &config.options)
        }
        _ => {
            let servers: Vec<_> = host.nameservers.iter().map(ToString::to_string).collect();
            write(&servers, &host.searches, &host.options)
        }
    }
}

fn write(servers: &[String], searches: &[String], options: &[String]) -> String {
    let mut text = String::new();
    let words = |words: &[String]| {
        // A line break in a word would be a line of its own.
        let words: Vec<_> = words
            .iter()
            .flat_map(|word| word.split_whitespace())
            .collect();
        words.join(" ")
    };
    for server in servers {
        text.push_str(&format!(
            "nameserver {}\n",
            words(std::slice::from_ref(server))
        ));
    }
    if !searches.is_empty() {
        text.push_str(&format!("search {}\n", words(searches)));
    }
    if !options.is_empty() {
        text.push_str(&format!("options {}\n", words(options)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Dns {
        Dns {
            nameservers: vec!["192.0.2.1".parse().unwrap()],
            searches: vec!["example.org".into()],
            options: Vec::new(),
        }
    }

    #[test]
    fn an_empty_configuration_means_the_hosts() {
        let expected = "nameserver 192.0.2.1\nsearch example.org\n";
        assert_eq!(resolv_conf(None, &host()), expected);
        let empty = cri::DnsConfig::default();
        assert_eq!(resolv_conf(Some(&empty), &host()), expected);
    }

    #[test]
    fn a_configuration_is_taken_whole_and_cannot_add_lines() {
        let config = cri::DnsConfig {
            servers: vec!["10.0.0.10".into()],
            searches: vec!["a.svc\nnameserver 6.6.6.6".into()],
            options: vec!["ndots:5".into()],
        };
        let text = resolv_conf(Some(&config), &host());
        assert_eq!(
            text,
            "nameserver 10.0.0.10\nsearch a.svc nameserver 6.6.6.6\noptions ndots:5\n"
        );
    }
}

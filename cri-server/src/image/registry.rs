//! Which registries there are, and how each is reached.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use reqwest::Client;
use serde::Deserialize;

use super::auth::{Authorization, Credentials};
use super::error::ImageError;
use super::reference::{Reference, is_host};
use super::source::{Endpoint, Source};

const REDIRECTS_MAX: usize = 5;

/// How to reach one registry: a section `[registry."host:port"]` of the configuration.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
pub struct RegistryConfig {
    /// Hosts asked first, in this order, each `host` or `host:port`. They get no credentials.
    pub mirrors: Vec<String>,
    /// Speak HTTP without TLS to this host.
    pub plain_http: bool,
    /// Certificates (PEM) to trust for this host besides the system's.
    pub ca_file: Option<PathBuf>,
}

/// The configuration of all registries, by host.
pub type Registries = BTreeMap<String, RegistryConfig>;

/// Limits in time for one request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// To connect.
    pub connect: Duration,
    /// Between two signs of life.
    pub idle: Duration,
}

/// The hosts known by configuration, with their connections.
pub(super) struct Network {
    registries: Registries,
    patience: Patience,
    system: OnceLock<Client>,
    own: HashMap<String, Client>,
}

impl Network {
    /// Checks the configuration.
    pub fn new(registries: Registries, patience: Patience) -> Result<Network, ImageError> {
        let mut own = HashMap::new();
        for (host, config) in &registries {
            let wrong = |reason| ImageError::Configuration {
                host: host.clone(),
                reason,
            };
            if let Some(odd) = std::iter::once(host)
                .chain(&config.mirrors)
                .find(|host| !is_host(host))
            {
                return Err(wrong(format!(
                    "`{odd}` is not a host name with an optional port"
                )));
            }
            if let Some(path) = &config.ca_file {
                let client = std::fs::read(path)
                    .map_err(|error| error.to_string())
                    .and_then(|pem| {
                        reqwest::Certificate::from_pem_bundle(&pem).map_err(|e| chain(&e))
                    })
                    .and_then(|certificates| {
                        let builder = builder(patience).tls_certs_merge(certificates);
                        builder.build().map_err(|error| chain(&error))
                    })
                    .map_err(|reason| wrong(format!("ca_file {}: {reason}", path.display())))?;
                own.insert(host.clone(), client);
            }
        }
        Ok(Network {
            registries,
            patience,
            system: OnceLock::new(),
            own,
        })
    }

    /// The places an image can come from: the mirrors of its registry, then the registry.
    pub fn source(
        &self,
        reference: &Reference,
        credentials: Option<Credentials>,
    ) -> Result<Source, ImageError> {
        let registry = reference.registry();
        let mirrors = self
            .registries
            .get(registry)
            .map_or(&[][..], |config| &config.mirrors);
        let credentials = credentials.filter(|credentials| credentials.are_for(registry));
        let mut endpoints = Vec::new();
        for mirror in mirrors {
            endpoints.push(self.endpoint(mirror, reference, None, true)?);
        }
        endpoints.push(self.endpoint(registry, reference, credentials, false)?);
        Ok(Source {
            reference: reference.clone(),
            endpoints,
            good: AtomicUsize::new(0),
            patience: self.patience,
        })
    }

    fn endpoint(
        &self,
        host: &str,
        reference: &Reference,
        credentials: Option<Credentials>,
        mirror: bool,
    ) -> Result<Endpoint, ImageError> {
        let plain = self
            .registries
            .get(host)
            .is_some_and(|config| config.plain_http);
        // The Hub's name is not the name of its registry.
        let server = if host == "docker.io" {
            "registry-1.docker.io"
        } else {
            host
        };
        let scheme = if plain { "http" } else { "https" };
        Ok(Endpoint {
            host: host.to_string(),
            base: format!("{scheme}://{server}/v2/{}", reference.repository()),
            // Lets a mirror of several registries tell them apart.
            query: if mirror {
                format!("?ns={}", reference.registry())
            } else {
                String::new()
            },
            client: self.client(host, reference)?,
            authorization: Authorization::new(credentials, reference.repository(), plain),
        })
    }

    fn client(&self, host: &str, reference: &Reference) -> Result<Client, ImageError> {
        if let Some(client) = self.own.get(host).or(self.system.get()) {
            return Ok(client.clone());
        }
        let built = builder(self.patience).build();
        // A machine without any certificates still reaches plain HTTP registries.
        let client = built
            .or_else(|_| builder(self.patience).tls_certs_only([]).build())
            .map_err(|error| ImageError::Unavailable {
                reference: reference.to_string(),
                reason: format!("no TLS client can be set up: {}", chain(&error)),
            })?;
        Ok(self.system.get_or_init(|| client).clone())
    }
}

fn builder(patience: Patience) -> reqwest::ClientBuilder {
    Client::builder()
        .user_agent(concat!("bulkhead/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(patience.connect)
        .read_timeout(patience.idle)
        .redirect(reqwest::redirect::Policy::custom(|attempt| {
            let secure = attempt
                .previous()
                .last()
                .is_some_and(|url| url.scheme() == "https");
            if attempt.previous().len() > REDIRECTS_MAX {
                attempt.error("too many redirects")
            } else if secure && attempt.url().scheme() != "https" {
                attempt.error("a redirect leads from https to plain http")
            } else {
                attempt.follow()
            }
        }))
}

/// An error with all its causes in one line; reqwest's own text leaves the cause away.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Patience = Patience {
        connect: Duration::from_secs(1),
        idle: Duration::from_secs(1),
    };

    #[test]
    fn the_configuration_is_read_and_checked() {
        let text = r#"
            ["docker.io"]
            mirrors = ["mirror.example:5000", "localhost:5000"]
            ["localhost:5000"]
            plain_http = true
        "#;
        let registries: Registries = toml::from_str(text).unwrap();
        let network = Network::new(registries, PATIENCE).unwrap();
        let source = network
            .source(&Reference::parse("busybox").unwrap(), None)
            .unwrap();
        let bases: Vec<_> = source.endpoints.iter().map(|e| e.base.as_str()).collect();
        assert_eq!(
            bases,
            [
                "https://mirror.example:5000/v2/library/busybox",
                "http://localhost:5000/v2/library/busybox",
                "https://registry-1.docker.io/v2/library/busybox",
            ]
        );
    }

    #[test]
    fn wrong_configuration_is_refused_by_name() {
        assert!(toml::from_str::<Registries>("[a]\nplain = true").is_err());
        let url = RegistryConfig {
            mirrors: vec!["http://m/".into()],
            ..Default::default()
        };
        let error = Network::new([("a.example".to_string(), url)].into(), PATIENCE)
            .err()
            .unwrap();
        assert!(error.to_string().contains("a.example"), "{error}");
        let missing = RegistryConfig {
            ca_file: Some("/does/not/exist.pem".into()),
            ..Default::default()
        };
        let error = Network::new([("a".to_string(), missing)].into(), PATIENCE)
            .err()
            .unwrap();
        assert!(error.to_string().contains("/does/not/exist.pem"), "{error}");
    }
}

//! Logs in at registries: basic and bearer (distribution project, "Token Authentication").

use std::fmt;
use std::sync::{Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{Client, Url};
use serde::Deserialize;

use super::registry::chain;

/// The most bytes of a token server's answer.
const TOKEN_MAX: usize = 256 << 10;
const CLIENT_ID: &str = "bulkhead";

/// How to log in at a registry.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    login: Login,
    server: String,
}

#[derive(Clone, PartialEq, Eq)]
enum Login {
    Password {
        username: String,
        password: String,
    },
    /// A refresh token, exchanged for an access token.
    Refresh(String),
    /// An access token, sent as it is.
    Access(String),
}

impl Credentials {
    /// A name and a password.
    pub fn password(username: impl Into<String>, password: impl Into<String>) -> Credentials {
        let login = Login::Password {
            username: username.into(),
            password: password.into(),
        };
        Credentials {
            login,
            server: String::new(),
        }
    }

    /// `auth` is base64 of `username:password`, as in Docker's configuration.
    ///
    /// # Errors
    /// Says what is wrong, without the secret.
    pub fn encoded(auth: &str) -> Result<Credentials, &'static str> {
        let decoded = STANDARD
            .decode(auth.trim())
            .map_err(|_| "`auth` is not base64")?;
        let decoded = String::from_utf8(decoded).map_err(|_| "`auth` is not text in base64")?;
        let (username, password) = decoded
            .split_once(':')
            .ok_or("`auth` is not `username:password` in base64")?;
        // Docker pads with NUL bytes at times.
        Ok(Credentials::password(
            username,
            password.trim_end_matches('\0'),
        ))
    }

    /// A refresh token.
    pub fn identity_token(token: impl Into<String>) -> Credentials {
        Credentials {
            login: Login::Refresh(token.into()),
            server: String::new(),
        }
    }

    /// An access token.
    pub fn registry_token(token: impl Into<String>) -> Credentials {
        Credentials {
            login: Login::Access(token.into()),
            server: String::new(),
        }
    }

    /// Restricts them to one server, given as a host or URL; empty means whichever registry the
    /// image names.
    #[must_use]
    pub fn for_server(mut self, server: &str) -> Credentials {
        let host = server.split_once("://").map_or(server, |(_, rest)| rest);
        let host = host.split('/').next().unwrap_or_default();
        self.server = match host {
            "index.docker.io" | "registry-1.docker.io" => "docker.io".to_string(),
            host => host.to_string(),
        };
        self
    }

    pub(super) fn are_for(&self, registry: &str) -> bool {
        self.server.is_empty() || self.server == registry
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(not shown)")
    }
}

/// What one host has been told, and is told with the next request.
pub(super) struct Authorization {
    credentials: Option<Credentials>,
    repository: String,
    /// The registry is plain HTTP, so its token server may be too.
    plain: bool,
    header: Mutex<Option<HeaderValue>>,
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

impl Authorization {
    pub fn new(credentials: Option<Credentials>, repository: &str, plain: bool) -> Authorization {
        let header = match &credentials {
            Some(Credentials {
                login: Login::Access(token),
                ..
            }) => bearer(token).ok(),
            _ => None,
        };
        let repository = repository.to_string();
        Authorization {
            credentials,
            repository,
            plain,
            header: Mutex::new(header),
        }
    }

    /// The header to send.
    pub fn header(&self) -> Option<HeaderValue> {
        self.header
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Answers a challenge, so that [`Authorization::header`] satisfies it.
    pub async fn answer(&self, client: &Client, headers: &HeaderMap) -> Result<(), String> {
        let mut challenges = Vec::new();
        for header in headers.get_all(WWW_AUTHENTICATE) {
            let text = header
                .to_str()
                .map_err(|_| "the challenge is not text".to_string())?;
            challenges.extend(http_auth::parse_challenges(text).map_err(|_| {
                "the registry asks for a log-in in a form that is not understood".to_string()
            })?);
        }
        let scheme = |name: &str| {
            challenges
                .iter()
                .find(|challenge| challenge.scheme.eq_ignore_ascii_case(name))
        };
        let header = if let Some(challenge) = scheme("Bearer") {
            let parameter = |name: &str| {
                let found = challenge
                    .params
                    .iter()
                    .find(|(key, _)| key.eq_ignore_ascii_case(name));
                found.map(|(_, value)| value.to_unescaped())
            };
            let realm = parameter("realm").ok_or("the bearer challenge names no realm")?;
            let request = TokenRequest {
                realm,
                service: parameter("service"),
            };
            bearer(&self.token(client, &request).await?)?
        } else if scheme("Basic").is_some() {
            match self
                .credentials
                .as_ref()
                .map(|credentials| &credentials.login)
            {
                Some(Login::Password { username, password }) => basic(username, password)?,
                _ => return Err("the registry asks for a name and a password".to_string()),
            }
        } else {
            return Err("the registry asks for a log-in, but not for basic or bearer".to_string());
        };
        *self.header.lock().unwrap_or_else(PoisonError::into_inner) = Some(header);
        Ok(())
    }

    async fn token(&self, client: &Client, request: &TokenRequest) -> Result<String, String> {
        let mut url = Url::parse(&request.realm)
            .map_err(|_| "the token server's address is not a URL".to_string())?;
        if url.scheme() != "https" && !(self.plain && url.scheme() == "http") {
            return Err(format!(
                "the token server {url} is not https: no secret is sent there"
            ));
        }
        let scope = format!("repository:{}:pull", self.repository);
        let login = self
            .credentials
            .as_ref()
            .map(|credentials| &credentials.login);
        let call = if let Some(Login::Refresh(token)) = login {
            let mut form = Url::parse("form:").map_err(|error| error.to_string())?;
            form.query_pairs_mut()
                .append_pair("grant_type", "refresh_token")
                .append_pair("client_id", CLIENT_ID)
                .append_pair("service", request.service.as_deref().unwrap_or_default())
                .append_pair("scope", &scope)
                .append_pair("refresh_token", token);
            client
                .post(url)
                .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
                .body(form.query().unwrap_or_default().to_string())
        } else {
            if let Some(service) = &request.service {
                url.query_pairs_mut().append_pair("service", service);
            }
            url.query_pairs_mut().append_pair("scope", &scope);
            match login {
                Some(Login::Password { username, password }) => client
                    .get(url)
                    .header(AUTHORIZATION, basic(username, password)?),
                _ => client.get(url),
            }
        };
        let mut response = call
            .send()
            .await
            .map_err(|e| format!("token server: {}", chain(&e)))?;
        if !response.status().is_success() {
            let host = response.url().host_str().unwrap_or_default();
            return Err(format!(
                "the token server {host} answered HTTP {}",
                response.status()
            ));
        }
        let mut body = Vec::new();
        while let Some(part) = response
            .chunk()
            .await
            .map_err(|error| format!("token server: {}", chain(&error)))?
        {
            body.extend_from_slice(&part);
            if body.len() > TOKEN_MAX {
                return Err(format!("the token is larger than {TOKEN_MAX} bytes"));
            }
        }
        let token: Token = serde_json::from_slice(&body)
            .map_err(|_| "the token server's answer is not understood".to_string())?;
        token
            .token
            .or(token.access_token)
            .ok_or_else(|| "the token server sent none".to_string())
    }
}

struct TokenRequest {
    realm: String,
    service: Option<String>,
}

fn bearer(token: &str) -> Result<HeaderValue, String> {
    secret(format!("Bearer {token}"))
}

fn basic(username: &str, password: &str) -> Result<HeaderValue, String> {
    secret(format!(
        "Basic {}",
        STANDARD.encode(format!("{username}:{password}"))
    ))
}

fn secret(text: String) -> Result<HeaderValue, String> {
    let mut value = HeaderValue::try_from(text)
        .map_err(|_| "the credentials have characters no header can carry".to_string())?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_auth_field_is_a_name_and_a_password() {
        let credentials = Credentials::encoded(&STANDARD.encode("user:pass:word")).unwrap();
        assert_eq!(credentials, Credentials::password("user", "pass:word"));
        assert!(Credentials::encoded("!").is_err());
        assert!(Credentials::encoded(&STANDARD.encode("user")).is_err());
    }

    #[test]
    fn credentials_for_one_server_are_for_no_other() {
        let credentials = Credentials::password("u", "p");
        assert!(credentials.are_for("a.example"));
        let credentials = credentials.for_server("https://index.docker.io/v1/");
        assert!(credentials.are_for("docker.io"));
        assert!(!credentials.are_for("a.example"));
    }

    #[test]
    fn secrets_are_not_shown() {
        let shown = format!("{:?}", Credentials::registry_token("secret"));
        assert!(!shown.contains("secret"));
    }
}

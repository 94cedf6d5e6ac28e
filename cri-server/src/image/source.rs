//! The places one image can come from, asked in turn.

use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, RANGE};
use reqwest::{Client, Response, StatusCode};
use serde::Deserialize;

use super::auth::Authorization;
use super::digest::Digest;
use super::error::ImageError;
use super::manifest;
use super::reference::Reference;
use super::registry::{Patience, chain};

/// Error texts of registries are cut here, in bytes.
const MESSAGE_MAX: u64 = 4096;

/// One host, with how to speak to it.
pub(super) struct Endpoint {
    pub host: String,
    pub base: String,
    pub query: String,
    pub client: Client,
    pub authorization: Authorization,
}

/// A document or its like, whole.
pub(super) struct Fetched {
    pub bytes: Vec<u8>,
    pub content_type: String,
}

/// A stream of a blob's bytes.
pub(super) struct Body {
    response: Response,
    /// The first byte's offset in the blob: as asked for, or 0 from a server without ranges.
    pub offset: u64,
}

impl Body {
    /// The next bytes; an error means the connection broke.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, BrokenOff> {
        self.response.chunk().await.map_err(|error| BrokenOff {
            silent: error.is_timeout(),
            reason: chain(&error),
        })
    }

    /// The host that sends.
    pub fn host(&self) -> String {
        self.response
            .url()
            .host_str()
            .unwrap_or_default()
            .to_string()
    }
}

/// A body that did not come to its end.
#[derive(Debug)]
pub(super) struct BrokenOff {
    /// Nothing was sent for longer than the limit.
    pub silent: bool,
    pub reason: String,
}

/// Where one image comes from.
pub(super) struct Source {
    pub reference: Reference,
    pub endpoints: Vec<Endpoint>,
    /// The endpoint that answered last: the one to ask next.
    pub good: AtomicUsize,
    pub patience: Patience,
}

enum Failure {
    NotFound(String),
    Denied(String),
    TimedOut(String),
    Unavailable(String),
}

impl Source {
    /// A manifest or index by tag or digest, at most `limit` bytes. Its digest is not checked
    /// here.
    pub async fn manifest(&self, version: &str, limit: u64) -> Result<Fetched, ImageError> {
        let what = format!("manifest {version}");
        let path = format!("manifests/{version}");
        let response = self.get(&path, Some(manifest::ACCEPT), 0, &what).await?;
        self.whole(response, limit, &what).await
    }

    /// A small blob, whole, with its digest checked.
    pub async fn document(
        &self,
        content: &manifest::Content,
        limit: u64,
    ) -> Result<Vec<u8>, ImageError> {
        let what = format!("configuration {}", content.digest);
        if content.size > limit {
            return Err(self.too_large(&what, limit));
        }
        let path = format!("blobs/{}", content.digest);
        let response = self.get(&path, None, 0, &what).await?;
        let bytes = self.whole(response, limit, &what).await?.bytes;
        let found = Digest::of(&bytes);
        if found != content.digest {
            return Err(ImageError::Corrupt {
                reference: self.reference.to_string(),
                reason: format!("{what}: the registry sent content with the digest {found}"),
            });
        }
        Ok(bytes)
    }

    /// A blob from byte `offset` on.
    pub async fn blob(&self, digest: &Digest, offset: u64) -> Result<Body, ImageError> {
        let path = format!("blobs/{digest}");
        let response = self
            .get(&path, None, offset, &format!("layer {digest}"))
            .await?;
        let offset = if response.status() == StatusCode::PARTIAL_CONTENT {
            offset
        } else {
            0
        };
        Ok(Body { response, offset })
    }

    async fn whole(
        &self,
        mut response: Response,
        limit: u64,
        what: &str,
    ) -> Result<Fetched, ImageError> {
        let content_type = response
            .headers()
            .get(CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
            .to_string();
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| {
            let reference = self.reference.to_string();
            if error.is_timeout() {
                let reason = format!("{what}: {}", self.silence(&error));
                ImageError::TimedOut { reference, reason }
            } else {
                let reason = format!("{what}: the connection broke: {}", chain(&error));
                ImageError::Corrupt { reference, reason }
            }
        })? {
            if bytes.len() as u64 + chunk.len() as u64 > limit {
                return Err(self.too_large(what, limit));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(Fetched {
            bytes,
            content_type,
        })
    }

    fn too_large(&self, what: &str, limit: u64) -> ImageError {
        ImageError::TooLarge {
            reference: self.reference.to_string(),
            reason: format!("{what} is larger than {limit} bytes"),
        }
    }

    fn silence(&self, error: &reqwest::Error) -> String {
        let host = error
            .url()
            .and_then(|url| url.host_str())
            .unwrap_or("the registry");
        format!("{host} sent nothing for {:?}", self.patience.idle)
    }

    /// Asks the endpoints in turn, the last good one first, until one has it.
    async fn get(
        &self,
        path: &str,
        accept: Option<&'static str>,
        offset: u64,
        what: &str,
    ) -> Result<Response, ImageError> {
        let good = self.good.load(Ordering::Relaxed);
        let order = (good..self.endpoints.len()).chain(0..good);
        let mut reasons = Vec::new();
        let mut worst = None;
        for index in order {
            let Some(endpoint) = self.endpoints.get(index) else {
                continue;
            };
            match self.get_from(endpoint, path, accept, offset).await {
                Ok(response) => {
                    self.good.store(index, Ordering::Relaxed);
                    return Ok(response);
                }
                Err(failure) => {
                    let (Failure::NotFound(reason)
                    | Failure::Denied(reason)
                    | Failure::TimedOut(reason)
                    | Failure::Unavailable(reason)) = &failure;
                    reasons.push(format!("{}: {reason}", endpoint.host));
                    // The registry itself, the last in the list, has the last word.
                    if index + 1 == self.endpoints.len() {
                        worst = Some(failure);
                    }
                }
            }
        }
        let reference = self.reference.to_string();
        let reason = format!("{what}: {}", reasons.join("; "));
        Err(match worst {
            Some(Failure::NotFound(_)) => ImageError::NotFound { reference, reason },
            Some(Failure::Denied(_)) => ImageError::Denied { reference, reason },
            Some(Failure::TimedOut(_)) => ImageError::TimedOut { reference, reason },
            Some(Failure::Unavailable(_)) | None => ImageError::Unavailable { reference, reason },
        })
    }

    async fn get_from(
        &self,
        endpoint: &Endpoint,
        path: &str,
        accept: Option<&'static str>,
        offset: u64,
    ) -> Result<Response, Failure> {
        let url = format!("{}/{path}{}", endpoint.base, endpoint.query);
        for attempt in 0..2 {
            let mut request = endpoint.client.get(&url);
            if let Some(accept) = accept {
                request = request.header(ACCEPT, accept);
            }
            if offset > 0 {
                request = request.header(RANGE, format!("bytes={offset}-"));
            }
            if let Some(header) = endpoint.authorization.header() {
                request = request.header(AUTHORIZATION, header);
            }
            let response = request
                .send()
                .await
                .map_err(|error| self.unreached(&error))?;
            match response.status() {
                StatusCode::OK | StatusCode::PARTIAL_CONTENT => return Ok(response),
                StatusCode::UNAUTHORIZED if attempt == 0 => {
                    endpoint
                        .authorization
                        .answer(&endpoint.client, response.headers())
                        .await
                        .map_err(Failure::Denied)?;
                }
                _ => return Err(refusal(response).await),
            }
        }
        Err(Failure::Denied(
            "the credentials were not accepted".to_string(),
        ))
    }

    fn unreached(&self, error: &reqwest::Error) -> Failure {
        if error.is_connect() {
            Failure::Unavailable(chain(error))
        } else if error.is_timeout() {
            Failure::TimedOut(self.silence(error))
        } else {
            Failure::Unavailable(chain(error))
        }
    }
}

async fn refusal(mut response: Response) -> Failure {
    let status = response.status();
    let mut body = Vec::new();
    while let Ok(Some(chunk)) = response.chunk().await {
        body.extend_from_slice(&chunk);
        if body.len() as u64 > MESSAGE_MAX {
            break;
        }
    }
    let reason = match message(&body) {
        Some(message) => format!("HTTP {status}: {message}"),
        None => format!("HTTP {status}"),
    };
    match status {
        StatusCode::NOT_FOUND => Failure::NotFound(reason),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Failure::Denied(reason),
        _ => Failure::Unavailable(reason),
    }
}

/// The first message of an error document (OCI distribution-spec, "Error Codes").
fn message(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Errors {
        errors: Vec<One>,
    }
    #[derive(Deserialize)]
    struct One {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let errors: Errors = serde_json::from_slice(body).ok()?;
    let first = errors.errors.first()?;
    let text = format!("{} {}", first.code, first.message);
    Some(
        text.trim()
            .chars()
            .filter(|c| !c.is_control())
            .take(300)
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_registries_are_cut_and_cleaned() {
        let body = br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"no\u001b[31m such"}]}"#;
        assert_eq!(message(body).unwrap(), "MANIFEST_UNKNOWN no[31m such");
        assert_eq!(message(b"<html>"), None);
    }
}

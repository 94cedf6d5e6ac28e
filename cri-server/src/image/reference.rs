//! Names of images (the grammar of the distribution project's `reference` package).

use std::fmt;

use super::digest::Digest;
use super::error::ImageError;

/// The longest `registry/repository` a name may have, in bytes.
const NAME_MAX: usize = 255;
/// The longest tag, in bytes (OCI distribution-spec, "Pulling manifests").
const TAG_MAX: usize = 128;
const DEFAULT_REGISTRY: &str = "docker.io";
const DEFAULT_TAG: &str = "latest";

/// A normalised image name: `registry/repository` with a tag, a digest or both.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// Reads a name as people write it: the registry defaults to `docker.io`, there a single
    /// word means `library/…`, and a name with neither tag nor digest means the tag `latest`.
    ///
    /// # Errors
    /// [`ImageError::BadReference`] names the rule that is broken.
    pub fn parse(text: &str) -> Result<Reference, ImageError> {
        parse(text).map_err(|reason| ImageError::BadReference {
            reference: text.chars().take(300).collect(),
            reason: reason.to_string(),
        })
    }

    /// The registry's host, with its port if the name has one.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The repository within the registry.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The digest the name asks for.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// What to ask the registry for: the digest if there is one, else the tag.
    pub fn version(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => DEFAULT_TAG.to_string(),
        }
    }

    /// The form for `repo_tags`. A name with a digest has none: the digest decides what is
    /// pulled, and the tag may by now mean something else.
    pub fn repo_tag(&self) -> Option<String> {
        match (&self.digest, &self.tag) {
            (None, Some(tag)) => Some(format!("{}/{}:{tag}", self.registry, self.repository)),
            _ => None,
        }
    }

    /// The form for `repo_digests`, with the digest of the manifest or index the name led to.
    pub fn repo_digest(&self, manifest: &Digest) -> String {
        format!("{}/{}@{manifest}", self.registry, self.repository)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

/// True for `host`, `host:port` and `[v6 address]:port`.
pub(super) fn is_host(text: &str) -> bool {
    let (name, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, rest)) => {
            if address.parse::<std::net::Ipv6Addr>().is_err() {
                return false;
            }
            match rest.strip_prefix(':') {
                Some(port) => (None, Some(port)),
                None if rest.is_empty() => (None, None),
                None => return false,
            }
        }
        None => match text.split_once(':') {
            Some((name, port)) => (Some(name), Some(port)),
            None => (Some(text), None),
        },
    };
    port.is_none_or(|port| port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok())
        && name.is_none_or(|name| {
            name.split('.').all(|label| {
                !label.is_empty()
                    && !label.starts_with('-')
                    && !label.ends_with('-')
                    && label
                        .bytes()
                        .all(|b| b.is_ascii_alphanumeric() || b == b'-')
            })
        })
}

fn parse(text: &str) -> Result<Reference, &'static str> {
    if text.is_empty() {
        return Err("it is empty");
    }
    if text.len() > NAME_MAX + TAG_MAX + 80 {
        return Err("it is too long");
    }
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => {
            let digest = digest
                .parse()
                .map_err(|_| "the part after `@` is not a sha256 digest")?;
            (rest, Some(digest))
        }
        None => (text, None),
    };
    // A colon after the last slash starts the tag; before it, a port.
    let start = rest.rfind('/').map_or(0, |slash| slash + 1);
    let (name, tag) = match rest.get(start..).and_then(|last| last.find(':')) {
        Some(colon) => {
            let (name, tag) = rest.split_at(start + colon);
            (name, Some(tag.trim_start_matches(':')))
        }
        None => (rest, None),
    };
    if name.len() > NAME_MAX {
        return Err("the name is longer than 255 characters");
    }
    if tag.is_none() && digest.is_none() && Digest::from_hex(name).is_some() {
        return Err("64 hexadecimal digits are an image id, not a name");
    }
    let (registry, repository) = match name.split_once('/') {
        Some((host, path))
            if host.contains(['.', ':', '['])
                || host == "localhost"
                || host.bytes().any(|b| b.is_ascii_uppercase()) =>
        {
            (host, path.to_string())
        }
        _ => (DEFAULT_REGISTRY, name.to_string()),
    };
    let registry = if registry == "index.docker.io" {
        DEFAULT_REGISTRY
    } else {
        registry
    };
    if !is_host(registry) {
        return Err("the registry is not a host name with an optional port");
    }
    let repository = if registry == DEFAULT_REGISTRY && !repository.contains('/') {
        format!("library/{repository}")
    } else {
        repository
    };
    if !repository.split('/').all(is_component) {
        return Err(
            "the repository must be made of lower-case letters and digits, joined by \
                    `/`, `.`, `_`, `__` or `-`",
        );
    }
    if tag.is_some_and(|tag| !is_tag(tag)) {
        return Err(
            "the tag must be 1 to 128 letters, digits, `_`, `.` or `-`, and start with \
                    a letter, digit or `_`",
        );
    }
    let tag = match (tag, digest) {
        (Some(tag), _) => Some(tag.to_string()),
        (None, None) => Some(DEFAULT_TAG.to_string()),
        (None, Some(_)) => None,
    };
    Ok(Reference {
        registry: registry.to_string(),
        repository,
        tag,
        digest,
    })
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_component(component: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let mut separator = String::new();
    let mut bytes = component.bytes();
    if !bytes.next().is_some_and(alphanumeric)
        || !component.bytes().last().is_some_and(alphanumeric)
    {
        return false;
    }
    for byte in bytes {
        if !alphanumeric(byte) {
            separator.push(char::from(byte));
            continue;
        }
        let joins = matches!(separator.as_str(), "" | "." | "_" | "__")
            || separator.bytes().all(|b| b == b'-');
        if !joins {
            return false;
        }
        separator.clear();
    }
    true
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    tag.len() <= TAG_MAX
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn short_names_get_their_defaults() {
        for (short, full) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            (
                "index.docker.io/busybox",
                "docker.io/library/busybox:latest",
            ),
            ("some/image", "docker.io/some/image:latest"),
            ("localhost/a", "localhost/a:latest"),
            (
                "localhost:5000/a/b__c:V_1.0-x",
                "localhost:5000/a/b__c:V_1.0-x",
            ),
            ("registry.k8s.io/pause:3.10", "registry.k8s.io/pause:3.10"),
            ("[::1]:5000/a", "[::1]:5000/a:latest"),
        ] {
            assert_eq!(Reference::parse(short).unwrap().to_string(), full);
        }
    }

    #[test]
    fn a_name_with_a_digest_gives_no_tag() {
        let reference = Reference::parse(&format!("a.example/b:tag@{DIGEST}")).unwrap();
        assert_eq!(reference.version(), DIGEST);
        assert_eq!(reference.repo_tag(), None);
        assert_eq!(
            reference.repo_digest(reference.digest().unwrap()),
            format!("a.example/b@{DIGEST}")
        );
    }

    #[test]
    fn malformed_names_are_refused() {
        let long = "a".repeat(300);
        for name in [
            "",
            " ",
            ":",
            "@",
            "a@",
            "a:",
            "A",
            "a/B",
            "a//b",
            "a/../b",
            "../a",
            "/a",
            "a/",
            "a:-x",
            "a b",
            "a\nb",
            "a.example:x/b",
            "a.example:99999/b",
            "-a.example/b",
            "a@sha256:00",
            "a@sha512:00",
            "a___b",
            "a._b",
            "http://a.example/b",
            "[::1/a",
            "a:t:u",
            &long,
            &DIGEST[7..],
            &format!("a:{}", "t".repeat(129)),
        ] {
            assert!(Reference::parse(name).is_err(), "{name}");
        }
    }
}

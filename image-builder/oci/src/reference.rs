//! Names of images: `host[:port]/name[:tag][@digest]`. Short forms are made complete here, so that
//! everything behind this door and every message names the registry it means.

use std::{fmt, net::Ipv6Addr, str::FromStr};

use holdfast_model::Digest;

/// Registry of a name that begins with none.
pub const DEFAULT_REGISTRY: &str = "docker.io";
/// Folder of [`DEFAULT_REGISTRY`] for a name of one part.
pub const DEFAULT_FOLDER: &str = "library";
/// Tag of a name with neither tag nor digest.
pub const DEFAULT_TAG: &str = "latest";

/// Longest repository name in bytes, as the distribution specification has it.
const REPOSITORY_BYTES_MAX: usize = 255;
/// Longest tag in bytes, as the distribution specification has it.
const TAG_BYTES_MAX: usize = 128;
/// Longest host name in bytes (DNS), with room for a port.
const REGISTRY_BYTES_MAX: usize = 260;

/// A complete, checked image name. `Display` gives the complete form, which parses to the same.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a text is not an image name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("image reference {text:?}: {problem}")]
pub struct BadReference {
    text: String,
    problem: Problem,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum Problem {
    #[error("the registry must be a host name or address, with an optional port")]
    Registry,
    #[error(
        "the name must be parts of a-z and 0-9 separated by '/', each with single '.', '_', '__' \
         or any '-' only between letters, 255 bytes at most"
    )]
    Repository,
    #[error(
        "the tag must be 1 to 128 letters, digits, '_', '.' or '-', and not begin with '.' or '-'"
    )]
    Tag,
    #[error("what follows '@' must be sha256: and 64 hex digits")]
    Digest,
}

impl BadReference {
    pub fn hint(&self) -> &'static str {
        "write the image as host[:port]/name[:tag] or host[:port]/name@sha256:…"
    }
}

impl Reference {
    /// `host[:port]`, as it is written in the name.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// `None` only beside a digest.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// Where there is a digest, it alone decides which content is meant.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }
}

impl FromStr for Reference {
    type Err = BadReference;

    fn from_str(text: &str) -> Result<Self, BadReference> {
        let bad =
            |problem| BadReference { text: text.chars().take(100).collect::<String>(), problem };
        let (name, digest) = match text.split_once('@') {
            Some((name, digest)) => (name, Some(digest.parse().map_err(|_| bad(Problem::Digest))?)),
            None => (text, None),
        };
        let (registry, rest) = split_registry(name);
        if !registry.is_none_or(is_registry) {
            return Err(bad(Problem::Registry));
        }
        let (repository, tag) = match rest.rsplit_once(':') {
            Some((repository, tag)) => (repository, Some(tag)),
            None => (rest, None),
        };
        if !tag.is_none_or(is_tag) {
            return Err(bad(Problem::Tag));
        }
        let registry = registry.unwrap_or(DEFAULT_REGISTRY).to_ascii_lowercase();
        let repository = if registry == DEFAULT_REGISTRY && !repository.contains('/') {
            format!("{DEFAULT_FOLDER}/{repository}")
        } else {
            repository.to_owned()
        };
        if !is_repository(&repository) {
            return Err(bad(Problem::Repository));
        }
        let tag = match (tag, digest) {
            (Some(tag), _) => Some(tag.to_owned()),
            (None, Some(_)) => None,
            (None, None) => Some(DEFAULT_TAG.to_owned()),
        };
        Ok(Self { registry, repository, tag, digest })
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

/// The first part is a registry when it could not be a part of a repository's name, or is
/// `localhost`: the rule people know from other tools.
fn split_registry(name: &str) -> (Option<&str>, &str) {
    match name.split_once('/') {
        Some((first, rest))
            if first == "localhost"
                || first.contains(['.', ':'])
                || first.bytes().any(|b| b.is_ascii_uppercase()) =>
        {
            (Some(first), rest)
        }
        _ => (None, name),
    }
}

fn is_registry(text: &str) -> bool {
    if text.len() > REGISTRY_BYTES_MAX {
        return false;
    }
    let is_port = |port: &str| {
        port.bytes().all(|b| b.is_ascii_digit()) && port.parse().is_ok_and(|port: u16| port > 0)
    };
    if let Some(rest) = text.strip_prefix('[') {
        return rest.split_once(']').is_some_and(|(address, rest)| {
            address.parse::<Ipv6Addr>().is_ok()
                && (rest.is_empty() || rest.strip_prefix(':').is_some_and(is_port))
        });
    }
    let (host, port) = match text.split_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (text, None),
    };
    let is_label = |label: &str| {
        label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    host.split('.').all(is_label) && port.is_none_or(is_port)
}

fn is_repository(text: &str) -> bool {
    text.len() <= REPOSITORY_BYTES_MAX && text.split('/').all(is_component)
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`: never empty, never `..`, never a path of its own.
fn is_component(text: &str) -> bool {
    let is_letter = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    let ends_right = |b: Option<&u8>| b.is_some_and(|b| is_letter(*b));
    ends_right(bytes.first())
        && ends_right(bytes.last())
        && bytes.split(|b| is_letter(*b)).all(|separator| {
            matches!(separator, b"" | b"." | b"_" | b"__") || separator.iter().all(|b| *b == b'-')
        })
}

fn is_tag(text: &str) -> bool {
    (1..=TAG_BYTES_MAX).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
        && !text.starts_with(['.', '-'])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn short_names_are_made_complete() {
        let digest = format!("sha256:{}", "0".repeat(64));
        let cases = [
            ("debian", "docker.io/library/debian:latest"),
            ("debian:13", "docker.io/library/debian:13"),
            ("me/app", "docker.io/me/app:latest"),
            ("localhost/app:1", "localhost/app:1"),
            ("LOCALHOST:5000/app", "localhost:5000/app:latest"),
            ("[::1]:5000/a/b/c:x", "[::1]:5000/a/b/c:x"),
            ("ghcr.io/a-b/c__d.e", "ghcr.io/a-b/c__d.e:latest"),
            (&format!("r.io/a@{digest}"), &format!("r.io/a@{digest}")),
            (&format!("r.io/a:t@{digest}"), &format!("r.io/a:t@{digest}")),
        ];
        for (text, complete) in cases {
            assert_eq!(text.parse::<Reference>().unwrap().to_string(), complete, "{text}");
        }
    }

    #[test]
    fn names_that_climb_or_lie_are_refused() {
        let long = format!("r.io/{}", "a".repeat(256));
        let cases = [
            "",
            "/",
            "..",
            "../etc",
            "r.io/..",
            "r.io/a/../b",
            "r.io/a//b",
            "r.io/A",
            "r.io/a:",
            "r.io/a:.x",
            "r.io/a b",
            "r.io/a@sha256:00",
            "r.io/a@md5:00",
            "r.io:0/a",
            "r.io:x/a",
            "-r.io/a",
            "r..io/a",
            "u:p@r.io/a",
            "r.io/a.",
            "r.io/.a",
            "r.io/a..b",
            "r.io/a___b",
            "[::1/a",
            "http://r.io/a",
            "r.io/a?x=y",
            "r.io/ä",
            &long,
        ];
        for text in cases {
            assert!(text.parse::<Reference>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_error_names_the_text_and_says_what_is_allowed() {
        let error = "r.io/a/../b".parse::<Reference>().unwrap_err();
        assert!(
            error.to_string().starts_with(r#"image reference "r.io/a/../b": the name must be"#)
        );
        assert!(error.hint().contains("host[:port]/name"));
    }

    proptest! {
        #[test]
        fn any_text_is_a_reference_or_an_error(text in ".{0,80}") {
            let _ = text.parse::<Reference>();
        }

        #[test]
        fn what_parses_is_complete_safe_and_parses_to_itself(
            text in "([a-z.:0-9]{1,12}/)?[a-z0-9._/-]{1,20}(:[a-zA-Z0-9._-]{1,8})?",
        ) {
            if let Ok(reference) = text.parse::<Reference>() {
                prop_assert_eq!(&reference.to_string().parse::<Reference>().unwrap(), &reference);
                prop_assert!(!reference.repository().split('/').any(|part| matches!(part, "" | "." | "..")));
            }
        }
    }
}

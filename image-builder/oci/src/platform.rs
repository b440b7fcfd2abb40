//! Which of an index's images fits a machine.

use std::{fmt, str::FromStr};

use serde::Deserialize;

/// Longest part of a platform's name in bytes: known ones have at most 8.
const PART_BYTES_MAX: usize = 32;

/// `os/architecture[/variant]`, in the words of Go's GOOS and GOARCH as images use them.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Platform {
    pub os: String,
    pub architecture: String,
    pub variant: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a platform such as linux/amd64 or linux/arm64/v8")]
pub struct BadPlatform(String);

impl Platform {
    /// Is an image for `offered` meant by this wish? A wish without variant takes any.
    pub fn accepts(&self, offered: &Self) -> bool {
        self.os == offered.os
            && self.architecture == offered.architecture
            && (self.variant.is_none() || self.variant == offered.variant)
    }
}

impl FromStr for Platform {
    type Err = BadPlatform;

    fn from_str(s: &str) -> Result<Self, BadPlatform> {
        let is_part = |part: &str| {
            (1..=PART_BYTES_MAX).contains(&part.len())
                && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        };
        let parts: Vec<_> = s.split('/').collect();
        let own = |part: &str| part.to_owned();
        match parts.as_slice() {
            [os, architecture, variant @ ..]
                if variant.len() <= 1 && parts.iter().all(|part| is_part(part)) =>
            {
                Ok(Self {
                    os: own(os),
                    architecture: own(architecture),
                    variant: variant.first().map(|part| own(part)),
                })
            }
            _ => Err(BadPlatform(s.chars().take(100).collect())),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.iter().try_for_each(|variant| write!(f, "/{variant}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        text.parse().unwrap()
    }

    #[test]
    fn a_wish_without_variant_takes_any_and_one_with_takes_its_own() {
        let cases = [
            ("linux/amd64", "linux/amd64", true),
            ("linux/arm64", "linux/arm64/v8", true),
            ("linux/arm64/v8", "linux/arm64", false),
            ("linux/amd64", "windows/amd64", false),
            ("linux/amd64", "linux/arm64", false),
        ];
        for (wish, offered, fits) in cases {
            assert_eq!(platform(wish).accepts(&platform(offered)), fits, "{wish} {offered}");
        }
    }

    #[test]
    fn other_forms_are_refused() {
        for text in ["", "linux", "linux/", "/amd64", "a/b/c/d", "Linux/amd64", "linux/../x"] {
            assert!(text.parse::<Platform>().is_err(), "{text}");
        }
    }
}

//! Host names, and the patterns that rules name them by. A name is compared as A-labels, in lower
//! case and without the dot at its end.

use std::{borrow::Borrow, fmt, net::IpAddr};

use idna::uts46::{AsciiDenyList, DnsLength, Hyphens, Uts46};
use serde::{Serialize, Serializer};

use crate::limits::{HOST_BYTES_MAX, LABEL_BYTES_MAX};

/// A host's name in the one form it is compared in. Not an address.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostName(Box<str>);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadHost {
    #[error("{0:?} is not a host name")]
    Form(String),
    #[error("{0:?} is longer than {HOST_BYTES_MAX} bytes, or a part of it than {LABEL_BYTES_MAX}")]
    Long(String),
    #[error("{0:?} is an address and not a name")]
    Address(String),
    #[error(
        "{0:?} is no pattern: an exact name, \"*.\" before a name of two parts or more, or \"*\""
    )]
    Pattern(String),
    #[error("{0:?} has one part only: give the full name")]
    OneLabel(String),
}

fn shown(text: &str) -> String {
    text.chars().take(80).collect()
}

impl HostName {
    /// Reads a name as it came over the wire: in ASCII, as whoever resolves it would read it. A
    /// name in another script is no name there, and is not guessed at.
    pub fn of_wire(text: &str) -> Result<Self, BadHost> {
        let name = text.strip_suffix('.').unwrap_or(text);
        if name.len() > HOST_BYTES_MAX {
            return Err(BadHost::Long(shown(text)));
        }
        if is_address(name) {
            return Err(BadHost::Address(shown(text)));
        }
        for label in name.split('.') {
            if label.len() > LABEL_BYTES_MAX {
                return Err(BadHost::Long(shown(text)));
            }
            let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
            let fits = !label.is_empty() && label.bytes().all(allowed);
            if !fits || label.starts_with('-') || label.ends_with('-') {
                return Err(BadHost::Form(shown(text)));
            }
        }
        Ok(Self(name.to_ascii_lowercase().into()))
    }

    /// Reads a name that a person wrote, in whatever script (UTS 46, and names that it refuses are
    /// refused).
    pub fn of_person(text: &str) -> Result<Self, BadHost> {
        // Its processing takes time that grows with the text, and more than that.
        if text.len() > 4 * HOST_BYTES_MAX {
            return Err(BadHost::Long(shown(text)));
        }
        let ascii = Uts46::new()
            .to_ascii(text.as_bytes(), AsciiDenyList::URL, Hyphens::Allow, DnsLength::Ignore)
            .map_err(|_| BadHost::Form(shown(text)))?;
        Self::of_wire(&ascii)
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is one label: a name that is looked up in search lists or by broadcasts.
    pub(crate) fn is_one_label(&self) -> bool {
        !self.0.contains('.')
    }

    /// Names that end this one, from the whole of it to its last label.
    pub(crate) fn suffixes(&self) -> impl Iterator<Item = &str> {
        let mut rest = Some(self.as_str());
        std::iter::from_fn(move || {
            let this = rest?;
            rest = this.split_once('.').map(|(_, after)| after);
            Some(this)
        })
    }

    /// Whether no resolver of the outside has to know it: names of one label, of this machine, of
    /// the local network, and those of addresses.
    pub(crate) fn is_local(&self) -> bool {
        const LOCAL: [&str; 8] = [
            "localhost",
            "internal",
            "local",
            "home.arpa",
            "in-addr.arpa",
            "ip6.arpa",
            "onion",
            "invalid",
        ];
        self.is_one_label() || self.suffixes().any(|suffix| LOCAL.contains(&suffix))
    }
}

/// Whether some program would take it for an IPv4 address in one of its forms (`1.2.3.4`, `0x7f.1`,
/// `2130706433`), or for an IPv6 one.
fn is_address(name: &str) -> bool {
    let last = name.rsplit('.').next().unwrap_or_default();
    let hexadecimal = |digits: &str| digits.bytes().all(|b| b.is_ascii_hexdigit());
    let number = !last.is_empty() && last.bytes().all(|b| b.is_ascii_digit())
        || last.strip_prefix("0x").or(last.strip_prefix("0X")).is_some_and(hexadecimal);
    number || name.trim_matches(['[', ']']).parse::<IpAddr>().is_ok()
}

impl Borrow<str> for HostName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for HostName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

/// Which hosts a rule speaks of.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum HostPattern {
    /// `*`: every name.
    Any,
    /// `*.a.com`: every name below this one, however deep, and not this one itself.
    Below(HostName),
    Exact(HostName),
}

impl HostPattern {
    pub fn parse(text: &str) -> Result<Self, BadHost> {
        if text == "*" {
            return Ok(Self::Any);
        }
        let (below, name) = match text.strip_prefix("*.") {
            Some(name) => (true, name),
            None => (false, text),
        };
        if name.contains('*') || name.is_empty() {
            return Err(BadHost::Pattern(shown(text)));
        }
        let name = HostName::of_person(name)?;
        match (below, name.is_one_label()) {
            (true, true) => Err(BadHost::Pattern(shown(text))),
            (false, true) => Err(BadHost::OneLabel(shown(text))),
            (true, false) => Ok(Self::Below(name)),
            (false, false) => Ok(Self::Exact(name)),
        }
    }

    pub fn matches(&self, name: &HostName) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(exact) => exact == name,
            Self::Below(parent) => {
                let below = name.0.strip_suffix(parent.as_str());
                below.is_some_and(|labels| labels.ends_with('.'))
            }
        }
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Below(name) => write!(f, "*.{name}"),
            Self::Exact(name) => write!(f, "{name}"),
        }
    }
}

impl Serialize for HostPattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, name: &str) -> bool {
        let pattern = HostPattern::parse(pattern).unwrap();
        HostName::of_wire(name).is_ok_and(|name| pattern.matches(&name))
    }

    #[test]
    fn c23_a_wildcard_matches_names_below_and_nothing_that_looks_like_one() {
        let cases = [
            ("a.com", false),
            ("b.a.com", true),
            ("c.b.a.com", true),
            ("b.a.com.evil.com", false),
            ("xa.com", false),
            (".a.com", false),
            ("b..a.com", false),
            ("*.a.com", false),
        ];
        for (name, expected) in cases {
            assert_eq!(matches("*.a.com", name), expected, "{name}");
        }
    }

    #[test]
    fn c24_only_a_star_alone_or_before_a_name_of_two_parts_is_a_pattern() {
        assert_eq!(HostPattern::parse("*"), Ok(HostPattern::Any));
        for text in [
            "*.com",
            "a.*.com",
            "*a.com",
            "",
            "*.",
            "**",
            "*.*.com",
            "*.*",
            "a.com*",
            "com",
            "*.a.com:443",
            "a.com/x",
            "a b.com",
            ".a.com",
            "a..com",
            "-a.com",
            "a-.com",
            "*.1.2.3",
            "198.51.100.1",
            "[::1]",
            "0x7f.0x1",
            "2130706433",
            "user@a.com",
        ] {
            assert!(HostPattern::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn b16_case_and_the_dot_at_the_end_make_no_other_name() {
        for name in ["ALLOWED.TEST", "allowed.test.", "Allowed.Test."] {
            assert!(matches("allowed.test", name), "{name}");
        }
        assert!(matches("ALLOWED.TEST.", "allowed.test"));
        assert!(!matches("allowed.test", "allowed.test.."));
    }

    #[test]
    fn b17_names_are_compared_as_a_labels_and_a_look_alike_is_another_name() {
        assert!(matches("bücher.test", "xn--bcher-kva.test"));
        assert!(matches("XN--BCHER-KVA.test", "xn--bcher-kva.TEST"));
        assert!(matches("BÜCHER.test", "xn--bcher-kva.test"));
        assert!(matches("*.bücher.test", "a.xn--bcher-kva.test"));
        // The first letter is Cyrillic.
        assert!(!matches("allowed.test", "аllowed.test"));
        assert!(!matches("аllowed.test", "allowed.test"));
        // Full width letters are the same to UTS 46, and no name on the wire.
        assert!(matches("ａllowed.test", "allowed.test"));
        assert!(HostName::of_wire("ａllowed.test").is_err());
        assert!(HostPattern::parse("xn--a.test").is_err(), "no valid punycode");
    }

    #[test]
    fn c6_what_is_no_name_is_refused() {
        let long = format!("{}.test", "a".repeat(64));
        let longer = vec!["a".repeat(49); 6].join(".");
        for text in [
            "",
            ".",
            "a\0.test",
            "a b.test",
            "a.test\n",
            "*",
            "127.0.0.1",
            "1.1",
            "::1",
            "0x7f000001",
            "a.0x",
            &long,
            &longer,
        ] {
            assert!(HostName::of_wire(text).is_err(), "{text}");
        }
    }

    #[test]
    fn names_of_the_machine_and_its_network_are_local() {
        for name in
            ["localhost", "a.localhost", "db", "x.internal", "4.3.2.1.in-addr.arpa", "nas.local"]
        {
            assert!(HostName::of_wire(name).unwrap().is_local(), "{name}");
        }
        for name in ["localhost.test", "internal.com", "arpa.org"] {
            assert!(!HostName::of_wire(name).unwrap().is_local(), "{name}");
        }
    }
}

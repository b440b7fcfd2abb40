//! Paths of requests, and the patterns that rules name them by.
//!
//! A path is normalised once, and what was judged is what is sent on. What servers do not agree on
//! (`%2F`, `\`, `//`, `;`) is sent as it came; but a rule that denies matches when *any* reading of
//! such a path does, and a rule that lets through only when *every* reading does.

use std::fmt;

use serde::{Serialize, Serializer};

use crate::limits::{PATH_PATTERN_BYTES_MAX, PATH_STARS_MAX, TARGET_BYTES_MAX};

/// Times a path is decoded until nothing is left to decode. More is nobody's honest path.
const DECODINGS_MAX: usize = 4;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadPath {
    #[error("the path is longer than {0} bytes")]
    Long(usize),
    #[error("a path begins with '/'")]
    NotAbsolute,
    #[error("a '%' is not followed by two hexadecimal digits")]
    Percent,
    #[error("byte {0:#04x} cannot be in a path")]
    Byte(u8),
    #[error("the path has a NUL byte in it")]
    Nul,
    #[error("the path is encoded over and over")]
    Layers,
    #[error("has more than {PATH_STARS_MAX} '*'")]
    Stars,
    #[error("a pattern of paths has no '?' and no '#': queries are not looked at")]
    Query,
    #[error("is not in its shortest form, which is {0:?}")]
    NotNormal(String),
}

/// What a request asks of a host: path and query, normalised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    path: String,
    /// The loosest reading of the path, when it is another than the path itself.
    loose: Option<String>,
    query: Option<String>,
}

impl Target {
    /// Reads path and query as a request has them (origin form, `/a?b`).
    pub fn parse(text: &[u8]) -> Result<Self, BadPath> {
        if text.len() > TARGET_BYTES_MAX {
            return Err(BadPath::Long(TARGET_BYTES_MAX));
        }
        let end = text.iter().position(|b| *b == b'?').unwrap_or(text.len());
        let (path, rest) = text.split_at(end);
        let query = match rest.split_first() {
            Some((_, query)) => Some(encode_query(query)?),
            None => None,
        };
        let path = normal(path)?;
        let loose = loose(&path)?;
        Ok(Self { loose: (loose != path).then_some(loose), path, query })
    }

    /// The path alone: what is judged and what is on record.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// What is sent on.
    pub fn path_and_query(&self) -> String {
        match &self.query {
            Some(query) => format!("{}?{query}", self.path),
            None => self.path.clone(),
        }
    }

    /// The same query at another path.
    pub fn with_path(&self, path: &str) -> String {
        match &self.query {
            Some(query) => format!("{path}?{query}"),
            None => path.to_owned(),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path_and_query())
    }
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok())
}

/// The byte that `%xy` at the beginning of `text` stands for.
fn decoded(text: &[u8]) -> Option<u8> {
    match text {
        [b'%', high, low, ..] => Some(hex(*high)? << 4 | hex(*low)?),
        _ => None,
    }
}

fn push_encoded(out: &mut String, byte: u8) {
    use fmt::Write;
    // Writing to a String does not fail.
    let _ = write!(out, "%{byte:02X}");
}

fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')
}

/// Bytes of a path that are there as themselves (RFC 3986, pchar and `/`).
fn is_path_byte(byte: u8) -> bool {
    is_unreserved(byte) || b"!$&'()*+,;=:@/".contains(&byte)
}

fn encode_query(query: &[u8]) -> Result<String, BadPath> {
    let mut out = String::with_capacity(query.len());
    for &byte in query {
        match byte {
            0..=0x20 | 0x7f | b'#' => return Err(BadPath::Byte(byte)),
            0x21..=0x7e => out.push(char::from(byte)),
            _ => push_encoded(&mut out, byte),
        }
    }
    Ok(out)
}

/// The path with nothing encoded that need not be, everything else encoded in one way, and no dot
/// segments.
fn normal(text: &[u8]) -> Result<String, BadPath> {
    if text.first() != Some(&b'/') {
        return Err(BadPath::NotAbsolute);
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let [byte, after @ ..] = rest {
        rest = after;
        match byte {
            b'%' => {
                let mut whole = [b'%', 0, 0];
                let digits = after.first_chunk::<2>().ok_or(BadPath::Percent)?;
                whole[1..].copy_from_slice(digits);
                let value = decoded(&whole).ok_or(BadPath::Percent)?;
                rest = &after[2..];
                match value {
                    0 => return Err(BadPath::Nul),
                    value if is_unreserved(value) => out.push(char::from(value)),
                    value => push_encoded(&mut out, value),
                }
            }
            0 => return Err(BadPath::Nul),
            0x01..=0x20 | 0x7f | b'#' => return Err(BadPath::Byte(*byte)),
            byte if is_path_byte(*byte) => out.push(char::from(*byte)),
            byte => push_encoded(&mut out, *byte),
        }
    }
    Ok(without_dots(&out))
}

/// Without `.` and `..` segments (RFC 3986, 5.2.4): the root has no parent but itself.
fn without_dots(path: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    let mut ends_in_folder = false;
    for segment in path.split('/').skip(1) {
        ends_in_folder = matches!(segment, "." | "..");
        match segment {
            "." => {}
            ".." => {
                kept.pop();
            }
            segment => kept.push(segment),
        }
    }
    let mut out = String::with_capacity(path.len());
    for segment in &kept {
        out.push('/');
        out.push_str(segment);
    }
    if ends_in_folder || kept.is_empty() {
        out.push('/');
    }
    out
}

/// What the most generous server could take a path for: all of it decoded, `\` as `/`, parameters
/// of segments and empty segments left out.
fn loose(path: &str) -> Result<String, BadPath> {
    let plain = !path.contains(['%', ';']) && !path.contains("//");
    if plain {
        return Ok(path.to_owned());
    }
    let mut bytes = path.as_bytes().to_vec();
    for round in 0.. {
        let next = decode_once(&bytes);
        if next == bytes {
            break;
        }
        if round == DECODINGS_MAX {
            return Err(BadPath::Layers);
        }
        bytes = next;
    }
    if bytes.contains(&0) {
        return Err(BadPath::Nul);
    }
    let text = String::from_utf8_lossy(&bytes).replace('\\', "/");
    let mut out = String::with_capacity(text.len());
    for segment in text.split('/').skip(1) {
        let name = segment.split(';').next().unwrap_or_default();
        if !name.is_empty() {
            out.push('/');
            out.push_str(name);
        }
    }
    let last = text.rsplit('/').next().unwrap_or_default();
    if out.is_empty() || last.split(';').next().unwrap_or_default().is_empty() {
        out.push('/');
    }
    Ok(without_dots(&out))
}

fn decode_once(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some(first) = rest.first() {
        match decoded(rest) {
            Some(value) => {
                out.push(value);
                rest = &rest[3..];
            }
            None => {
                out.push(*first);
                rest = &rest[1..];
            }
        }
    }
    out
}

/// Which paths a rule speaks of: a path in which each `*` stands for any characters, `/` included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathPattern {
    text: String,
    /// For the loosest reading of a path.
    loose: String,
}

impl PathPattern {
    pub fn parse(text: &str) -> Result<Self, BadPath> {
        if text.len() > PATH_PATTERN_BYTES_MAX {
            return Err(BadPath::Long(PATH_PATTERN_BYTES_MAX));
        }
        if text.contains(['?', '#']) {
            return Err(BadPath::Query);
        }
        if text.bytes().filter(|b| *b == b'*').count() > PATH_STARS_MAX {
            return Err(BadPath::Stars);
        }
        // `*` alone is written for every path.
        let text = if text == "*" { "/*" } else { text };
        let normal = normal(text.as_bytes())?;
        let other_bytes = text.bytes().any(|b| !is_path_byte(b) && b != b'%');
        if normal != text && !other_bytes {
            return Err(BadPath::NotNormal(normal));
        }
        let loose = loose(&normal)?;
        Ok(Self { text: normal, loose })
    }

    /// Whether every path is one of these.
    pub fn is_any(&self) -> bool {
        self.text == "/*"
    }

    /// Whether every reading of the path is one of these.
    pub fn matches_surely(&self, target: &Target) -> bool {
        glob(&self.text, &target.path)
            && target.loose.as_deref().is_none_or(|path| glob(&self.loose, path))
    }

    /// Whether any reading of the path is one of these.
    pub fn matches_perhaps(&self, target: &Target) -> bool {
        glob(&self.text, &target.path)
            || target.loose.as_deref().is_some_and(|path| glob(&self.loose, path))
    }
}

impl fmt::Display for PathPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Serialize for PathPattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

/// Whether `text` is `pattern`. Each piece between stars is taken where it is found first, so no
/// text is gone over more often than there are stars.
fn glob(pattern: &str, text: &str) -> bool {
    let mut pieces = pattern.split('*');
    let first = pieces.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let Some(last) = pieces.next_back() else { return rest.is_empty() };
    for piece in pieces {
        match rest.find(piece) {
            Some(at) => rest = &rest[at + piece.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> Result<String, BadPath> {
        Target::parse(text.as_bytes()).map(|target| target.path_and_query())
    }

    #[test]
    fn a_path_is_sent_in_one_form_whichever_it_came_in() {
        let cases = [
            ("/", "/"),
            ("/a/b?c=%2f", "/a/b?c=%2f"),
            ("/%61%64min", "/admin"),
            ("/a%2fb", "/a%2Fb"),
            ("/a/./b/../c", "/a/c"),
            ("/a/%2e%2E/b", "/b"),
            ("/..", "/"),
            ("/../../etc/passwd", "/etc/passwd"),
            ("/a/..", "/"),
            ("/a/b/.", "/a/b/"),
            ("/a//b", "/a//b"),
            ("/a/b/..//c", "/a//c"),
            // Sent so that no two readings of it are left.
            ("/a//..//../b", "/a/b"),
            ("/\\admin", "/%5Cadmin"),
            ("/ä{}", "/%C3%A4%7B%7D"),
            ("/a?", "/a?"),
            ("/a?b?c", "/a?b?c"),
        ];
        for (text, expected) in cases {
            assert_eq!(path(text).as_deref(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_no_client_sends_in_earnest_is_refused() {
        let cases = [
            ("", BadPath::NotAbsolute),
            ("a", BadPath::NotAbsolute),
            ("*", BadPath::NotAbsolute),
            ("?/", BadPath::NotAbsolute),
            ("/%", BadPath::Percent),
            ("/%4", BadPath::Percent),
            ("/%4g", BadPath::Percent),
            ("/%+1", BadPath::Percent),
            ("/%00", BadPath::Nul),
            ("/%2500", BadPath::Nul),
            ("/a\0", BadPath::Nul),
            ("/a b", BadPath::Byte(b' ')),
            ("/a\r\nHost: b", BadPath::Byte(b'\r')),
            ("/a?b\n", BadPath::Byte(b'\n')),
            ("/a#b", BadPath::Byte(b'#')),
            ("/%25252525252541", BadPath::Layers),
        ];
        for (text, expected) in cases {
            assert_eq!(path(text), Err(expected), "{text:?}");
        }
        let long = format!("/{}", "a".repeat(TARGET_BYTES_MAX));
        assert_eq!(path(&long), Err(BadPath::Long(TARGET_BYTES_MAX)));
    }

    #[test]
    fn every_way_to_write_a_denied_path_is_denied_and_none_of_them_is_let_through_as_another() {
        let denied = PathPattern::parse("/admin*").unwrap();
        let public = PathPattern::parse("/pub/*").unwrap();
        for text in [
            "/admin",
            "/admin/x",
            "/%61dmin",
            "/x/../admin",
            "/pub/../admin",
            "/pub/%2e%2e/admin",
            "/pub/..%2fadmin",
            "/pub/%2e%2e%2fadmin",
            "/pub/..%5cadmin",
            "/pub/..\\admin",
            "//admin",
            "/;x/admin",
            "/.;/admin",
            "/pub/..;/admin",
            "/%2fadmin",
            "/%5cadmin",
            "/%252e/admin",
            "/pub/%252e%252e%252fadmin",
            "/%2561dmin",
        ] {
            let target = Target::parse(text.as_bytes()).unwrap();
            assert!(denied.matches_perhaps(&target), "{text}");
            assert!(!public.matches_surely(&target), "{text}");
        }
        for text in ["/pub/a", "/pub/a%2Fb", "/pub/a;v=1", "/pub//a", "/pub/"] {
            let target = Target::parse(text.as_bytes()).unwrap();
            assert!(!denied.matches_perhaps(&target), "{text}");
            assert!(public.matches_surely(&target), "{text}");
        }
    }

    #[test]
    fn a_pattern_may_name_an_encoded_slash() {
        let pattern = PathPattern::parse("/projects/a%2Fb/*").unwrap();
        let target = Target::parse(b"/projects/a%2fb/issues").unwrap();
        assert!(pattern.matches_surely(&target));
        assert!(!pattern.matches_surely(&Target::parse(b"/projects/a/b/issues").unwrap()));
    }

    #[test]
    fn a_star_stands_for_any_characters() {
        let cases = [
            ("/a", "/a", true),
            ("/a", "/a/", false),
            ("/a*", "/abc/d", true),
            ("/a/*", "/a", false),
            ("/*", "/", true),
            ("/*/b", "/a/c/b", true),
            ("/*/b", "/a/b/c", false),
            ("/a*b*c", "/axbxbxc", true),
            ("/a*a", "/a", false),
        ];
        for (pattern, text, expected) in cases {
            assert_eq!(glob(pattern, text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn a_pattern_that_could_never_match_is_refused() {
        for text in ["", "a", "/a/../b", "/%61", "/a?b", "/a#b", "/%", "/%2f", "/*********", "/a b"]
        {
            assert!(PathPattern::parse(text).is_err(), "{text}");
        }
        assert!(PathPattern::parse("*").unwrap().is_any());
        assert_eq!(PathPattern::parse("/ä").unwrap().to_string(), "/%C3%A4");
    }
}

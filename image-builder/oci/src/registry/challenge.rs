//! `WWW-Authenticate`: what a registry wants to see before it answers.

/// Most bytes of the header that are looked at; real ones have some hundred.
const HEADER_BYTES_MAX: usize = 8 * 1024;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    Basic,
    /// A token of the server at `realm`, for `service`.
    Bearer {
        realm: String,
        service: Option<String>,
    },
}

/// The first challenge of a header that can be met. Bearer is preferred: a registry that offers
/// both means Basic for its web pages.
pub(crate) fn parse<'a>(headers: impl IntoIterator<Item = &'a str>) -> Option<Challenge> {
    let mut basic = None;
    for header in headers {
        for (scheme, parameters) in split(header.get(..HEADER_BYTES_MAX).unwrap_or(header)) {
            let parameter = |name: &str| {
                let found = parameters.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
                found.map(|(_, value)| value.clone())
            };
            if scheme.eq_ignore_ascii_case("bearer") {
                if let Some(realm) = parameter("realm") {
                    return Some(Challenge::Bearer { realm, service: parameter("service") });
                }
            } else if scheme.eq_ignore_ascii_case("basic") {
                basic = Some(Challenge::Basic);
            }
        }
    }
    basic
}

type Parameters = Vec<(String, String)>;

/// Splits a header into schemes with their parameters. What is not of the form ends the reading.
fn split(header: &str) -> Vec<(String, Parameters)> {
    let mut challenges: Vec<(String, Parameters)> = Vec::new();
    let mut rest = header.trim_start();
    while !rest.is_empty() {
        let (word, after) = token(rest);
        if word.is_empty() {
            break;
        }
        match (after.trim_start().strip_prefix('='), challenges.last_mut()) {
            (Some(value), Some((_, parameters))) => {
                let Some((value, after)) = value_of(value.trim_start()) else { break };
                parameters.push((word.to_owned(), value));
                rest = after;
            }
            (Some(_), None) => break,
            (None, _) => {
                challenges.push((word.to_owned(), Vec::new()));
                rest = after;
            }
        }
        rest = rest.trim_start_matches([',', ' ', '\t']);
    }
    challenges
}

fn token(text: &str) -> (&str, &str) {
    let is_token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
    text.split_at(text.find(|c| !is_token(c)).unwrap_or(text.len()))
}

/// A token or a quoted string, and what follows it. `None`: a quote that never ends.
fn value_of(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let (value, after) = token(text);
        return Some((value.to_owned(), after));
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, &quoted[at + 1..])),
            '\\' => value.push(characters.next()?.1),
            other => value.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bearer(realm: &str, service: Option<&str>) -> Option<Challenge> {
        let service = service.map(str::to_owned);
        Some(Challenge::Bearer { realm: realm.to_owned(), service })
    }

    #[test]
    fn challenges_are_read_in_every_form_registries_send() {
        let docker = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull""#;
        let cases = [
            (docker, bearer("https://auth.docker.io/token", Some("registry.docker.io"))),
            (r#"bearer scope="x" , realm="https://a/b""#, bearer("https://a/b", None)),
            (r#"Bearer realm="a\"b\\c""#, bearer(r#"a"b\c"#, None)),
            (
                r#"Basic realm="x", Bearer realm="https://t",service=s"#,
                bearer("https://t", Some("s")),
            ),
            (r#"Basic realm="Registry Realm""#, Some(Challenge::Basic)),
            ("Basic", Some(Challenge::Basic)),
            ("Negotiate", None),
            (r#"Bearer service="no realm""#, None),
            (r#"Bearer realm="never ends"#, None),
            (r#"realm="x""#, None),
            ("", None),
        ];
        for (header, challenge) in cases {
            assert_eq!(parse([header]), challenge, "{header}");
        }
    }

    #[test]
    fn of_several_headers_the_bearer_one_is_met() {
        assert_eq!(parse(["Basic", r#"Bearer realm="https://t""#]), bearer("https://t", None));
    }

    proptest! {
        #[test]
        fn any_text_is_challenges_or_none(text in ".{0,200}") {
            let _ = parse([text.as_str()]);
        }

        #[test]
        fn text_of_the_right_letters_never_loops_or_panics(text in r#"[ a-z=",\\\t]{0,60}"#) {
            let _ = parse([text.as_str()]);
        }

        #[test]
        fn any_realm_survives_quoting(realm in "[ -~]{0,40}") {
            let quoted = realm.replace('\\', "\\\\").replace('"', "\\\"");
            let header = format!(r#"Bearer realm="{quoted}",service="s""#);
            prop_assert_eq!(parse([header.as_str()]), bearer(&realm, Some("s")));
        }
    }
}

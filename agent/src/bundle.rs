//! The node's part of a support bundle, and what keeps secrets out of it. Two lines of defence:
//! what holds secrets is not put in (environment values, tokens, label values, guests' output), and
//! whatever text is left has every secret that the node knows, and everything that looks like one,
//! struck out.

use std::{collections::BTreeSet, fmt::Write as _};

use holdfast_api::{
    egress,
    node::{BundledSandbox, Phase},
    sandbox::PublicState,
};
use holdfast_model::Secret;
use holdfast_netpolicy::Header;
use holdfast_store::SandboxRecord;

use crate::config::Config;

/// What stands where a secret was.
const STRUCK: &str = "(struck out)";

/// Shorter values are no secrets, and striking them out would leave no text whole.
const SECRET_BYTES_MIN: usize = 4;

/// Words before a word that is a credential.
const SCHEMES: [&str; 2] = ["bearer", "basic"];

/// The prefix of tokens that a node makes.
const TOKEN_PREFIX: &str = "hf_";

/// Finds secrets in text.
#[derive(Default)]
pub(crate) struct Censor {
    /// Longest first, so that one that is part of another leaves nothing of it.
    known: Vec<String>,
}

impl Censor {
    /// Knows the configured token, the ones in `kept`, and the values of the sandboxes'
    /// environment, arguments and headers.
    pub(crate) fn new(
        config: &Config,
        kept: impl IntoIterator<Item = Secret>,
        records: &[SandboxRecord],
    ) -> Self {
        let mut known = BTreeSet::new();
        known.extend(config.api.admin_token.as_ref().map(|token| token.reveal().to_owned()));
        known.extend(kept.into_iter().map(|secret| secret.reveal().to_owned()));
        for SandboxRecord { spec, .. } in records {
            // A log line has no line breaks: a value of several lines is looked for by each.
            known.extend(
                spec.environment.values().flat_map(|value| value.lines()).map(str::to_owned),
            );
            let policy = egress::of_record(spec.egress_json.as_deref());
            let changes = policy.rules().iter().flat_map(|rule| rule.action.headers());
            known.extend(changes.filter_map(|change| match change.header() {
                Some(Header::Value(value)) => Some(value.as_str().to_owned()),
                _ => None,
            }));
            let arguments = spec.entrypoint.iter().chain(&spec.cmd).flatten();
            let values = arguments.filter_map(|argument| argument.split_once('='));
            known.extend(values.map(|(_, value)| value.to_owned()));
        }
        let mut known: Vec<String> =
            known.into_iter().filter(|text| text.len() >= SECRET_BYTES_MIN).collect();
        known.sort_by_key(|text| std::cmp::Reverse(text.len()));
        Self { known }
    }

    /// The text without its secrets.
    pub(crate) fn clean(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for secret in &self.known {
            if text.contains(secret.as_str()) {
                text = text.replace(secret.as_str(), STRUCK);
            }
        }
        text.split_inclusive('\n').map(clean_line).collect()
    }
}

/// Strikes out what looks like a secret: tokens of nodes, credentials after their scheme, user
/// parts of addresses.
fn clean_line(line: &str) -> String {
    let mut cleaned = String::with_capacity(line.len());
    let mut after_scheme = false;
    for piece in line.split_inclusive([' ', '\n']) {
        let word = piece.trim_end_matches([' ', '\n']);
        let bare = word.trim_matches(|c: char| !c.is_ascii_alphanumeric()).to_ascii_lowercase();
        let cleaned_word = if after_scheme && !word.is_empty() {
            STRUCK.to_owned()
        } else {
            without_user(&without_token(word))
        };
        // Writing into a string does not fail.
        let _ = write!(cleaned, "{cleaned_word}{}", &piece[word.len()..]);
        after_scheme = SCHEMES.iter().any(|scheme| bare.ends_with(scheme));
    }
    cleaned
}

fn without_token(word: &str) -> String {
    let Some(at) = word.find(TOKEN_PREFIX) else { return word.to_owned() };
    let rest = &word[at + TOKEN_PREFIX.len()..];
    let length = rest.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(rest.len());
    format!("{}{STRUCK}{}", &word[..at], &rest[length..])
}

/// `https://user:password@host` loses what is before the `@`.
fn without_user(word: &str) -> String {
    let Some((scheme, rest)) = word.split_once("://") else { return word.to_owned() };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    match authority.rfind('@') {
        Some(at) => format!("{scheme}://{STRUCK}{}", &rest[at..]),
        None => word.to_owned(),
    }
}

/// The configuration in force. The token is not in what is written; that there is one is told.
pub(crate) fn config_text(config: &Config) -> String {
    let text = toml::to_string(config).unwrap_or_else(|error| format!("# {error}\n"));
    let token = if config.api.admin_token.is_some() { "set" } else { "not set" };
    format!("# api.admin_token is {token}\n{text}")
}

/// What a bundle tells of a sandbox.
pub(crate) fn sandbox(
    record: &SandboxRecord,
    phases: Vec<Phase>,
    censor: &Censor,
) -> BundledSandbox {
    BundledSandbox {
        id: record.id.to_string(),
        group: record.group.to_string(),
        state: PublicState::from(record.state).as_str().to_owned(),
        failure: record.failure.as_deref().map(|text| censor.clean(text)),
        image_digest: record.image.to_string(),
        created_at_ms: record.created_at_ms,
        label_names: record.spec.labels.keys().cloned().collect(),
        environment_names: record.spec.environment.keys().cloned().collect(),
        phases,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_secrets_and_what_looks_like_one_are_struck_out_and_the_rest_stays() {
        let censor = Censor { known: vec!["hunter22".to_owned(), "hunter".to_owned()] };
        let cases = [
            ("a=hunter22 b=xhunter!", "a=(struck out) b=x(struck out)!"),
            ("token hf_0123abc, then", "token (struck out), then"),
            ("key=hf_0123abc; on", "key=(struck out); on"),
            ("Authorization: Bearer abc.def x", "Authorization: Bearer (struck out) x"),
            ("from https://me:pw@host/path?a@b", "from https://(struck out)@host/path?a@b"),
            ("from https://host/a@b on", "from https://host/a@b on"),
            ("two\nlines stay\n", "two\nlines stay\n"),
        ];
        for (text, cleaned) in cases {
            assert_eq!(censor.clean(text), cleaned);
        }
    }

    #[test]
    fn the_configurations_text_says_that_there_is_a_token_and_not_which() {
        let mut config = Config::default();
        assert!(config_text(&config).starts_with("# api.admin_token is not set\n"));
        config.api.admin_token = Some(Secret::new("a-secret-of-16-bytes"));
        let text = config_text(&config);
        assert!(text.starts_with("# api.admin_token is set\n[api]\n"), "{text}");
        assert!(!text.contains("a-secret-of-16-bytes"), "{text}");
    }
}

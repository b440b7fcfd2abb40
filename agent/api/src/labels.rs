//! Labels: their limits, and the filter of list calls.

use std::collections::BTreeMap;

use crate::decode::BadBody;

/// Labels on one thing. They are for finding it, not for keeping data in.
pub const LABELS_MAX: usize = 64;
pub const LABEL_NAME_BYTES_MAX: usize = 128;
pub const LABEL_VALUE_BYTES_MAX: usize = 256;

pub type Labels = BTreeMap<String, String>;

/// Checks labels of a request body.
pub(crate) fn check(labels: &Labels) -> Result<(), BadBody> {
    if labels.len() > LABELS_MAX {
        return Err(BadBody::shape("labels", format!("more than {LABELS_MAX}")));
    }
    for (name, value) in labels {
        let field = || format!("labels.{}", name.chars().take(40).collect::<String>());
        // `=` and `,` are what the filter is cut at.
        let name_fits = (1..=LABEL_NAME_BYTES_MAX).contains(&name.len())
            && !name.contains(|c: char| c.is_control() || c == '=' || c == ',');
        if !name_fits {
            let reason = format!(
                "a name has 1 to {LABEL_NAME_BYTES_MAX} bytes without '=', ',' and control characters"
            );
            return Err(BadBody::shape(field(), reason));
        }
        if value.len() > LABEL_VALUE_BYTES_MAX || value.contains(char::is_control) {
            let reason = format!(
                "a value has at most {LABEL_VALUE_BYTES_MAX} bytes without control characters"
            );
            return Err(BadBody::shape(field(), reason));
        }
    }
    Ok(())
}

/// `k=v,k2=v2`: labels that must all be there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LabelFilter(Vec<(String, String)>);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("labels: {0:?} is not of the form name=value")]
pub struct BadFilter(String);

impl std::str::FromStr for LabelFilter {
    type Err = BadFilter;

    fn from_str(text: &str) -> Result<Self, BadFilter> {
        let bad = |part: &str| BadFilter(part.chars().take(80).collect());
        let parts = text.split(',').filter(|part| !part.is_empty());
        let pairs = parts.map(|part| match part.split_once('=') {
            Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
            _ => Err(bad(part)),
        });
        pairs.collect::<Result<_, _>>().map(Self)
    }
}

impl LabelFilter {
    pub fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|(name, value)| labels.get(name) == Some(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn every_label_of_a_filter_must_be_there() {
        let labels = labels(&[("app", "web"), ("tier", "a=b")]);
        let cases = [
            ("", true),
            ("app=web", true),
            ("app=web,tier=a=b", true),
            ("app=web,tier=x", false),
            ("other=", false),
        ];
        for (filter, expected) in cases {
            assert_eq!(
                filter.parse::<LabelFilter>().unwrap().matches(&labels),
                expected,
                "{filter}"
            );
        }
    }

    #[test]
    fn a_filter_without_name_or_value_is_refused() {
        for text in ["app", "=web", "app=web,tier"] {
            assert!(text.parse::<LabelFilter>().is_err(), "{text}");
        }
    }

    #[test]
    fn labels_over_a_limit_are_refused_by_name() {
        let long = "x".repeat(LABEL_VALUE_BYTES_MAX + 1);
        for pair in [("a=b", "1"), ("a,b", "1"), ("", "1"), ("app", &*long), ("app", "a\nb")] {
            let error = check(&labels(&[pair])).unwrap_err().to_string();
            assert!(error.starts_with(&format!("labels.{}: ", pair.0)), "{error}");
        }
        let many = (0..=LABELS_MAX).map(|n| (n.to_string(), String::new())).collect();
        assert!(check(&many).is_err());
    }
}

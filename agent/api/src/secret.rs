//! Secrets of a group: values that the rules of egress policies put into headers.

use std::collections::BTreeMap;

use holdfast_model::Secret;
use holdfast_netpolicy::{check_secret_id, check_secret_key};
use serde::{Deserialize, Serialize};

use crate::decode::BadBody;

/// Secrets of one group.
pub const SECRETS_MAX: usize = 1000;
/// Values of one secret.
pub const SECRET_VALUES_MAX: usize = 64;
/// Bytes of all values of one secret.
pub const SECRET_BYTES_MAX: usize = 64 * 1024;

/// Body of `PUT …/secrets/{id}`. It replaces all values of the secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PutSecret {
    pub values: BTreeMap<String, Secret>,
}

impl PutSecret {
    /// Checks the id of the path and the values.
    pub fn checked(self, id: &str) -> Result<BTreeMap<String, Secret>, BadBody> {
        check_secret_id(id).map_err(|reason| BadBody::shape("the secret's id", reason))?;
        let count = self.values.len();
        if !(1..=SECRET_VALUES_MAX).contains(&count) {
            let reason = format!("has {count} entries; there must be 1 to {SECRET_VALUES_MAX}");
            return Err(BadBody::shape("values", reason));
        }
        let mut bytes = 0;
        for (key, value) in &self.values {
            let shown: String = key.chars().take(40).collect();
            let field = format!("values.{shown}");
            check_secret_key(key).map_err(|reason| BadBody::shape(&*field, reason))?;
            // It will be part of a header, which these would end.
            if value.reveal().contains(['\r', '\n', '\0']) {
                return Err(BadBody::shape(field, "a value has no line break and no NUL"));
            }
            bytes += value.reveal().len();
        }
        if bytes > SECRET_BYTES_MAX {
            return Err(BadBody::shape("values", format!("longer than {SECRET_BYTES_MAX} bytes")));
        }
        Ok(self.values)
    }
}

/// One secret without its values.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SecretInfo {
    pub id: String,
    pub keys: Vec<String>,
    /// RFC 3339.
    pub created_at: String,
    /// RFC 3339.
    pub updated_at: String,
}

/// Answer of `GET …/secrets`: an object, where other lists may be bare.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Secrets {
    pub secrets: Vec<SecretInfo>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_link: Option<String>,
}

/// Answer of `GET …/secrets/{id}/keys`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretKeys {
    pub keys: Vec<String>,
}

/// Answer of `POST …/secrets/{id}/peek`, the one call that gives values back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretValues {
    pub id: String,
    pub values: BTreeMap<String, Secret>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::decode;

    fn checked(id: &str, body: &str) -> Result<BTreeMap<String, Secret>, BadBody> {
        decode::<PutSecret>(body.as_bytes()).and_then(|put| put.checked(id))
    }

    #[test]
    fn e7_a_value_that_would_end_a_header_is_refused() {
        for value in [r"a\r\nb", r"a\nb", r"\u0000"] {
            let body = format!(r#"{{"values":{{"k":"{value}"}}}}"#);
            let error = checked("s", &body).unwrap_err().to_string();
            assert!(error.starts_with("values.k: a value has no line break"), "{error}");
        }
    }

    #[test]
    fn what_is_over_a_limit_or_no_name_is_refused() {
        let many: Vec<_> = (0..65).map(|n| format!(r#""k{n}":"v""#)).collect();
        let long = "v".repeat(SECRET_BYTES_MAX + 1);
        let cases = [
            ("s", r#"{"values":{}}"#.to_owned(), "values: has 0 entries"),
            ("s", format!(r#"{{"values":{{{}}}}}"#, many.join(",")), "values: has 65 entries"),
            ("s", format!(r#"{{"values":{{"k":"{long}"}}}}"#), "values: longer"),
            ("s", r#"{"values":{"":"v"}}"#.to_owned(), "values.: "),
            ("s", r#"{"values":{"a b":"v"}}"#.to_owned(), "values.a b: "),
            ("..", r#"{"values":{"k":"v"}}"#.to_owned(), "the secret's id: "),
            ("s", r#"{"values":{"k":5}}"#.to_owned(), "values.k: "),
        ];
        for (id, body, start) in cases {
            let error = checked(id, &body).unwrap_err().to_string();
            assert!(error.starts_with(start), "{error}");
        }
        assert_eq!(checked("s", r#"{"values":{"k":"v"}}"#).unwrap()["k"], Secret::new("v"));
    }
}

//! Sandbox groups on the ARM paths.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{decode::BadBody, labels};

/// Longest location, in bytes. It has no meaning here and is returned as it came.
const LOCATION_BYTES_MAX: usize = 90;

/// Body of `PUT A/{name}`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PutGroup {
    pub location: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tags: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub properties: Option<Map<String, Value>>,
    /// Not carried out yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<Value>,
}

impl PutGroup {
    /// What the types do not say. No property is carried out yet, so none may be given;
    /// `provisioningState` is the node's to say and is let through because clients send back what
    /// they read.
    pub fn check(&self) -> Result<(), BadBody> {
        if self.identity.is_some() {
            return Err(BadBody::NotYet { field: "identity" });
        }
        if self.location.len() > LOCATION_BYTES_MAX || self.location.contains(char::is_control) {
            let reason =
                format!("has at most {LOCATION_BYTES_MAX} bytes and no control characters");
            return Err(BadBody::shape("location", reason));
        }
        let properties = self.properties.iter().flatten();
        if let Some((name, _)) = properties.into_iter().find(|(name, _)| *name != STATE) {
            let name: String = name.chars().take(40).collect();
            let reason = "is not carried out by this node yet: leave it out";
            return Err(BadBody::shape(format!("properties.{name}"), reason));
        }
        labels::check(self.tags.as_ref().unwrap_or(&BTreeMap::new()))
    }
}

const STATE: &str = "provisioningState";

/// One group as ARM has it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Group {
    pub id: String,
    pub name: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub location: String,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
    #[serde(default)]
    pub properties: Map<String, Value>,
}

impl Group {
    pub const KIND: &str = "Microsoft.App/sandboxGroups";

    /// Properties of a group that is made: making one is done when the call is answered.
    pub fn made() -> Map<String, Value> {
        [(STATE.to_owned(), Value::from("Succeeded"))].into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::decode;

    #[test]
    fn a_group_that_was_read_can_be_sent_back() {
        let text = r#"{"location":"local","tags":{"a":"b"},"properties":{"provisioningState":"Succeeded"}}"#;
        assert_eq!(decode::<PutGroup>(text.as_bytes()).unwrap().check(), Ok(()));
    }

    #[test]
    fn what_would_be_dropped_is_refused_by_name() {
        for (text, start) in [
            (r#"{"location":"x","identity":{"type":"SystemAssigned"}}"#, "identity "),
            (r#"{"location":"x","properties":{"size":1}}"#, "properties.size: "),
        ] {
            let error = decode::<PutGroup>(text.as_bytes()).unwrap().check().unwrap_err();
            assert!(error.to_string().starts_with(start), "{error}");
        }
    }

    #[test]
    fn the_answer_says_that_the_group_is_made() {
        assert_eq!(Value::from(Group::made()).to_string(), r#"{"provisioningState":"Succeeded"}"#);
    }
}

//! Sandbox groups: the management boundary.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Longest part of a group's key, in bytes.
const PART_BYTES_MAX: usize = 90;

/// Which group: subscription, resource group, name. Only `local/default` has a meaning of its own;
/// other subscriptions and resource groups are part of the key and nothing else.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct GroupKey {
    subscription: String,
    resource_group: String,
    name: String,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{part} {text:?} must be 1 to 90 letters, digits, '-', '_' or '.', and not begin with '.'")]
pub struct BadGroup {
    part: &'static str,
    text: String,
}

impl GroupKey {
    pub fn new(subscription: &str, resource_group: &str, name: &str) -> Result<Self, BadGroup> {
        let check = |part: &'static str, text: &str| {
            let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
            let fits = (1..=PART_BYTES_MAX).contains(&text.len())
                && text.bytes().all(allowed)
                && !text.starts_with('.');
            if fits {
                Ok(text.to_owned())
            } else {
                Err(BadGroup { part, text: text.chars().take(100).collect() })
            }
        };
        Ok(Self {
            subscription: check("subscription", subscription)?,
            resource_group: check("resource group", resource_group)?,
            name: check("sandbox group", name)?,
        })
    }

    /// The group that exists from first boot.
    pub fn local_default() -> Self {
        let own = str::to_owned;
        Self { subscription: own("local"), resource_group: own("default"), name: own("default") }
    }

    pub fn subscription(&self) -> &str {
        &self.subscription
    }

    pub fn resource_group(&self) -> &str {
        &self.resource_group
    }

    pub fn name(&self) -> &str {
        &self.name
    }
}

/// `subscription/resource group/name`: the key in the store.
impl fmt::Display for GroupKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.subscription, self.resource_group, self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_cannot_hold_the_separator_or_climb() {
        for text in ["", "..", "a/b", "a b", "ä", &"x".repeat(91)] {
            assert!(GroupKey::new("local", "default", text).is_err(), "{text}");
        }
        assert_eq!(GroupKey::new("local", "default", "default"), Ok(GroupKey::local_default()));
    }
}

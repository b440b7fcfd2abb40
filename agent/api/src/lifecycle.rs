//! Lifecycle policy of a sandbox: when it is suspended and deleted by itself.

pub use holdfast_model::SuspendMode;
use serde::{Deserialize, Serialize};

use crate::decode::BadBody;

/// Longest time a policy may wait, in seconds: a year. Longer ones are typing mistakes.
const INTERVAL_SECONDS_MAX: u64 = 365 * 24 * 60 * 60;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Lifecycle {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auto_suspend_policy: Option<AutoSuspend>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auto_delete_policy: Option<AutoDelete>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AutoSuspend {
    pub enabled: bool,
    /// Seconds without use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<SuspendMode>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AutoDelete {
    pub enabled: bool,
    /// Seconds after it stopped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delete_interval_in_seconds: Option<u64>,
}

impl Lifecycle {
    /// Checks what a client sent, and gives it as the text that a record keeps.
    pub fn checked_json(&self) -> Result<String, BadBody> {
        self.check()?;
        serde_json::to_string(self).map_err(|error| BadBody::shape("lifecycle", error.to_string()))
    }

    /// What a record kept. It was written by us.
    pub fn of_record(json: Option<&str>) -> Self {
        json.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
    }

    /// With each policy that `change` has in place of the one there was.
    pub fn changed(self, change: Self) -> Self {
        Self {
            auto_suspend_policy: change.auto_suspend_policy.or(self.auto_suspend_policy),
            auto_delete_policy: change.auto_delete_policy.or(self.auto_delete_policy),
        }
    }

    /// What the types do not say: that a time is one that can be waited for.
    pub(crate) fn check(&self) -> Result<(), BadBody> {
        let suspend = self.auto_suspend_policy.as_ref().and_then(|policy| policy.interval);
        let delete = self.auto_delete_policy.as_ref();
        let delete = delete.and_then(|policy| policy.delete_interval_in_seconds);
        let times = [
            ("lifecycle.autoSuspendPolicy.interval", suspend),
            ("lifecycle.autoDeletePolicy.deleteIntervalInSeconds", delete),
        ];
        for (field, seconds) in times {
            if seconds.is_some_and(|seconds| !(1..=INTERVAL_SECONDS_MAX).contains(&seconds)) {
                let reason = format!("must be 1 to {INTERVAL_SECONDS_MAX} seconds");
                return Err(BadBody::shape(field, reason));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn suspend(interval: u64) -> AutoSuspend {
        AutoSuspend { enabled: true, interval: Some(interval), mode: Some(SuspendMode::Disk) }
    }

    fn delete(seconds: u64) -> AutoDelete {
        AutoDelete { enabled: true, delete_interval_in_seconds: Some(seconds) }
    }

    #[test]
    fn a_change_replaces_the_policies_it_has_whole_and_leaves_the_others() {
        let policies = |auto_suspend_policy, auto_delete_policy| Lifecycle {
            auto_suspend_policy,
            auto_delete_policy,
        };
        let before = policies(Some(suspend(1)), Some(delete(2)));
        let off = AutoSuspend { enabled: false, interval: None, mode: None };
        let cases = [
            (policies(None, None), before.clone()),
            (policies(Some(suspend(7)), None), policies(Some(suspend(7)), Some(delete(2)))),
            (policies(None, Some(delete(9))), policies(Some(suspend(1)), Some(delete(9)))),
            // Nothing of the one before is left in it.
            (policies(Some(off.clone()), None), policies(Some(off), Some(delete(2)))),
        ];
        for (change, expected) in cases {
            assert_eq!(before.clone().changed(change.clone()), expected, "{change:?}");
        }
        let first = policies(Some(suspend(1)), None);
        assert_eq!(Lifecycle::default().changed(first.clone()), first);
    }

    #[test]
    fn a_policy_is_kept_as_text_that_reads_back_and_impossible_times_are_refused() {
        let policy = Lifecycle { auto_suspend_policy: Some(suspend(7)), auto_delete_policy: None };
        let text = policy.checked_json().unwrap();
        assert_eq!(Lifecycle::of_record(Some(&text)), policy);
        assert_eq!(Lifecycle::of_record(None), Lifecycle::default());
        for interval in [0, INTERVAL_SECONDS_MAX + 1] {
            let policy = Lifecycle {
                auto_suspend_policy: Some(suspend(interval)),
                auto_delete_policy: None,
            };
            let error = policy.checked_json().unwrap_err().to_string();
            assert!(error.contains("autoSuspendPolicy.interval"), "{error}");
        }
    }
}

//! Lifecycle policy of a sandbox: checked, kept and returned. It is acted on when suspend is built.

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

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SuspendMode {
    Memory,
    Disk,
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

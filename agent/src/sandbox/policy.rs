//! What a sandbox's lifecycle policy has the node do by itself.

use std::time::Duration;

use holdfast_api::lifecycle::{Lifecycle, SuspendMode};
use holdfast_model::{SandboxSpec, StopReason};
use holdfast_store::Saved;

/// Without one of its own: what the wire contract's client sends.
const IDLE_DEFAULT: Duration = Duration::from_secs(300);

fn lifecycle(spec: &SandboxSpec) -> Lifecycle {
    Lifecycle::of_record(spec.lifecycle_json.as_deref())
}

/// After how long without use it is suspended. `None`: never.
pub(super) fn idle_after(spec: &SandboxSpec) -> Option<Duration> {
    let policy = lifecycle(spec).auto_suspend_policy.filter(|policy| policy.enabled)?;
    Some(policy.interval.map_or(IDLE_DEFAULT, Duration::from_secs))
}

/// What a suspend keeps that names no mode itself. A policy says it even where it is not enabled.
pub(super) fn suspend_mode(spec: &SandboxSpec) -> SuspendMode {
    let policy = lifecycle(spec).auto_suspend_policy;
    policy.and_then(|policy| policy.mode).unwrap_or_default()
}

/// When a suspended sandbox is deleted, in milliseconds since 1970. `None`: never.
pub(super) fn delete_at_ms(spec: &SandboxSpec, saved: &Saved) -> Option<u64> {
    // It ran until the node stopped, and goes on by itself.
    if saved.reason == StopReason::NodeStopped {
        return None;
    }
    let policy = lifecycle(spec).auto_delete_policy.filter(|policy| policy.enabled)?;
    let seconds = policy.delete_interval_in_seconds?;
    Some(saved.at_ms.saturating_add(seconds.saturating_mul(1000)))
}

#[cfg(test)]
mod tests {
    use holdfast_model::{Resources, id::ID_BYTES, sandbox::ImageSource};

    use super::*;

    fn spec(lifecycle: Option<&str>) -> SandboxSpec {
        SandboxSpec {
            image: ImageSource::Public("debian".to_owned()),
            resources: Resources::DEFAULT,
            labels: Default::default(),
            environment: Default::default(),
            entrypoint: None,
            cmd: None,
            lifecycle_json: lifecycle.map(str::to_owned),
            egress_json: None,
            skip_egress_proxy: false,
        }
    }

    #[test]
    fn a_sandbox_is_suspended_when_its_policy_says_so_and_never_without_one() {
        let after = |policy: &str| {
            let text = format!(r#"{{"autoSuspendPolicy":{policy}}}"#);
            idle_after(&spec(Some(&text))).map(|after| after.as_secs())
        };
        assert_eq!(after(r#"{"enabled":true,"interval":7,"mode":"Memory"}"#), Some(7));
        assert_eq!(after(r#"{"enabled":true}"#), Some(300));
        assert_eq!(after(r#"{"enabled":false,"interval":7}"#), None);
        assert_eq!(after(r#"{"enabled":true,"interval":7,"mode":"Disk"}"#), Some(7));
        assert_eq!(idle_after(&spec(None)), None);
    }

    #[test]
    fn what_is_kept_is_what_the_policy_says_and_memory_where_it_says_nothing() {
        let mode = |policy: &str| suspend_mode(&spec(Some(policy)));
        let disk = r#"{"autoSuspendPolicy":{"enabled":true,"mode":"Disk"}}"#;
        assert_eq!(mode(disk), SuspendMode::Disk);
        assert_eq!(mode(&disk.replace("true", "false")), SuspendMode::Disk);
        assert_eq!(mode(&disk.replace("Disk", "Memory")), SuspendMode::Memory);
        assert_eq!(mode(r#"{"autoSuspendPolicy":{"enabled":true}}"#), SuspendMode::Memory);
        assert_eq!(suspend_mode(&spec(None)), SuspendMode::Memory);
    }

    #[test]
    fn the_time_to_a_deletion_counts_from_the_suspend() {
        let snapshot = holdfast_model::SnapshotId::from_random([1; ID_BYTES]);
        let (reason, mode) = (StopReason::Idle, SuspendMode::Memory);
        let saved =
            Saved { snapshot, at_ms: 1_000, reason, of_another: false, mode, network: None };
        let text = r#"{"autoDeletePolicy":{"enabled":true,"deleteIntervalInSeconds":60}}"#;
        assert_eq!(delete_at_ms(&spec(Some(text)), &saved), Some(61_000));
        let off = r#"{"autoDeletePolicy":{"enabled":false,"deleteIntervalInSeconds":60}}"#;
        assert_eq!(delete_at_ms(&spec(Some(off)), &saved), None);
        assert_eq!(delete_at_ms(&spec(None), &saved), None);
        // The node may be away for longer.
        let saved = Saved { reason: StopReason::NodeStopped, ..saved };
        assert_eq!(delete_at_ms(&spec(Some(text)), &saved), None);
    }
}

//! Egress: the policy of a sandbox, what was decided under it, and what would be.
//!
//! The policy itself is read and written by the crate `netpolicy`, whose form is that of the wire.

use holdfast_netpolicy::{Identity, Passing, Policy, ValueRef};
use serde::{Deserialize, Serialize};

use crate::decode::BadBody;

/// What a policy is made of, for clients that may use this crate alone.
pub use holdfast_netpolicy as policy;

/// The policy that a record keeps. Without one nothing leaves; nor does it where what is kept cannot
/// be read.
pub fn of_record(json: Option<&str>) -> Policy {
    let read = |json: &str| Policy::parse(json.as_bytes()).ok();
    json.and_then(read).unwrap_or_default()
}

/// A policy as its record keeps it. Groups have their own identity and no other yet: a rule that
/// names one would be kept and never carried out.
pub fn checked_json(policy: &Policy) -> Result<String, BadBody> {
    let assigned = |reference: &ValueRef| match reference {
        ValueRef::ManagedIdentityRef(of) => of.identity != Identity::SystemAssigned,
        ValueRef::SecretRef(_) => false,
    };
    if policy.value_refs().any(assigned) {
        return Err(BadBody::NotYet { field: "managedIdentityRef.identityResourceId" });
    }
    Ok(policy.to_json())
}

/// Refuses a policy of which nobody would look at some part: names are the proxy's affair, and the
/// flows of a sandbox that skips it are judged by their addresses.
pub fn check_without_proxy(policy: &Policy) -> Result<(), BadBody> {
    let reason = "nobody looks at it where skipEgressProxy is true: leave it out";
    match Passing::All.ignores(policy) {
        Some(field) => Err(BadBody::shape(format!("egressPolicy.{field}"), reason)),
        None => Ok(()),
    }
}

/// Answer of `GET …/sandboxes/{id}/egress-decisions`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EgressDecisions {
    pub network_egress: NetworkEgress,
    /// RFC 3339. When the last of them was made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_updated: Option<String>,
    /// Number of the last one.
    pub last_sequence: u64,
    /// How many were made and are not kept any more.
    pub dropped: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetworkEgress {
    pub allowed: Vec<Decision>,
    pub denied: Vec<Decision>,
}

/// One decision. The first five fields are the contract's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Decision {
    /// RFC 3339.
    pub timestamp: String,
    /// A name, or an address where there was no name.
    pub host: String,
    /// Of a request its method, of a DNS query its record type; else empty.
    pub method: String,
    /// Without the query.
    pub path: String,
    /// `dns`, `tls`, `http`, `https`, `tcp` or `udp`.
    pub scheme: String,
    pub sequence: u64,
    /// `rules[3] "name"`, `hostRules[0]`, `cidrRules[1]` or `default`.
    pub rule: String,
    /// Why, for machines.
    pub reason: String,
    /// What was dialled, if anything was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    /// How often the policy had been given that it was made under.
    pub generation: u64,
}

/// Answer of `GET /v1/…/sandboxes/{id}/egress-explain?url=&method=`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// What comes of it: `allow`, `deny`, `transform` or `rewrite`.
    pub verdict: String,
    /// How often the policy had been given.
    pub generation: u64,
    /// Up to the one that denies, or all of them.
    pub steps: Vec<ExplainedStep>,
}

/// One thing that is judged on the way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExplainedStep {
    /// `dns`, `tls`, `http`, `tcp`, `udp`, or `address`: what no policy opens.
    pub of: String,
    /// What is judged, as it is judged.
    pub what: String,
    /// `allow`, `deny`, `open` (TLS), `transform` or `rewrite`.
    pub outcome: String,
    pub rule: String,
    pub reason: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_policy_that_can_be_read_nothing_leaves() {
        for json in [None, Some(""), Some("{}"), Some(r#"{"defaultAction":"allow"}"#)] {
            assert_eq!(of_record(json), Policy::default(), "{json:?}");
        }
        let open = of_record(Some(r#"{"defaultAction":"Allow"}"#));
        assert_eq!(open.to_json(), r#"{"defaultAction":"Allow"}"#);
    }

    #[test]
    fn decisions_have_the_form_the_sdk_reads() {
        let decision = Decision {
            timestamp: "2026-01-02T03:04:05Z".to_owned(),
            host: "a.test".to_owned(),
            method: "GET".to_owned(),
            path: "/x".to_owned(),
            scheme: "https".to_owned(),
            sequence: 7,
            rule: "default".to_owned(),
            reason: "default_action".to_owned(),
            ..Decision::default()
        };
        let answer = EgressDecisions {
            network_egress: NetworkEgress { allowed: Vec::new(), denied: vec![decision] },
            last_updated: Some("2026-01-02T03:04:05Z".to_owned()),
            last_sequence: 7,
            dropped: 0,
        };
        let golden = concat!(
            r#"{"networkEgress":{"allowed":[],"denied":[{"timestamp":"2026-01-02T03:04:05Z","#,
            r#""host":"a.test","method":"GET","path":"/x","scheme":"https","sequence":7,"#,
            r#""rule":"default","reason":"default_action","bytesSent":0,"bytesReceived":0,"#,
            r#""generation":0}]},"lastUpdated":"2026-01-02T03:04:05Z","lastSequence":7,"dropped":0}"#
        );
        assert_eq!(serde_json::to_string(&answer).unwrap(), golden);
        assert_eq!(serde_json::from_str::<EgressDecisions>(golden).unwrap(), answer);
    }
}

//! `…/sandboxes/{id}/egresspolicy` and `…/egress-decisions`, and what is ours beside them.

use std::sync::Arc;

use axum::{body::Body, extract::State, response::Response};
use holdfast_api::egress::{
    Decision, EgressDecisions, ExplainedStep, Explanation, NetworkEgress, check_without_proxy,
    checked_json, of_record,
};
use holdfast_netpolicy::{DenySet, Passing, Policy, Step, explain};
use holdfast_store::DecisionRecord;

use super::{
    App,
    answer::{json, rfc3339},
    body,
    problem::Problem,
    request::{OfSandbox, Query},
};

type Answer = Result<Response, Problem>;

/// The policy that is given replaces the one there was, whole or not at all.
pub(super) async fn set_policy(
    State(app): State<Arc<App>>,
    OfSandbox(record): OfSandbox,
    body: Body,
) -> Answer {
    let bytes = body::json_bytes(body).await?;
    let policy = Policy::parse(&bytes)?;
    if record.spec.skip_egress_proxy {
        check_without_proxy(&policy)?;
    }
    app.registry.change_egress(&record.id, checked_json(&policy)?).await?;
    Ok(json(200, &policy))
}

pub(super) async fn decisions(
    State(app): State<Arc<App>>,
    OfSandbox(record): OfSandbox,
    query: Query,
) -> Answer {
    let after = match query.get("after") {
        None => 0,
        Some(text) => text.parse().map_err(|_| {
            Problem::invalid("the query parameter after must be the number of a decision")
        })?,
    };
    let report = app.registry.decisions().report(&record.id, after);
    let last = |list: &[DecisionRecord]| list.last().map(|decision| decision.at_ms);
    let last_ms = last(&report.allowed).max(last(&report.denied));
    let body = EgressDecisions {
        network_egress: NetworkEgress {
            allowed: report.allowed.into_iter().map(decision).collect(),
            denied: report.denied.into_iter().map(decision).collect(),
        },
        last_updated: last_ms.map(rfc3339),
        last_sequence: report.last_sequence,
        dropped: report.dropped,
    };
    Ok(json(200, &body))
}

fn decision(record: DecisionRecord) -> Decision {
    Decision {
        timestamp: rfc3339(record.at_ms),
        host: record.host,
        method: record.method,
        path: record.path,
        scheme: record.scheme,
        sequence: record.sequence,
        rule: record.rule,
        reason: record.reason,
        address: record.address.map(|address| address.to_string()),
        port: record.port,
        bytes_sent: record.sent_bytes,
        bytes_received: record.received_bytes,
        generation: record.generation,
    }
}

/// What the sandbox's policy makes of an address, by the same function that judges its flows.
pub(super) async fn explanation(OfSandbox(record): OfSandbox, query: Query) -> Answer {
    let (url, method) = (query.need("url")?, query.get("method").unwrap_or("GET"));
    let policy = of_record(record.spec.egress_json.as_deref());
    let passing = Passing::of(record.spec.skip_egress_proxy);
    let steps = explain(&policy, passing, url, method)
        .map_err(|error| Problem::invalid(error.to_string()))?;
    let refused = steps.iter().find_map(Step::address).and_then(|address| {
        DenySet::default().check(address).err().map(|denied| ExplainedStep {
            of: "address".to_owned(),
            what: address.to_string(),
            outcome: "deny".to_owned(),
            rule: "default".to_owned(),
            reason: denied.as_str().to_owned(),
        })
    });
    let mut explained: Vec<ExplainedStep> = steps.iter().map(explained).collect();
    if explained.last().is_some_and(|step| step.outcome != "deny") {
        explained.extend(refused);
    }
    let verdict = explained.last().map_or("deny", |step| step.outcome.as_str()).to_owned();
    let body = Explanation { verdict, generation: record.egress_generation, steps: explained };
    Ok(json(200, &body))
}

fn explained(step: &Step<'_>) -> ExplainedStep {
    ExplainedStep {
        of: step.of.to_owned(),
        what: step.what.clone(),
        outcome: step.outcome().to_owned(),
        rule: step.verdict.rule.to_string(),
        reason: step.verdict.reason.as_str().to_owned(),
    }
}

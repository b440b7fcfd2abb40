//! `holdfast egress …`.

use std::{collections::BTreeMap, path::Path, time::Duration};

use holdfast_api::{
    egress::{Decision, EgressDecisions, Explanation, policy::Policy},
    path,
    sandbox::Sandbox,
};
use serde_json::{Value, json};

use crate::{
    args::{Decisions, EgressDefault, Output, SetEgress},
    client::Client,
    error::CliError,
    output, sandbox,
};

/// Between two looks for decisions that are new.
const FOLLOW_EVERY: Duration = Duration::from_secs(1);

/// The policy in force, as JSON: that is its form.
pub(crate) async fn show(client: &Client, id: &str) -> Result<(), CliError> {
    output::json(&in_force(client, id).await?)
}

async fn in_force(client: &Client, id: &str) -> Result<Policy, CliError> {
    sandbox::one(client, id)?;
    let sandbox: Sandbox = client.get(&path::sandbox(&client.group, id)).await?;
    Ok(sandbox.egress_policy.unwrap_or_default())
}

/// Changes what is given of the policy in force, and leaves the rest.
pub(crate) async fn set(client: &Client, set: &SetEgress) -> Result<(), CliError> {
    let policy = in_force(client, &set.id).await?;
    let mut policy: Value = serde_json::from_str(&policy.to_json())
        .map_err(|error| CliError::Answer(error.to_string()))?;
    if let Some(default) = set.default {
        policy["defaultAction"] = json!(match default {
            EgressDefault::Allow => "Allow",
            EgressDefault::Deny => "Deny",
        });
    }
    if let Some(mode) = set.inspection {
        policy["trafficInspection"] = json!(format!("{mode:?}"));
    }
    let kept = policy["hostRules"].as_array().filter(|_| !set.replace).cloned();
    let mut rules = kept.unwrap_or_default();
    let added = set.allow.iter().map(|pattern| (pattern, "Allow"));
    for (pattern, action) in added.chain(set.deny.iter().map(|pattern| (pattern, "Deny"))) {
        // The first rule that matches counts: what is said last is meant.
        rules.retain(|rule| rule["pattern"] != json!(pattern));
        rules.insert(0, json!({"pattern": pattern, "action": action}));
    }
    policy["hostRules"] = Value::Array(rules);
    send(client, &set.id, &parsed(policy.to_string().as_bytes())?).await
}

/// Sends a policy from a file, which replaces the one in force.
pub(crate) async fn apply(client: &Client, id: &str, file: &Path) -> Result<(), CliError> {
    sandbox::one(client, id)?;
    send(client, id, &read(file)?).await
}

/// The policy in a file, `-` being stdin. What is wrong with it is said before anything is sent, in
/// the node's own words.
pub(crate) fn read(file: &Path) -> Result<Policy, CliError> {
    let bytes = if file == Path::new("-") {
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut std::io::stdin().lock(), &mut bytes)?;
        bytes
    } else {
        fs_err::read(file)?
    };
    parsed(&bytes)
}

fn parsed(bytes: &[u8]) -> Result<Policy, CliError> {
    Policy::parse(bytes)
        .map_err(|error| CliError::Wrong(format!("{error}\n  hint: {}", error.remedy())))
}

async fn send(client: &Client, id: &str, policy: &Policy) -> Result<(), CliError> {
    let ruling: Policy = client.post_body(&path::egress_policy(&client.group, id), policy).await?;
    output::json(&ruling)
}

pub(crate) async fn explain(
    client: &Client,
    id: &str,
    url: &str,
    method: &str,
    output: Output,
) -> Result<(), CliError> {
    sandbox::one(client, id)?;
    let path = path::egress_explain(&client.group, id);
    let explanation: Explanation =
        client.get_with(&path, &[("url", url), ("method", method)]).await?;
    if output == Output::Json {
        return output::json(&explanation);
    }
    output::list(Output::Table, &explanation.steps, &["STEP", "OF", "IS", "BY", "REASON"], |it| {
        let fields = [&it.of, &it.what, &it.outcome, &it.rule, &it.reason];
        fields.into_iter().cloned().collect()
    })?;
    let Explanation { verdict, generation, .. } = &explanation;
    output::line(&format!("{verdict} (policy {generation})"))
}

const HEAD: [&str; 7] = ["TIME", "VERDICT", "SCHEME", "WHERE", "BYTES", "BY", "REASON"];

pub(crate) async fn decisions(
    client: &Client,
    asked: &Decisions,
    output: Output,
) -> Result<(), CliError> {
    sandbox::one(client, &asked.id)?;
    let mut after = 0;
    let mut first = true;
    loop {
        let path = path::egress_decisions(&client.group, &asked.id);
        let after_text = after.to_string();
        let found: EgressDecisions = client.get_with(&path, &[("after", &after_text)]).await?;
        if found.last_sequence < after {
            // An agent that was killed counts on from what it had written.
            after = found.last_sequence;
            continue;
        }
        print(&found, asked, output, first)?;
        if !asked.follow {
            return Ok(());
        }
        (after, first) = (found.last_sequence, false);
        tokio::time::sleep(FOLLOW_EVERY).await;
    }
}

/// Prints what is wanted of the decisions, in the order in which they were made.
fn print(
    found: &EgressDecisions,
    asked: &Decisions,
    output: Output,
    head: bool,
) -> Result<(), CliError> {
    let egress = &found.network_egress;
    let allowed = egress.allowed.iter().filter(|_| !asked.denied).map(|it| (it, true));
    let denied = egress.denied.iter().filter(|_| !asked.allowed).map(|it| (it, false));
    let by_number: BTreeMap<u64, _> =
        allowed.chain(denied).map(|(it, allowed)| (it.sequence, (it, allowed))).collect();
    let rows: Vec<(&Decision, bool)> = by_number.into_values().collect();
    match output {
        Output::Json if asked.follow => rows.iter().try_for_each(|(it, allowed)| {
            let mut line = json!(it);
            line["allowed"] = json!(allowed);
            output::line(&line.to_string())
        }),
        Output::Json => output::json(found),
        Output::Table if head => {
            output::list(output, &rows, &HEAD, row)?;
            if found.dropped > 0 && !asked.follow {
                output::line(&format!("{} older ones are not kept any more", found.dropped))?;
            }
            Ok(())
        }
        Output::Table => rows.iter().try_for_each(|it| {
            let cells = row(it);
            output::line(&output::printable(&cells.join("  ")))
        }),
    }
}

fn row((it, allowed): &(&Decision, bool)) -> Vec<String> {
    let port = it.port.map(|port| format!(":{port}")).unwrap_or_default();
    let method = if it.method.is_empty() { String::new() } else { format!("{} ", it.method) };
    vec![
        it.timestamp.clone(),
        if *allowed { "allowed" } else { "denied" }.to_owned(),
        it.scheme.clone(),
        format!("{method}{}{port}{}", it.host, it.path),
        format!("{}/{}", it.bytes_sent, it.bytes_received),
        it.rule.clone(),
        it.reason.clone(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decision_is_one_line_that_says_what_went_where_and_why() {
        let decision = Decision {
            timestamp: "t".to_owned(),
            host: "a.test".to_owned(),
            method: "GET".to_owned(),
            path: "/x".to_owned(),
            scheme: "https".to_owned(),
            port: Some(443),
            rule: "default".to_owned(),
            reason: "default_action".to_owned(),
            ..Decision::default()
        };
        let cells = row(&(&decision, false));
        let expected =
            ["t", "denied", "https", "GET a.test:443/x", "0/0", "default", "default_action"];
        assert_eq!(cells, expected);
    }
}

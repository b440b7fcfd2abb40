//! What egress processes tell, in the form in which it is kept.

use std::sync::Arc;

use holdfast_model::SandboxId;
use holdfast_wire::egress::{Decision, Ended, Verdict};

use super::{Carried, Decided, Decisions, Sink};

/// Keeps what is told.
pub fn sink(decisions: Arc<Decisions>) -> Sink {
    Arc::new(move |_, batch| {
        for decision in batch.entries {
            // The process says of which sandbox; of no other group's, for it knows none.
            if let Ok(sandbox) = decision.sandbox.parse::<SandboxId>() {
                decisions.record(&sandbox, decided(decision));
            }
        }
        for Ended { sandbox, flow, sent_bytes, received_bytes, .. } in batch.ended {
            if let Ok(sandbox) = sandbox.parse::<SandboxId>() {
                decisions.ended(&sandbox, Carried { flow, sent_bytes, received_bytes });
            }
        }
    })
}

fn decided(decision: Decision) -> Decided {
    Decided {
        at_ms: decision.time_us / 1000,
        // What failed beyond was let out all the same.
        allowed: decision.verdict != Verdict::Denied,
        scheme: decision.scheme,
        host: decision.host,
        method: decision.method,
        path: decision.path,
        address: decision.address,
        port: (decision.port != 0).then_some(decision.port),
        rule: decision.rule.unwrap_or_default(),
        reason: decision.reason,
        generation: decision.generation,
        flow: decision.flow,
    }
}

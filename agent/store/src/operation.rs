//! Answers remembered by the client's request id, so that a retried call is not carried out twice.
//!
//! A call is *begun* before its work and *finished* with its answer after it, each durable. A call
//! found begun and not finished after a restart has an outcome nobody knows, and says so.

use serde::{Deserialize, Serialize};

use crate::table::Record;

/// Calls remembered at once. Clients retry within minutes: a full table forgets the oldest, which
/// at a hundred calls a second is over half a minute old.
pub const OPERATIONS_MAX: usize = 4096;

/// Milliseconds after which a call is forgotten. The published SDK gives up after 443 s.
pub const OPERATION_AGE_MS_MAX: u64 = 60 * 60 * 1000;

/// What was answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    pub status: u16,
    /// Body of the answer, JSON.
    pub body: String,
}

/// Whether a call may be carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Begun {
    /// It is new and now begun: carry it out, then finish it.
    New,
    /// The same call was begun and is not finished: it runs, or the agent died under it.
    Unfinished,
    Finished(Answer),
    /// The id was used for another call.
    OtherCall,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OperationRecord {
    pub(crate) request_id: String,
    /// Tells calls apart that share an id by mistake: method, path and a digest of the body.
    pub(crate) fingerprint: String,
    pub(crate) begun_at_ms: u64,
}

/// Apart from the operation, so that forgetting by age does not read every body.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AnswerRecord {
    pub(crate) request_id: String,
    pub(crate) answer: Answer,
}

impl Record for OperationRecord {
    const TABLE: &'static str = "operations";

    fn key(&self) -> String {
        self.request_id.clone()
    }
}

impl Record for AnswerRecord {
    const TABLE: &'static str = "answers";

    fn key(&self) -> String {
        self.request_id.clone()
    }
}

/// Keys to forget before another record fits: those too old, then the oldest over the count.
pub(crate) fn to_forget(mut known: Vec<(u64, String)>, now_ms: u64) -> Vec<String> {
    known.sort();
    let spare = (known.len() + 1).saturating_sub(OPERATIONS_MAX);
    let old = |begun_at_ms: u64| now_ms.saturating_sub(begun_at_ms) > OPERATION_AGE_MS_MAX;
    known
        .into_iter()
        .enumerate()
        .filter(|(index, (begun_at_ms, _))| *index < spare || old(*begun_at_ms))
        .map(|(_, (_, key))| key)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_table_forgets_the_oldest_call_only() {
        let known = (0..OPERATIONS_MAX as u64).map(|ms| (ms, format!("r{ms}"))).collect();
        assert_eq!(to_forget(known, 10), ["r0"]);
    }

    #[test]
    fn a_call_is_forgotten_when_it_is_over_the_age_and_not_before() {
        let known = vec![(0, "old".to_owned()), (1, "young".to_owned())];
        assert_eq!(to_forget(known, OPERATION_AGE_MS_MAX + 1), ["old"]);
    }
}

//! Commands at work and their answers, by request id: a call that is retried finds the one it
//! repeats and gets its answer, and nothing is run twice.
//!
//! Beside this table, which dies with the process, the store keeps that a call was begun: after a
//! restart a retry is told that nobody knows what came of it.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use holdfast_api::error::Code;
use tokio::sync::{Semaphore, watch};

use super::problem::Problem;

/// Commands run for `executeShellCommand` at once: each may hold megabytes of output. Streams have
/// no part in this.
const AT_WORK_MAX: usize = 256;

/// How long an answer is kept for a retry. The published SDK gives up after 443 s.
const KEPT_FOR: Duration = Duration::from_secs(15 * 60);

/// Bytes of all answers kept. Over that the oldest go, and a retry is told so.
const KEPT_BYTES_MAX: usize = 32 * 1024 * 1024;

/// Answers kept, however small.
const KEPT_MAX: usize = 4096;

/// Where a call is.
#[derive(Debug, Clone)]
pub(super) enum Stage {
    /// Nothing has run yet.
    Starting,
    /// The command runs.
    Running,
    Done(Outcome),
}

/// The JSON of the answer, or why there is none.
pub(super) type Outcome = Result<Bytes, Problem>;

/// One call, to be carried out by whoever got it from [`Calls::enter`].
#[derive(Debug)]
pub(super) struct Call {
    fingerprint: String,
    stage: watch::Sender<Stage>,
}

/// What a request finds.
pub(super) enum Entered {
    /// It is the first of its id: carry it out.
    New(Arc<Call>),
    /// The same call is at work or was answered.
    Known(watch::Receiver<Stage>),
}

#[derive(Debug, Default)]
struct Table {
    by_id: HashMap<String, Arc<Call>>,
    /// Answered ones, the oldest first.
    answered: VecDeque<Answered>,
    answered_bytes: usize,
}

#[derive(Debug)]
struct Answered {
    id: String,
    at: Instant,
    bytes: usize,
}

/// All of them.
#[derive(Debug)]
pub(crate) struct Calls {
    table: Mutex<Table>,
    pub(super) slots: Semaphore,
}

impl Default for Calls {
    fn default() -> Self {
        Self { table: Mutex::default(), slots: Semaphore::new(AT_WORK_MAX) }
    }
}

impl Call {
    fn new(fingerprint: String) -> Arc<Self> {
        Arc::new(Self { fingerprint, stage: watch::Sender::new(Stage::Starting) })
    }

    /// For a call without an id: nobody can repeat it.
    pub(super) fn anonymous() -> Arc<Self> {
        Self::new(String::new())
    }

    pub(super) fn watch(&self) -> watch::Receiver<Stage> {
        self.stage.subscribe()
    }

    pub(super) fn is_running(&self) {
        self.stage.send_replace(Stage::Running);
    }

    /// Ends when nobody has waited for the answer for as long as `grace`.
    pub(super) async fn abandoned(&self, grace: Duration) {
        loop {
            self.stage.closed().await;
            tokio::time::sleep(grace).await;
            if self.stage.is_closed() {
                return;
            }
        }
    }
}

impl Calls {
    /// Finds the call of this id, or makes it. `fingerprint` tells calls apart that share an id by
    /// mistake.
    pub(super) fn enter(
        &self,
        id: &str,
        fingerprint: String,
        now: Instant,
    ) -> Result<Entered, Problem> {
        let mut table = self.table();
        table.forget_old(now);
        if let Some(known) = table.by_id.get(id) {
            return if known.fingerprint == fingerprint {
                Ok(Entered::Known(known.watch()))
            } else {
                Err(reused())
            };
        }
        let call = Call::new(fingerprint);
        table.by_id.insert(id.to_owned(), Arc::clone(&call));
        Ok(Entered::New(call))
    }

    /// Answers the call, and keeps the answer for a while if it has an id.
    pub(super) fn answer(&self, id: Option<&str>, call: &Call, outcome: Outcome, now: Instant) {
        let bytes = outcome.as_ref().map_or(0, Bytes::len);
        call.stage.send_replace(Stage::Done(outcome));
        let Some(id) = id else { return };
        let mut table = self.table();
        table.answered.push_back(Answered { id: id.to_owned(), at: now, bytes });
        table.answered_bytes += bytes;
        table.forget_old(now);
    }

    /// Answers the call and forgets it at once: it did nothing, and a retry may do it.
    pub(super) fn give_up(&self, id: Option<&str>, call: &Call, problem: Problem) {
        if let Some(id) = id {
            self.table().by_id.remove(id);
        }
        call.stage.send_replace(Stage::Done(Err(problem)));
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Nothing that holds the lock can panic half way through a change.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn forget_old(&mut self, now: Instant) {
        while let Some(oldest) = self.answered.front() {
            let over = self.answered_bytes > KEPT_BYTES_MAX || self.answered.len() > KEPT_MAX;
            if !over && now.saturating_duration_since(oldest.at) < KEPT_FOR {
                return;
            }
            let Some(oldest) = self.answered.pop_front() else { return };
            self.answered_bytes -= oldest.bytes;
            self.by_id.remove(&oldest.id);
        }
    }
}

pub(super) fn reused() -> Problem {
    let message = "the request id was used for another call";
    Problem::new(Code::RequestIdReused, message, "send a new request id with every call")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(entered: Result<Entered, Problem>) -> Arc<Call> {
        match entered {
            Ok(Entered::New(call)) => call,
            Ok(Entered::Known(_)) => panic!("the call is known"),
            Err(problem) => panic!("{problem:?}"),
        }
    }

    fn known(entered: Result<Entered, Problem>) -> Stage {
        match entered {
            Ok(Entered::Known(stage)) => stage.borrow().clone(),
            Ok(Entered::New(_)) => panic!("the call is new"),
            Err(problem) => panic!("{problem:?}"),
        }
    }

    fn print() -> String {
        "POST a".to_owned()
    }

    #[test]
    fn a_retry_finds_the_call_at_work_and_then_its_answer() {
        let (calls, now) = (Calls::default(), Instant::now());
        let call = new(calls.enter("id", print(), now));
        assert!(matches!(known(calls.enter("id", print(), now)), Stage::Starting));
        call.is_running();
        assert!(matches!(known(calls.enter("id", print(), now)), Stage::Running));
        calls.answer(Some("id"), &call, Ok(Bytes::from_static(b"{}")), now);
        let Stage::Done(Ok(body)) = known(calls.enter("id", print(), now)) else { panic!() };
        assert_eq!(body, "{}");
    }

    #[test]
    fn another_call_of_the_same_id_is_refused() {
        let (calls, now) = (Calls::default(), Instant::now());
        let _call = new(calls.enter("id", print(), now));
        let error = calls.enter("id", "POST b".to_owned(), now).err().unwrap();
        assert_eq!(error.code, Code::RequestIdReused);
    }

    #[test]
    fn a_call_that_did_nothing_may_be_tried_again() {
        let (calls, now) = (Calls::default(), Instant::now());
        let call = new(calls.enter("id", print(), now));
        calls.give_up(Some("id"), &call, reused());
        let _again = new(calls.enter("id", print(), now));
    }

    #[test]
    fn answers_go_by_age_and_by_size_and_calls_at_work_stay() {
        let (calls, now) = (Calls::default(), Instant::now());
        let _at_work = new(calls.enter("working", print(), now));
        let half = Bytes::from(vec![0; KEPT_BYTES_MAX / 2]);
        for id in ["a", "b", "c"] {
            let call = new(calls.enter(id, print(), now));
            calls.answer(Some(id), &call, Ok(half.clone()), now);
        }
        assert!(matches!(known(calls.enter("b", print(), now)), Stage::Done(_)));
        let _forgotten = new(calls.enter("a", print(), now));
        let later = now + KEPT_FOR;
        let _forgotten = new(calls.enter("c", print(), later));
        assert!(matches!(known(calls.enter("working", print(), later)), Stage::Starting));
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_is_abandoned_when_nobody_comes_back_in_time() {
        let call = Call::anonymous();
        let grace = Duration::from_secs(60);
        let waiting = call.watch();
        let mut abandoned = std::pin::pin!(call.abandoned(grace));
        let wait = |seconds| tokio::time::sleep(Duration::from_secs(seconds));
        let watched = async {
            wait(600).await;
            drop(waiting);
            wait(59).await;
            let back = call.watch();
            wait(600).await;
            drop(back);
        };
        tokio::select! {
            () = &mut abandoned => panic!("somebody waited"),
            () = watched => {}
        }
        abandoned.await;
    }
}

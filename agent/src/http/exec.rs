//! `POST …/executeShellCommand`: at most once per request id, with an answer that keeps the client
//! alive while it waits.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    body::Body,
    extract::State,
    http::{HeaderValue, header},
    response::Response,
};
use bytes::Bytes;
use futures_util::stream;
use holdfast_api::{
    decode::decode,
    error::Code,
    exec::{EXIT_CODE_LOST, ExecuteResult, ExecuteShellCommand},
    model::SandboxId,
};
use holdfast_store::{Answer as Stored, Begun};
use holdfast_wire::guest::{Command, Exec, ExecKey, Keep, Output};
use log::warn;
use sha2::{Digest as _, Sha256};
use tokio::{sync::watch, time::timeout};

use super::{
    App,
    answer::json_bytes,
    body,
    calls::{Call, Entered, Outcome, Stage, reused},
    output::{CommandOutput, result},
    problem::Problem,
    request::{OfSandbox, RequestId},
};
use crate::{
    auth::hex,
    blocking::off_thread,
    fault::{self, Point},
    sandbox::{ExecError, ExecSession, now_ms},
};

/// How long the answer's status may wait for the command. After that it is 200, and what goes wrong
/// is told by exit code and stderr.
const STATUS_PATIENCE: Duration = Duration::from_secs(20);

/// How often a waiting client is sent a space. It gives up after 300 s without a byte.
const SPACE_EVERY: Duration = Duration::from_secs(30);

/// How long a command goes on when its client went away, if the client can come back by request id.
const COME_BACK: Duration = Duration::from_secs(60);

/// How long a command goes on when the daemon is away, if its client can come back by request id.
/// The published SDK gives up after 443 s.
const ALONE_MS_MAX: u32 = 10 * 60 * 1000;

/// Longest answer that is kept in the store, over a restart, in bytes. Longer ones are kept in
/// memory for a while.
const STORED_BYTES_MAX: usize = 4096;

pub(super) async fn execute(
    State(app): State<Arc<App>>,
    OfSandbox(record): OfSandbox,
    RequestId(request_id): RequestId,
    body: Body,
) -> Result<Response, Problem> {
    let bytes = body::json_bytes(body).await?;
    let request: ExecuteShellCommand = decode(&bytes)?;
    request.check()?;
    let exec = Exec {
        command: Command::Shell(request.command),
        env: Vec::new(),
        cwd: request.working_directory,
        user: None,
        stdin: false,
        timeout_ms: None,
        keep: None,
    };
    let fingerprint = fingerprint(&record.id, &bytes);
    let stage = match &request_id {
        None => begin(&app, record.id, exec, None, Call::anonymous(), fingerprint),
        Some(id) => match app.calls.enter(id, fingerprint.clone(), Instant::now())? {
            Entered::Known(stage) => stage,
            Entered::New(call) => begin(&app, record.id, exec, request_id, call, fingerprint),
        },
    };
    wait(stage).await
}

fn fingerprint(id: &SandboxId, body: &[u8]) -> String {
    format!("executeShellCommand {id} {}", hex(&Sha256::digest(body)))
}

/// What the guest knows the command of a call by: found again by the call's repetition alone.
fn key(request_id: &str, fingerprint: &str) -> ExecKey {
    let digest = Sha256::digest(format!("{fingerprint} {request_id}"));
    let mut key = [0; 16];
    key.copy_from_slice(&digest[..16]);
    ExecKey(key)
}

/// Lets the command run by itself: the client may hang up and come back.
fn begin(
    app: &Arc<App>,
    sandbox: SandboxId,
    exec: Exec,
    request_id: Option<String>,
    call: Arc<Call>,
    fingerprint: String,
) -> watch::Receiver<Stage> {
    let stage = call.watch();
    let work = Work { app: Arc::clone(app), sandbox, request_id, call, fingerprint };
    tokio::spawn(work.carry_out(exec));
    stage
}

/// One command being carried out.
struct Work {
    app: Arc<App>,
    sandbox: SandboxId,
    request_id: Option<String>,
    call: Arc<Call>,
    fingerprint: String,
}

/// What the store says of a call.
enum Known {
    /// Nothing: carry it out.
    New,
    /// An earlier process began it.
    Begun,
    /// An earlier process carried it out.
    Answered(Bytes),
}

impl Work {
    async fn carry_out(self, exec: Exec) {
        let known = match self.begin().await {
            Ok(Known::Answered(answer)) => return self.keep(Ok(answer)),
            Ok(known) => known,
            Err(refused) => {
                return self.app.calls.give_up(self.request_id.as_deref(), &self.call, refused);
            }
        };
        let Ok(_slot) = self.app.calls.slots.try_acquire() else {
            let message = "too many commands are at work";
            let busy = Problem::new(Code::TooManyCalls, message, "wait until one of them ends");
            return match known {
                Known::Begun => self.try_later(busy),
                _ => self.did_nothing(busy).await,
            };
        };
        let session = match known {
            Known::Begun => self.find_again().await,
            _ => self.start(exec).await,
        };
        let Some(mut session) = session else { return };
        fault::at(Point::ExecStarted);
        self.call.is_running();
        let outcome = self.follow(&mut session).await;
        fault::at(Point::ExecEnded);
        self.done(outcome).await;
        fault::at(Point::ExecAnswered);
        if session.kept() {
            session.dismiss().await;
        }
    }

    /// `None`: it could not begin, and that is answered.
    async fn start(&self, mut exec: Exec) -> Option<ExecSession> {
        exec.keep = self.key().map(|key| Keep { key, alone_ms_max: ALONE_MS_MAX });
        fault::at(Point::ExecBegun);
        match self.app.registry.exec(&self.sandbox, exec).await {
            Ok(session) => return Some(session),
            Err(error) => {
                let problem = Problem::of_exec(&error);
                match error {
                    // The guest may have begun it: only the answer is missing.
                    ExecError::Guest(_) => self.done(Err(problem)).await,
                    _ => self.did_nothing(problem).await,
                }
            }
        }
        None
    }

    /// Finds the command that an earlier process began. `None`: it is not there, and that is
    /// answered.
    async fn find_again(&self) -> Option<ExecSession> {
        let unknown = || unknown("the command was begun before, and nobody knows what came of it");
        let Some(key) = self.key() else {
            self.try_later(unknown());
            return None;
        };
        match self.app.registry.attach(&self.sandbox, key, 0).await {
            Ok(session) => return Some(session),
            Err(ExecError::Refused(_)) => self.try_later(unknown()),
            // The guest does not answer now; it may know.
            Err(error) => self.try_later(Problem::of_attach(&error)),
        }
        None
    }

    fn key(&self) -> Option<ExecKey> {
        self.request_id.as_deref().map(|id| key(id, &self.fingerprint))
    }

    /// Marks the call begun in the store, if it has an id.
    async fn begin(&self) -> Result<Known, Problem> {
        let Some(id) = self.request_id.clone() else { return Ok(Known::New) };
        let (store, fingerprint) = (Arc::clone(&self.app.store), self.fingerprint.clone());
        let begun = off_thread(move || store.begin_operation(&id, &fingerprint, now_ms())).await?;
        match begun {
            Begun::New => Ok(Known::New),
            Begun::OtherCall => Err(reused()),
            Begun::Unfinished => Ok(Known::Begun),
            Begun::Finished(stored) if stored.status == 200 => {
                Ok(Known::Answered(stored.body.into()))
            }
            Begun::Finished(stored) => Err(unknown(&stored.body)),
        }
    }

    /// Reads the output until the command ends.
    async fn follow(&self, session: &mut ExecSession) -> Outcome {
        let grace = if self.request_id.is_some() { COME_BACK } else { Duration::ZERO };
        let mut abandoned = std::pin::pin!(self.call.abandoned(grace));
        let mut output = CommandOutput::new(&self.app.output_budget);
        let exited = loop {
            let next = tokio::select! {
                next = session.next() => next.map_err(|e| Problem::of_exec(&e.into()))?,
                () = &mut abandoned => {
                    let message = "the command was killed: its client went away";
                    return Err(Problem::new(Code::OutcomeUnknown, message, "keep the connection"));
                }
            };
            match next {
                Some(Output::Stdout(data)) => output.push_stdout(&data),
                Some(Output::Stderr(data)) => output.push_stderr(&data),
                Some(Output::Gap { bytes }) => output.missed(bytes),
                Some(Output::Taken { .. }) => {}
                Some(Output::Exited(exited)) => break exited,
                Some(Output::Failed(failure)) => {
                    return Err(Problem::of_exec(&ExecError::Refused(failure)));
                }
                _ => {
                    let message = "the guest ended the command without saying how";
                    return Err(Problem::new(Code::GuestNotAnswering, message, "look into it"));
                }
            }
        };
        Ok(off_thread(move || output.answer(exited)).await)
    }

    async fn done(&self, outcome: Outcome) {
        if let Some(id) = self.request_id.clone() {
            let answer = stored(&outcome);
            let store = Arc::clone(&self.app.store);
            let kept = off_thread(move || store.finish_operation(&id, answer)).await;
            if let Err(error) = kept {
                warn!(error:%; "outcome of a command not stored");
            }
        }
        self.keep(outcome);
    }

    fn keep(&self, outcome: Outcome) {
        self.app.calls.answer(self.request_id.as_deref(), &self.call, outcome, Instant::now());
    }

    /// Forgets the call here; the store still has it begun, so that its repetition looks again.
    fn try_later(&self, problem: Problem) {
        self.app.calls.give_up(self.request_id.as_deref(), &self.call, problem);
    }

    async fn did_nothing(&self, problem: Problem) {
        if let Some(id) = self.request_id.clone() {
            let store = Arc::clone(&self.app.store);
            if let Err(error) = off_thread(move || store.forget_operation(&id)).await {
                warn!(error:%; "a command that did nothing is still marked begun");
            }
        }
        self.app.calls.give_up(self.request_id.as_deref(), &self.call, problem);
    }
}

fn unknown(message: &str) -> Problem {
    let hint = "look into the sandbox before you run the command again";
    Problem::new(Code::OutcomeUnknown, message, hint)
}

/// What the store keeps of an outcome.
fn stored(outcome: &Outcome) -> Stored {
    match outcome {
        Ok(bytes) if bytes.len() <= STORED_BYTES_MAX => {
            Stored { status: 200, body: String::from_utf8_lossy(bytes).into_owned() }
        }
        Ok(_) => {
            let body = "the command ended, and its output is no longer held".to_owned();
            Stored { status: Code::OutcomeUnknown.status(), body }
        }
        Err(problem) => Stored { status: problem.code.status(), body: problem.message.clone() },
    }
}

/// The answer, when there is one; before that, 200 and spaces.
async fn wait(mut stage: watch::Receiver<Stage>) -> Result<Response, Problem> {
    let done = |stage: &Stage| matches!(stage, Stage::Done(_));
    if let Ok(ended) = timeout(STATUS_PATIENCE, stage.wait_for(done)).await {
        return Ok(json_bytes(200, outcome(ended.ok().as_deref())?));
    }
    // Whether the command can run at all is worth the status; the guest is given no longer.
    let begun = |stage: &Stage| !matches!(stage, Stage::Starting);
    let now = stage.wait_for(begun).await.map(|stage| stage.clone());
    if !matches!(now, Ok(Stage::Running)) {
        return Ok(json_bytes(200, outcome(now.ok().as_ref())?));
    }
    let mut response = Response::new(Body::from_stream(spaces(stage)));
    let kind = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    Ok(response)
}

/// A space now and then, then the answer.
fn spaces(
    stage: watch::Receiver<Stage>,
) -> impl futures_util::Stream<Item = Result<Bytes, std::convert::Infallible>> {
    stream::unfold(Some(stage), |stage| async move {
        let mut stage = stage?;
        let done = |stage: &Stage| matches!(stage, Stage::Done(_));
        let ended = match timeout(SPACE_EVERY, stage.wait_for(done)).await {
            Err(_) => None,
            Ok(ended) => Some(outcome(ended.ok().as_deref())),
        };
        match ended {
            None => Some((Ok(Bytes::from_static(b" ")), Some(stage))),
            Some(outcome) => Some((Ok(outcome.unwrap_or_else(|problem| lost(&problem))), None)),
        }
    })
}

fn outcome(stage: Option<&Stage>) -> Outcome {
    match stage {
        Some(Stage::Done(outcome)) => outcome.clone(),
        // Its task ended without a word.
        _ => Err(Problem::new(Code::Internal, "the command was lost", "see the node's log")),
    }
}

/// A failure told after the status was sent.
fn lost(problem: &Problem) -> Bytes {
    let stderr = format!("holdfast: {}\n", problem.message);
    result(&ExecuteResult { exit_code: EXIT_CODE_LOST, stdout: String::new(), stderr })
}

#[cfg(test)]
mod tests {
    use axum::body::to_bytes;
    use tokio::time::sleep;

    use super::*;
    use crate::http::calls::Calls;

    const LONG: Duration = Duration::from_secs(100);

    /// The answer of a call that ends with `outcome` after all patience is over, as it is read.
    async fn read_late(outcome: Outcome) -> (u16, String) {
        let (calls, call) = (Calls::default(), Call::anonymous());
        call.is_running();
        let waiting = tokio::spawn(wait(call.watch()));
        sleep(LONG).await;
        let response = waiting.await.unwrap().unwrap();
        let status = response.status().as_u16();
        let body = tokio::spawn(to_bytes(response.into_body(), usize::MAX));
        sleep(LONG).await;
        calls.answer(None, &call, outcome, Instant::now());
        (status, String::from_utf8(body.await.unwrap().unwrap().to_vec()).unwrap())
    }

    fn problem() -> Problem {
        Problem::new(Code::GuestNotAnswering, "the guest is gone", "look")
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_waits_gets_spaces_and_then_the_answer() {
        let answer = read_late(Ok(Bytes::from_static(b"{}"))).await;
        assert_eq!(answer, (200, "   {}".to_owned()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_after_the_status_is_told_by_exit_code_and_stderr() {
        let (status, body) = read_late(Err(problem())).await;
        let result: ExecuteResult = serde_json::from_str(&body).unwrap();
        assert_eq!((status, result.exit_code), (200, EXIT_CODE_LOST));
        assert_eq!(result.stderr, "holdfast: the guest is gone\n");
    }

    #[tokio::test(start_paused = true)]
    async fn a_command_that_could_not_begin_has_the_status_of_its_error_however_late() {
        let (calls, call) = (Calls::default(), Call::anonymous());
        let waiting = tokio::spawn(wait(call.watch()));
        sleep(LONG).await;
        calls.give_up(None, &call, problem());
        assert_eq!(waiting.await.unwrap().unwrap_err(), problem());
    }

    #[test]
    fn an_answer_too_long_for_the_store_is_remembered_as_one_that_was_given() {
        let long = Bytes::from(vec![b' '; STORED_BYTES_MAX + 1]);
        assert_eq!(stored(&Ok(long)).status, 409);
        assert_eq!(stored(&Ok(Bytes::from_static(b"{}"))).status, 200);
    }
}

//! `GET /v1/…/exec`: a command with streams, over one WebSocket. Bytes are passed on as they come,
//! and who does not read is not sent more.

use std::{sync::Arc, time::Duration};

use axum::{
    Extension,
    extract::{
        State,
        ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code, rejection},
    },
    response::Response,
};
use futures_util::{SinkExt, StreamExt, stream::SplitSink, stream::SplitStream};
use holdfast_api::{
    decode::decode,
    model::SandboxId,
    stream::{
        ClientMessage, Command, LINGER_MS_DEFAULT, MESSAGE_BYTES_MAX, ServerMessage, Start, Stream,
        data_frame, split_data_frame,
    },
};
use holdfast_wire::{
    frame::CHUNK_BYTES_MAX,
    guest::{self, Exec, ExecKey, Exited, Input, Keep, Output},
};
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::{App, guard::Peer, problem::Problem, request::OfSandbox};
use crate::sandbox::{ExecError, ExecInput, ExecOutput, ExecSession};

/// How long a client may take to say what to run.
const START_PATIENCE: Duration = Duration::from_secs(30);

/// How long a client may take to say that it has the end of a kept command.
const COLLECT_PATIENCE: Duration = Duration::from_secs(10);

/// How often the client is pinged: a connection whose other end is gone fails by it.
const PING_EVERY: Duration = Duration::from_secs(30);

pub(super) async fn exec(
    State(app): State<Arc<App>>,
    OfSandbox(record): OfSandbox,
    Extension(peer): Extension<Peer>,
    upgrade: Result<WebSocketUpgrade, rejection::WebSocketUpgradeRejection>,
) -> Result<Response, Problem> {
    let upgrade = upgrade.map_err(|error| {
        Problem::invalid(format!("this path takes WebSocket connections: {error}"))
    })?;
    let upgrade = upgrade.max_message_size(MESSAGE_BYTES_MAX).max_frame_size(MESSAGE_BYTES_MAX);
    Ok(upgrade.on_upgrade(move |socket| async move {
        serve(&app, &record.id, socket).await;
        // The connection counts among the open ones until here.
        drop(peer);
    }))
}

async fn serve(app: &App, sandbox: &SandboxId, mut socket: WebSocket) {
    let session = match begin(app, sandbox, &mut socket).await {
        Ok(session) => session,
        // There may be nobody left to tell.
        Err(problem) => return drop(end(socket, &failed(&problem)).await),
    };
    let (mut to_client, from_client) = socket.split();
    let kept = session.kept();
    let started =
        ServerMessage::Started { pid: session.pid(), kept, stdin_taken: session.stdin_taken() };
    if send_text(&mut to_client, &started).await.is_err() {
        return;
    }
    let (output, input) = session.split();
    let mut hearing = std::pin::pin!(upstream(from_client, input));
    // Whichever ends first ends both; dropping the session's halves kills a command that runs and
    // is not kept.
    let (last, collects) = tokio::select! {
        last = downstream(output, &mut to_client) => (last, kept),
        problem = &mut hearing => (problem.map(|problem| failed(&problem)), false),
        () = app.halt.cancelled() => {
            // The client finds the command again at the daemon's successor.
            let _ = to_client.send(Message::Close(Some(restart()))).await;
            return;
        }
    };
    let Some(last) = last else { return };
    if send_text(&mut to_client, &last).await.is_err() {
        return;
    }
    if collects {
        // A client that does not say it finds the end again for a while.
        let _ = timeout(COLLECT_PATIENCE, hearing).await;
    }
    let _ = to_client.send(Message::Close(Some(bye()))).await;
}

/// Hears what to run, and runs it.
async fn begin(
    app: &App,
    sandbox: &SandboxId,
    socket: &mut WebSocket,
) -> Result<ExecSession, Problem> {
    let silent = || Problem::invalid("the first message must be a text that says what to run");
    let first = timeout(START_PATIENCE, socket.recv()).await.map_err(|_| silent())?;
    let Some(Ok(Message::Text(text))) = first else { return Err(silent()) };
    match decode(text.as_bytes())? {
        ClientMessage::Start(start) => {
            start.check()?;
            let session = app.registry.exec(sandbox, of_start(start)).await;
            session.map_err(|error| Problem::of_exec(&error))
        }
        ClientMessage::Attach { id, from } => {
            let session = app.registry.attach(sandbox, ExecKey(id.bytes()), from).await;
            session.map_err(|error| Problem::of_attach(&error))
        }
        _ => Err(silent()),
    }
}

fn of_start(start: Start) -> Exec {
    let command = match start.command {
        Command::Argv(argv) => guest::Command::Argv(argv),
        Command::Shell(text) => guest::Command::Shell(text),
        Command::Entrypoint(arguments) => guest::Command::Entrypoint(arguments),
    };
    let Start { env, cwd, user, stdin, timeout_ms, id, linger_ms, .. } = start;
    let keep = id.map(|id| Keep {
        key: ExecKey(id.bytes()),
        alone_ms_max: linger_ms.unwrap_or(LINGER_MS_DEFAULT),
    });
    Exec { command, env, cwd, user, stdin, timeout_ms, keep }
}

/// The command's output to the client, to its end. `None`: the client is gone.
async fn downstream(
    mut output: ExecOutput,
    client: &mut SplitSink<WebSocket, Message>,
) -> Option<ServerMessage> {
    let mut pings = interval(PING_EVERY);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let next = tokio::select! {
            next = output.next() => next,
            _ = pings.tick() => {
                client.send(Message::Ping(bytes::Bytes::new())).await.ok()?;
                continue;
            }
        };
        let frame = match next {
            Ok(Some(Output::Stdout(data))) => data_frame(Stream::Stdout, &data),
            Ok(Some(Output::Stderr(data))) => data_frame(Stream::Stderr, &data),
            Ok(Some(Output::Gap { bytes })) => {
                send_text(client, &ServerMessage::Gap { bytes }).await.ok()?;
                continue;
            }
            Ok(Some(Output::Taken { stdin })) => {
                send_text(client, &ServerMessage::StdinTaken { bytes: stdin }).await.ok()?;
                continue;
            }
            Ok(Some(Output::Exited(exited))) => return Some(of_exited(exited)),
            Ok(Some(Output::Failed(failure))) => {
                return Some(failed(&Problem::of_exec(&ExecError::Refused(failure))));
            }
            Ok(_) => {
                let ended = crate::sandbox::GuestError::Ended;
                return Some(failed(&Problem::of_exec(&ended.into())));
            }
            Err(error) => return Some(failed(&Problem::of_exec(&error.into()))),
        };
        client.send(Message::Binary(frame.into())).await.ok()?;
    }
}

/// The client's messages to the command, until the client goes, makes a mistake or has all it
/// wanted: the command's end is told by [`downstream`].
async fn upstream(mut client: SplitStream<WebSocket>, mut input: ExecInput) -> Option<Problem> {
    let mut reads = true;
    while let Some(Ok(message)) = client.next().await {
        let inputs = match message {
            Message::Binary(frame) => match split_data_frame(&frame) {
                Ok((Stream::Stdin, data)) => {
                    data.chunks(CHUNK_BYTES_MAX).map(|piece| Input::Data(piece.to_vec())).collect()
                }
                Ok(_) => return Some(Problem::invalid("a client sends stdin only")),
                Err(error) => return Some(Problem::invalid(error.to_string())),
            },
            Message::Text(text) => match decode(text.as_bytes()) {
                Ok(ClientMessage::Signal { signal }) => vec![Input::Signal(signal)],
                Ok(ClientMessage::StdinEnd) => vec![Input::End],
                Ok(ClientMessage::Kill) => vec![Input::Kill],
                Ok(ClientMessage::Collect) => {
                    let _ = input.send(&Input::Collect).await;
                    return None;
                }
                Ok(ClientMessage::Start(_) | ClientMessage::Attach { .. }) => {
                    return Some(Problem::invalid("a connection runs one command"));
                }
                Err(error) => return Some(error.into()),
            },
            Message::Close(_) => return None,
            Message::Ping(_) | Message::Pong(_) => continue,
        };
        for piece in inputs {
            // A command that ended, or that closed its stdin, takes no more: what it said still
            // has to reach the client.
            reads = reads && input.send(&piece).await.is_ok();
        }
    }
    None
}

fn of_exited(exited: Exited) -> ServerMessage {
    match exited {
        Exited::Code(code) => ServerMessage::Exited { code: Some(code), signal: None },
        Exited::Signal(signal) => ServerMessage::Exited { code: None, signal: Some(signal) },
        Exited::TimedOut => ServerMessage::TimedOut,
    }
}

fn failed(problem: &Problem) -> ServerMessage {
    ServerMessage::Failed { error: problem.body().error }
}

async fn end(mut socket: WebSocket, last: &ServerMessage) -> Result<(), axum::Error> {
    send_text(&mut socket, last).await?;
    socket.send(Message::Close(Some(bye()))).await
}

fn bye() -> CloseFrame {
    CloseFrame { code: close_code::NORMAL, reason: "".into() }
}

fn restart() -> CloseFrame {
    CloseFrame { code: close_code::RESTART, reason: "the daemon is being restarted".into() }
}

async fn send_text(
    client: &mut (impl SinkExt<Message, Error = axum::Error> + Unpin),
    message: &ServerMessage,
) -> Result<(), axum::Error> {
    let text = serde_json::to_string(message).map_err(axum::Error::new)?;
    client.send(Message::Text(text.into())).await
}

//! One command in a sandbox, with its streams: the client's side of [`holdfast_api::stream`].

use std::{collections::VecDeque, process::ExitCode, time::Duration};

use futures_util::{SinkExt, StreamExt};
use holdfast_api::{
    exec,
    exec_id::ExecId,
    stream::{self, ClientMessage, DATA_BYTES, ServerMessage, Start, Stream},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Stderr, Stdout},
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_tungstenite::tungstenite::{Error as WsError, Message};

use crate::{
    args::Process,
    client::Client,
    error::CliError,
    socket::{self, Socket},
};

/// How long a lost connection is tried to be come back to: a restart of a node's agent.
const COME_BACK_MAX: Duration = Duration::from_secs(120);
/// Pauses between the tries.
const COME_BACK_PAUSE_MIN: Duration = Duration::from_millis(100);
const COME_BACK_PAUSE_MAX: Duration = Duration::from_secs(2);
/// How long the last word of a connection may take.
const FAREWELL_MAX: Duration = Duration::from_secs(2);
/// Bytes of stdin sent of which it is not known whether they arrived. More is not read until then.
const STDIN_UNSURE_MAX: usize = 512 * 1024;
/// What the node says of a command that it never heard of.
const NEVER_BEGAN: &str = "ExecNotFound";
/// Messages read from stdin and not sent yet: a little, so that a slow command slows us down.
const STDIN_MESSAGES_MAX: usize = 4;
/// Interrupts after which we stop waiting for a command that does not heed them.
const INTERRUPTS_MAX: u32 = 3;
/// Exit code of a command that was interrupted: 128 + SIGINT.
pub(crate) const INTERRUPTED: u8 = 130;

/// Signals that are passed on, and as what.
const SIGINT: i32 = 2;
const SIGTERM: i32 = 15;

/// The start message of a command line's options.
pub(crate) fn start(
    process: &Process,
    command: stream::Command,
    stdin: bool,
) -> Result<Start, CliError> {
    let start = Start {
        command,
        env: environment(&process.env, &process.env_file)?,
        cwd: process.workdir.clone(),
        user: process.user.clone(),
        stdin,
        timeout_ms: process.timeout.map(|seconds| seconds.saturating_mul(1000)),
        id: None,
        linger_ms: None,
    };
    start.check().map_err(|error| CliError::Wrong(error.to_string()))?;
    Ok(start)
}

/// `NAME=value` pairs of files and options; options win.
fn environment(
    options: &[String],
    files: &[std::path::PathBuf],
) -> Result<Vec<(String, String)>, CliError> {
    let mut pairs = Vec::new();
    for file in files {
        let text = fs_err::read_to_string(file)?;
        let lines = text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'));
        for line in lines {
            pairs.extend(pair(line)?);
        }
    }
    for option in options {
        pairs.extend(pair(option)?);
    }
    Ok(pairs)
}

/// `NAME` alone takes the variable over from our own environment, if it is there.
fn pair(text: &str) -> Result<Option<(String, String)>, CliError> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (text, std::env::var(text).ok()),
    };
    if name.is_empty() {
        return Err(CliError::Wrong(format!("{text:?} is not of the form NAME=value")));
    }
    Ok(value.map(|value| (name.to_owned(), value)))
}

/// Runs the command, passes on its streams and signals, and gives its exit code. A connection that
/// is lost, or a node whose agent is restarted, is come back to.
pub(crate) async fn run(client: &Client, id: &str, start: Start) -> Result<ExitCode, CliError> {
    let mut terminal = Terminal::open(start.stdin)?;
    let mut command = Command::new(client, id, start)?;
    let mut socket = command.begin().await?;
    loop {
        let lost = match command.carry(&mut socket, &mut terminal).await? {
            Carried::Ended(code) => {
                return Ok(ExitCode::from(code));
            }
            Carried::Lost(error) => error,
        };
        socket = tokio::select! {
            found = command.come_back(lost) => found?,
            () = terminal.given_up() => return Ok(ExitCode::from(INTERRUPTED)),
        };
    }
}

/// Our own end of the streams and signals.
struct Terminal {
    /// `None`: there is no more.
    input: Option<mpsc::Receiver<Vec<u8>>>,
    interrupt: Signal,
    terminate: Signal,
    interrupts: u32,
    stdout: Stdout,
    stderr: Stderr,
}

impl Terminal {
    fn open(stdin: bool) -> Result<Self, CliError> {
        Ok(Self {
            input: stdin.then(read_stdin),
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            interrupts: 0,
            stdout: tokio::io::stdout(),
            stderr: tokio::io::stderr(),
        })
    }

    /// Whether we are to stop waiting.
    fn interrupted(&mut self) -> bool {
        self.interrupts += 1;
        self.interrupts >= INTERRUPTS_MAX
    }

    /// Ends when the user has had enough while nobody is there to be told.
    async fn given_up(&mut self) {
        loop {
            tokio::select! {
                _ = self.interrupt.recv() => if self.interrupted() { return },
                _ = self.terminate.recv() => return,
            }
        }
    }
}

/// How a connection came to its end.
enum Carried {
    /// The command's exit code.
    Ended(u8),
    Lost(CliError),
}

/// One command over however many connections.
struct Command<'a> {
    client: &'a Client,
    sandbox: &'a str,
    id: ExecId,
    start: Start,
    /// The sandbox has said that it runs.
    begun: bool,
    /// It outlives a connection.
    kept: bool,
    /// Bytes of its output that we have, or that nobody has any more.
    heard: u64,
    sent: Sent,
}

impl<'a> Command<'a> {
    fn new(client: &'a Client, sandbox: &'a str, mut start: Start) -> Result<Self, CliError> {
        let mut random = [0; 16];
        getrandom::fill(&mut random)
            .map_err(|error| CliError::Host(format!("no random numbers: {error}")))?;
        let id = ExecId::from_random(random);
        start.id = Some(id);
        let sent = Sent::default();
        Ok(Self { client, sandbox, id, start, begun: false, kept: false, heard: 0, sent })
    }

    async fn begin(&self) -> Result<Socket, CliError> {
        let mut socket = socket::open(self.client, self.sandbox).await?;
        say(&mut socket, &ClientMessage::Start(self.start.clone())).await.map_err(lost)?;
        Ok(socket)
    }

    /// Finds the command again after its connection was lost.
    async fn come_back(&mut self, lost: CliError) -> Result<Socket, CliError> {
        if self.begun && !self.kept {
            return Err(lost);
        }
        let found = timeout(COME_BACK_MAX, async {
            let mut pause = COME_BACK_PAUSE_MIN;
            loop {
                match self.attach().await {
                    Ok(socket) => return Ok(socket),
                    // What the node says no to it says no to again.
                    Err(error @ CliError::Api { status: ..500, .. }) => return Err(error),
                    Err(_) => sleep(pause).await,
                }
                pause = (pause * 2).min(COME_BACK_PAUSE_MAX);
            }
        });
        found.await.unwrap_or(Err(lost))
    }

    async fn attach(&self) -> Result<Socket, CliError> {
        let mut socket = socket::open(self.client, self.sandbox).await?;
        let attach = ClientMessage::Attach { id: self.id, from: self.heard };
        say(&mut socket, &attach).await.map_err(lost)?;
        Ok(socket)
    }

    /// Passes everything on until the command ends or the connection does.
    async fn carry(
        &mut self,
        socket: &mut Socket,
        terminal: &mut Terminal,
    ) -> Result<Carried, CliError> {
        loop {
            let reads = self.begun && self.sent.has_room(self.kept);
            let sent = tokio::select! {
                message = socket.next() => match message {
                    Some(Ok(Message::Binary(frame))) => {
                        if self.pass_on(&frame, terminal).await?.is_err() {
                            // A reader that went away (`| head`) ends the command, as a pipe would.
                            end(socket, &ClientMessage::Kill).await;
                            return Ok(Carried::Ended(128 + 13));
                        }
                        Ok(())
                    }
                    Some(Ok(Message::Text(text))) => {
                        let message = serde_json::from_str(&text)
                            .map_err(|error| CliError::Answer(error.to_string()))?;
                        match self.hear(socket, message).await {
                            Ok(Heard::More) => Ok(()),
                            Ok(Heard::End(code)) => {
                                end(socket, &ClientMessage::Collect).await;
                                return Ok(Carried::Ended(code));
                            }
                            Err(Interruption::Refused(error)) => return Err(error),
                            Err(Interruption::Lost(error)) => return Ok(Carried::Lost(error)),
                        }
                    }
                    Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => Ok(()),
                    Some(Ok(Message::Close(_))) | None => {
                        let text = "the connection ended before the command".to_owned();
                        return Ok(Carried::Lost(CliError::Host(text)));
                    }
                    Some(Err(error)) => Err(error),
                },
                bytes = next_input(&mut terminal.input), if reads => match bytes {
                    Some(bytes) => socket.send(self.sent.data(bytes)).await,
                    None => {
                        terminal.input = None;
                        self.sent.ended = true;
                        say(socket, &ClientMessage::StdinEnd).await
                    }
                },
                _ = terminal.interrupt.recv() => {
                    if terminal.interrupted() {
                        end(socket, &ClientMessage::Kill).await;
                        return Ok(Carried::Ended(INTERRUPTED));
                    }
                    say(socket, &ClientMessage::Signal { signal: SIGINT }).await
                }
                _ = terminal.terminate.recv() => {
                    say(socket, &ClientMessage::Signal { signal: SIGTERM }).await
                }
            };
            if let Err(error) = sent {
                return Ok(Carried::Lost(lost(error)));
            }
        }
    }

    /// The inner error: our own reader is gone.
    async fn pass_on(
        &mut self,
        frame: &[u8],
        terminal: &mut Terminal,
    ) -> Result<std::io::Result<()>, CliError> {
        let (stream, bytes) =
            stream::split_data_frame(frame).map_err(|error| CliError::Answer(error.to_string()))?;
        self.heard += u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        Ok(match stream {
            Stream::Stderr => write_all(&mut terminal.stderr, bytes).await,
            Stream::Stdin | Stream::Stdout => write_all(&mut terminal.stdout, bytes).await,
        })
    }

    async fn hear(
        &mut self,
        socket: &mut Socket,
        message: ServerMessage,
    ) -> Result<Heard, Interruption> {
        match message {
            ServerMessage::Started { kept, stdin_taken, .. } => {
                self.begun = true;
                self.kept = kept;
                self.sent.taken(stdin_taken);
                for message in self.sent.again() {
                    socket.send(message).await?;
                }
                if self.sent.ended {
                    say(socket, &ClientMessage::StdinEnd).await?;
                }
            }
            ServerMessage::StdinTaken { bytes } => self.sent.taken(bytes),
            ServerMessage::Gap { bytes } => {
                self.heard += bytes;
                let note = format!("holdfast: {bytes} bytes of output were lost\n");
                // A note that nobody reads is no reason to end the command.
                let _ = write_all(&mut tokio::io::stderr(), note.as_bytes()).await;
            }
            // The node never heard of it: the connection was lost before the command began.
            ServerMessage::Failed { error } if !self.begun && error.code == NEVER_BEGAN => {
                *socket = self.begin().await.map_err(Interruption::Lost)?;
            }
            ServerMessage::Failed { error } => {
                let error = CliError::Api { status: 422, detail: error };
                return Err(Interruption::Refused(error));
            }
            last => return Ok(Heard::End(exit_code(&last))),
        }
        Ok(Heard::More)
    }
}

enum Heard {
    More,
    End(u8),
}

/// Why a message could not be acted on.
enum Interruption {
    /// The command is lost.
    Refused(CliError),
    /// The connection is.
    Lost(CliError),
}

impl From<WsError> for Interruption {
    fn from(error: WsError) -> Self {
        Self::Lost(lost(error))
    }
}

/// Stdin that was sent and may have to be sent again.
#[derive(Debug, Default)]
struct Sent {
    /// Pieces that have not arrived for certain, and where the first begins.
    pieces: VecDeque<Vec<u8>>,
    start: u64,
    bytes: usize,
    /// There is no more behind them.
    ended: bool,
}

impl Sent {
    /// Whether more may be read. A command that is not kept says nothing of what has arrived.
    fn has_room(&self, kept: bool) -> bool {
        !kept || self.bytes < STDIN_UNSURE_MAX
    }

    /// The message for the next piece, which is kept.
    fn data(&mut self, bytes: Vec<u8>) -> Message {
        let frame = stream::data_frame(Stream::Stdin, &bytes);
        self.bytes += bytes.len();
        self.pieces.push_back(bytes);
        if self.bytes > 2 * STDIN_UNSURE_MAX {
            // Only of a command that is not kept: it is not come back to.
            self.drop_first();
        }
        Message::binary(frame)
    }

    /// The first `count` bytes of all have arrived.
    fn taken(&mut self, count: u64) {
        let behind = |piece: &Vec<u8>, start: u64| start + length(piece) <= count;
        while self.pieces.front().is_some_and(|piece| behind(piece, self.start)) {
            self.drop_first();
        }
        if let Some(piece) = self.pieces.front_mut().filter(|_| count > self.start) {
            let part = usize::try_from(count - self.start).unwrap_or(usize::MAX).min(piece.len());
            piece.drain(..part);
            self.bytes -= part;
            self.start = count;
        }
    }

    fn drop_first(&mut self) {
        if let Some(piece) = self.pieces.pop_front() {
            self.start += length(&piece);
            self.bytes -= piece.len();
        }
    }

    /// What has to be sent on a new connection.
    fn again(&self) -> Vec<Message> {
        let frame = |piece: &Vec<u8>| stream::data_frame(Stream::Stdin, piece);
        self.pieces.iter().map(|piece| Message::binary(frame(piece))).collect()
    }
}

fn length(piece: &[u8]) -> u64 {
    u64::try_from(piece.len()).unwrap_or(u64::MAX)
}

async fn say(socket: &mut Socket, message: &ClientMessage) -> Result<(), WsError> {
    // Strings and numbers always encode.
    let text = serde_json::to_string(message).unwrap_or_default();
    socket.send(Message::text(text)).await
}

/// The last word on a connection. What does not arrive in time is not waited for.
async fn end(socket: &mut Socket, message: &ClientMessage) {
    let _ = timeout(FAREWELL_MAX, async {
        say(socket, message).await?;
        socket.close(None).await
    })
    .await;
}

/// The exit code of the last message.
fn exit_code(last: &ServerMessage) -> u8 {
    let code = match last {
        ServerMessage::Exited { code: Some(code), .. } => code & 0xff,
        ServerMessage::Exited { signal: Some(signal), .. } => exec::exit_code_of_signal(*signal),
        ServerMessage::TimedOut => exec::EXIT_CODE_TIMED_OUT,
        _ => exec::EXIT_CODE_LOST,
    };
    u8::try_from(code).unwrap_or(u8::MAX)
}

async fn write_all(
    target: &mut (impl tokio::io::AsyncWrite + Unpin),
    bytes: &[u8],
) -> std::io::Result<()> {
    target.write_all(bytes).await?;
    target.flush().await
}

/// Waits for more stdin; for ever, if there is none to be passed on.
async fn next_input(input: &mut Option<mpsc::Receiver<Vec<u8>>>) -> Option<Vec<u8>> {
    match input {
        Some(receiver) => receiver.recv().await,
        None => std::future::pending().await,
    }
}

/// Reads stdin in a task of its own: a read cannot be called off.
fn read_stdin() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(STDIN_MESSAGES_MAX);
    tokio::spawn(async move {
        let mut stdin = tokio::io::stdin();
        let mut buffer = vec![0; DATA_BYTES];
        while let Ok(count @ 1..) = stdin.read(&mut buffer).await {
            if sender.send(buffer[..count].to_vec()).await.is_err() {
                break;
            }
        }
    });
    receiver
}

fn lost(error: WsError) -> CliError {
    CliError::Host(format!("the connection to the command was lost: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_command_becomes_an_exit_code_as_shells_have_it() {
        let exited = |code, signal| ServerMessage::Exited { code, signal };
        let cases = [
            (exited(Some(7), None), 7),
            (exited(None, Some(9)), 137),
            (exited(Some(256), None), 0),
            (exited(None, None), 255),
            (ServerMessage::TimedOut, 124),
        ];
        for (message, code) in cases {
            assert_eq!(exit_code(&message), code, "{message:?}");
        }
    }

    #[test]
    fn options_come_after_files_and_nameless_variables_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("env");
        fs_err::write(&file, "# comment\nA=file\n\nB=x=y\n").unwrap();
        let pairs = environment(&["A=option".to_owned()], &[file]).unwrap();
        let own = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(pairs, [own("A", "file"), own("B", "x=y"), own("A", "option")]);
        assert!(environment(&["=x".to_owned()], &[]).is_err());
    }

    #[test]
    fn what_has_not_arrived_is_sent_again_and_nothing_else() {
        let mut sent = Sent::default();
        for piece in ["abc", "def", "ghi"] {
            let _ = sent.data(piece.into());
        }
        let again = |sent: &Sent| {
            let pieces = sent.again().into_iter().flat_map(|message| {
                message.into_data().iter().skip(1).copied().collect::<Vec<_>>()
            });
            String::from_utf8(pieces.collect()).unwrap()
        };
        for (taken, left) in [(0, "abcdefghi"), (4, "efghi"), (6, "ghi"), (5, "ghi"), (9, "")] {
            sent.taken(taken);
            assert_eq!((again(&sent).as_str(), sent.bytes), (left, left.len()), "{taken} taken");
        }
    }

    #[test]
    fn stdin_waits_while_too_much_may_be_lost() {
        let mut sent = Sent::default();
        while sent.has_room(true) {
            let _ = sent.data(vec![0; DATA_BYTES]);
        }
        assert!(sent.bytes >= STDIN_UNSURE_MAX && sent.has_room(false));
        sent.taken(u64::try_from(DATA_BYTES).unwrap());
        assert!(sent.has_room(true));
        for _ in 0..100 {
            let _ = sent.data(vec![0; DATA_BYTES]);
        }
        assert!(sent.bytes <= 2 * STDIN_UNSURE_MAX);
    }
}

//! One command in a sandbox, with its streams: the client's side of [`holdfast_api::stream`].

use std::{process::ExitCode, time::Duration};

use futures_util::{SinkExt, StreamExt};
use holdfast_api::{
    API_VERSION, exec, path,
    stream::{
        self, ClientMessage, Command, DATA_BYTES, MESSAGE_BYTES_MAX, ServerMessage, Start, Stream,
    },
};
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Error as WsError, Message, client::IntoClientRequest, protocol::WebSocketConfig,
    },
};

use crate::{args::Process, client::Client, client::api_error, connection, error::CliError};

type Socket = WebSocketStream<TlsStream<TcpStream>>;

/// How long connecting and the handshakes may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
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
pub(crate) fn start(process: &Process, command: Command, stdin: bool) -> Result<Start, CliError> {
    let start = Start {
        command,
        env: environment(&process.env, &process.env_file)?,
        cwd: process.workdir.clone(),
        user: process.user.clone(),
        stdin,
        timeout_ms: process.timeout.map(|seconds| seconds.saturating_mul(1000)),
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

/// Runs the command, passes on its streams and signals, and gives its exit code.
pub(crate) async fn run(client: &Client, id: &str, start: Start) -> Result<ExitCode, CliError> {
    let stdin = start.stdin;
    let socket = timeout(CONNECT_TIMEOUT, connect(client, id))
        .await
        .map_err(|_| CliError::Host(format!("{} did not answer", client.target.endpoint)))??;
    let (mut sink, mut source) = socket.split();
    let text = |message: &ClientMessage| {
        serde_json::to_string(message).map_err(|error| CliError::Answer(error.to_string()))
    };
    sink.send(Message::text(text(&ClientMessage::Start(start))?)).await.map_err(lost)?;

    let mut input = stdin.then(read_stdin);
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupts = 0;
    let (mut stdout, mut stderr) = (tokio::io::stdout(), tokio::io::stderr());
    loop {
        tokio::select! {
            message = source.next() => match message {
                Some(Ok(Message::Binary(frame))) => {
                    let (stream, bytes) = stream::split_data_frame(&frame)
                        .map_err(|error| CliError::Answer(error.to_string()))?;
                    let written = match stream {
                        Stream::Stderr => write_all(&mut stderr, bytes).await,
                        Stream::Stdin | Stream::Stdout => write_all(&mut stdout, bytes).await,
                    };
                    // A reader that went away (`| head`) ends the command, as a pipe would.
                    if written.is_err() { return Ok(ExitCode::from(128 + 13)); }
                }
                Some(Ok(Message::Text(text))) => {
                    let message = serde_json::from_str(&text)
                        .map_err(|error| CliError::Answer(error.to_string()))?;
                    if let Some(code) = outcome(message)? { return Ok(ExitCode::from(code)); }
                }
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
                Some(Ok(Message::Close(_))) | None => {
                    return Err(CliError::Host("the connection ended before the command".to_owned()));
                }
                Some(Err(error)) => return Err(lost(error)),
            },
            bytes = next_input(&mut input) => match bytes {
                Some(bytes) => {
                    let frame = stream::data_frame(Stream::Stdin, &bytes);
                    sink.send(Message::binary(frame)).await.map_err(lost)?;
                }
                None => {
                    input = None;
                    sink.send(Message::text(text(&ClientMessage::StdinEnd)?)).await.map_err(lost)?;
                }
            },
            _ = interrupt.recv() => {
                interrupts += 1;
                if interrupts >= INTERRUPTS_MAX { return Ok(ExitCode::from(INTERRUPTED)); }
                let message = text(&ClientMessage::Signal { signal: SIGINT })?;
                sink.send(Message::text(message)).await.map_err(lost)?;
            }
            _ = terminate.recv() => {
                let message = text(&ClientMessage::Signal { signal: SIGTERM })?;
                sink.send(Message::text(message)).await.map_err(lost)?;
            }
        }
    }
}

/// The exit code a message carries, if it is the last one.
fn outcome(message: ServerMessage) -> Result<Option<u8>, CliError> {
    let code = match message {
        ServerMessage::Started { .. } => return Ok(None),
        ServerMessage::Exited { code: Some(code), .. } => code & 0xff,
        ServerMessage::Exited { signal: Some(signal), .. } => exec::exit_code_of_signal(signal),
        ServerMessage::Exited { .. } => exec::EXIT_CODE_LOST,
        ServerMessage::TimedOut => exec::EXIT_CODE_TIMED_OUT,
        ServerMessage::Failed { error } => {
            return Err(CliError::Api { status: 422, detail: error });
        }
    };
    Ok(Some(u8::try_from(code).unwrap_or(u8::MAX)))
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

async fn connect(client: &Client, id: &str) -> Result<Socket, CliError> {
    let (host, port) = connection::host_and_port(&client.target.endpoint)?;
    let unreachable = |what: &str, error: std::io::Error| {
        CliError::Host(format!("cannot {what} {}: {error}", client.target.endpoint))
    };
    let tcp = TcpStream::connect((host.as_str(), port))
        .await
        .map_err(|error| unreachable("connect to", error))?;
    tcp.set_nodelay(true)?;
    let name = ServerName::try_from(host.clone())
        .map_err(|_| CliError::Wrong(format!("{host:?} is not a host name")))?;
    let tls = TlsConnector::from(connection::tls(&client.target)?)
        .connect(name, tcp)
        .await
        .map_err(|error| unreachable("trust", error))?;
    let path = path::exec(&client.group, id);
    let mut request = format!("wss://{host}:{port}{path}?api-version={API_VERSION}")
        .into_client_request()
        .map_err(lost)?;
    if let Some(token) = &client.target.token {
        let value = format!("Bearer {token}").parse().map_err(|_| {
            CliError::Wrong("the token holds characters a header cannot".to_owned())
        })?;
        request.headers_mut().insert("authorization", value);
    }
    let limits = WebSocketConfig::default()
        .max_message_size(Some(MESSAGE_BYTES_MAX))
        .max_frame_size(Some(MESSAGE_BYTES_MAX));
    match tokio_tungstenite::client_async_with_config(request, tls, Some(limits)).await {
        Ok((socket, _)) => Ok(socket),
        Err(WsError::Http(response)) => {
            let body = response.body().as_deref().unwrap_or_default();
            Err(api_error(response.status().as_u16(), &String::from_utf8_lossy(body)))
        }
        Err(error) => Err(lost(error)),
    }
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
            (exited(Some(7), None), Some(7)),
            (exited(None, Some(9)), Some(137)),
            (exited(Some(256), None), Some(0)),
            (ServerMessage::TimedOut, Some(124)),
            (ServerMessage::Started { pid: 1 }, None),
        ];
        for (message, code) in cases {
            assert_eq!(outcome(message.clone()).unwrap(), code, "{message:?}");
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
}

//! The same sandboxes through the API: create, commands, streams and files over TLS.

use std::{
    sync::{Arc, Once},
    time::Duration,
};

use futures_util::{SinkExt, StreamExt};
use holdfast_api::{
    error::ErrorBody,
    exec::{ExecuteResult, OUTPUT_BYTES_MAX},
    path,
    sandbox::{PublicState, Sandbox},
    stream::{ClientMessage, Command, ServerMessage, Start, Stream, data_frame, split_data_frame},
};
use holdfastd::{daemon::Daemon, sandbox::Ending};
use reqwest::{Client, Method, RequestBuilder};
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
use serde_json::json;
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, client::IntoClientRequest},
};

use crate::node::{config_in, group};

const TOKEN: &str = "hf_a-token-of-the-tests";

/// Longer than anything here takes on an emulated machine under load.
const LONG: Duration = Duration::from_secs(120);

/// A daemon and one running sandbox.
struct Api {
    daemon: Daemon,
    client: Client,
    sandbox: String,
    _folder: tempfile::TempDir,
}

impl Api {
    async fn start() -> Self {
        static PROVIDER: Once = Once::new();
        PROVIDER.call_once(|| {
            let _ = rustls::crypto::ring::default_provider().install_default();
        });
        let folder = tempfile::tempdir().unwrap();
        let mut config = config_in(folder.path());
        config.api.listen = ([127, 0, 0, 1], 0).into();
        config.api.admin_token = Some(holdfast_model::Secret::new(TOKEN));
        let daemon = Daemon::start(config).await.unwrap();
        let ca = reqwest::Certificate::from_pem(daemon.ca_pem().as_bytes()).unwrap();
        let client = Client::builder().tls_certs_only([ca]).build();
        let client = client.unwrap();
        let mut api = Self { daemon, client, sandbox: String::new(), _folder: folder };
        api.sandbox = api.create().await;
        api
    }

    async fn create(&self) -> String {
        let body = json!({
            "sourcesRef": {"diskImage": {"name": "busybox", "isPublic": true}},
            "resources": {"cpu": "1000m", "memory": "256Mi", "disk": "1Gi"},
            "environment": {"GREETING": "hello"},
        });
        let request = self.request(Method::PUT, &path::sandboxes(&group())).json(&body);
        let made: Sandbox = request.send().await.unwrap().json().await.unwrap();
        let running = async {
            loop {
                let at = path::sandbox(&group(), &made.id);
                let answer = self.request(Method::GET, &at).send().await.unwrap();
                let now: Sandbox = answer.json().await.unwrap();
                match now.state {
                    PublicState::Creating => tokio::time::sleep(Duration::from_millis(50)).await,
                    state => return assert_eq!(state, PublicState::Running, "{now:?}"),
                }
            }
        };
        tokio::time::timeout(LONG, running).await.unwrap();
        made.id
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let port = self.daemon.address().port();
        self.client.request(method, format!("https://127.0.0.1:{port}{path}")).bearer_auth(TOKEN)
    }

    async fn post(&self, command: &str, request_id: &str) -> (u16, String) {
        let at = path::execute_shell_command(&group(), &self.sandbox);
        let mut request = self.request(Method::POST, &at).json(&json!({ "command": command }));
        if !request_id.is_empty() {
            request = request.header(holdfast_api::REQUEST_ID_HEADER, request_id);
        }
        let answer = request.send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    }

    async fn run(&self, command: &str, request_id: &str) -> ExecuteResult {
        let (status, body) = self.post(command, request_id).await;
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    }

    /// Opens the streaming exec and says what to run.
    async fn stream(&self, start: Start) -> WebSocketStream<TlsStream<TcpStream>> {
        let mut roots = rustls::RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_slice(self.daemon.ca_pem().as_bytes()).unwrap())
            .unwrap();
        let config =
            rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        let tcp = TcpStream::connect(self.daemon.address()).await.unwrap();
        let name = ServerName::try_from("127.0.0.1").unwrap();
        let tls = TlsConnector::from(Arc::new(config)).connect(name, tcp).await.unwrap();
        let at = path::exec(&group(), &self.sandbox);
        let mut request = format!("wss://127.0.0.1{at}").into_client_request().unwrap();
        let token = format!("Bearer {TOKEN}").parse().unwrap();
        request.headers_mut().insert("authorization", token);
        let (mut socket, _) = tokio_tungstenite::client_async(request, tls).await.unwrap();
        socket.send(text(&ClientMessage::Start(start))).await.unwrap();
        socket
    }

    async fn stop(self) {
        let at = path::sandbox(&group(), &self.sandbox);
        let answer = self.request(Method::DELETE, &at).send().await.unwrap();
        assert_eq!(answer.status(), 204);
        self.daemon.stop(Ending::Detach).await;
    }
}

fn text(message: &ClientMessage) -> Message {
    Message::Text(serde_json::to_string(message).unwrap().into())
}

fn argv(words: &[&str]) -> Start {
    Start {
        command: Command::Argv(words.iter().map(|word| (*word).to_owned()).collect()),
        env: Vec::new(),
        cwd: None,
        user: None,
        stdin: false,
        timeout_ms: None,
        id: None,
        linger_ms: None,
    }
}

#[derive(Debug, Default)]
struct Heard {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    last: Option<ServerMessage>,
}

/// Everything the server says until it closes.
async fn hear(socket: &mut WebSocketStream<TlsStream<TcpStream>>) -> Heard {
    let mut heard = Heard::default();
    while let Some(Ok(message)) = tokio::time::timeout(LONG, socket.next()).await.unwrap() {
        match message {
            Message::Binary(frame) => match split_data_frame(&frame).unwrap() {
                (Stream::Stdout, bytes) => heard.stdout.extend_from_slice(bytes),
                (Stream::Stderr, bytes) => heard.stderr.extend_from_slice(bytes),
                (Stream::Stdin, _) => panic!("stdin from the server"),
            },
            Message::Text(text) => heard.last = serde_json::from_str(&text).unwrap(),
            _ => {}
        }
    }
    heard
}

fn exited(code: i32) -> Option<ServerMessage> {
    Some(ServerMessage::Exited { code: Some(code), signal: None })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_runs_once_however_often_its_call_is_repeated() {
    let api = Api::start().await;
    let answer = api.run("echo $GREETING; echo trouble >&2; exit 7", "streams").await;
    assert_eq!((answer.exit_code, &*answer.stdout, &*answer.stderr), (7, "hello\n", "trouble\n"));

    let once = "sleep 1; echo x >> /tmp/runs; cat /tmp/runs";
    let (first, second) = tokio::join!(api.run(once, "once"), api.run(once, "once"));
    assert_eq!(first.stdout, "x\n");
    assert_eq!(second, first);
    assert_eq!(api.run(once, "once").await, first);
    let (status, body) = api.post("true", "once").await;
    let error: ErrorBody = serde_json::from_str(&body).unwrap();
    assert_eq!((status, &*error.error.code), (409, "RequestIdReused"));
    assert_eq!(api.run(once, "another").await.stdout, "x\nx\n");
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn output_without_end_is_cut_and_a_command_that_cannot_run_says_why() {
    let api = Api::start().await;
    let much = OUTPUT_BYTES_MAX + 1_000_000;
    let answer = api.run(&format!("yes | head -c {much}"), "much").await;
    assert_eq!((answer.exit_code, answer.stdout.len()), (0, OUTPUT_BYTES_MAX));
    assert!(answer.stderr.contains("stdout was cut"), "{}", answer.stderr);

    let answer = api.run("no-such-program", "missing").await;
    assert_eq!(answer.exit_code, 127);
    assert!(answer.stderr.contains("no-such-program"), "{}", answer.stderr);

    let heard = hear(&mut api.stream(argv(&["no-such-program"])).await).await;
    let Some(ServerMessage::Failed { error }) = heard.last else { panic!("{heard:?}") };
    assert_eq!(error.code, "CommandNotRun");
    assert!(error.message.contains("no-such-program"), "{error:?}");
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_go_both_ways_and_a_signal_ends_a_command() {
    let api = Api::start().await;
    let socket = api.stream(Start { stdin: true, ..argv(&["cat"]) }).await;
    let sent: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let (mut to, mut from) = socket.split();
    let sending = async {
        for piece in sent.chunks(holdfast_api::stream::DATA_BYTES) {
            to.send(Message::Binary(data_frame(Stream::Stdin, piece).into())).await.unwrap();
        }
        to.send(text(&ClientMessage::StdinEnd)).await.unwrap();
    };
    let hearing = async {
        let mut heard = (Vec::new(), None);
        while let Some(Ok(message)) = from.next().await {
            match message {
                Message::Binary(frame) => heard.0.extend_from_slice(&frame[1..]),
                Message::Text(text) => heard.1 = serde_json::from_str(&text).unwrap(),
                _ => {}
            }
        }
        heard
    };
    let ((), (heard, last)) = tokio::join!(sending, hearing);
    assert_eq!(last, exited(0));
    assert!(heard == sent, "{} bytes of {}", heard.len(), sent.len());

    let mut socket = api.stream(argv(&["sleep", "600"])).await;
    let first = socket.next().await.unwrap().unwrap();
    let first: ServerMessage = serde_json::from_str(first.to_text().unwrap()).unwrap();
    assert!(matches!(first, ServerMessage::Started { .. }), "{first:?}");
    socket.send(text(&ClientMessage::Signal { signal: 15 })).await.unwrap();
    let last = hear(&mut socket).await.last;
    assert_eq!(last, Some(ServerMessage::Exited { code: None, signal: Some(15) }));

    let limited = Start { timeout_ms: Some(300), ..argv(&["sleep", "600"]) };
    assert_eq!(hear(&mut api.stream(limited).await).await.last, Some(ServerMessage::TimedOut));
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_takes_its_command_with_it() {
    let api = Api::start().await;
    let script = "echo begun > /tmp/begun; sleep 3; echo survived > /tmp/survived";
    let socket = api.stream(argv(&["sh", "-c", script])).await;
    while api.run("cat /tmp/begun", "").await.exit_code != 0 {}
    drop(socket);
    let after = api.run("sleep 5; cat /tmp/survived", "after").await;
    assert_eq!(after.exit_code, 1, "{after:?}");
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_read_back_as_it_was_written_and_a_missing_one_is_not_found() {
    let api = Api::start().await;
    let files = path::files(&group(), &api.sandbox);
    let at = |query: &str| format!("{files}?{query}");
    let content: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[0]).collect();
    let write = at("path=/tmp/new%20folder/a+b&createDirs=true&mode=0640");
    let answer = api.request(Method::PUT, &write).body(content.clone()).send().await.unwrap();
    assert_eq!(answer.status(), 204);
    let answer = api.request(Method::GET, &at("path=/tmp/new%20folder/a+b")).send().await.unwrap();
    assert!(answer.bytes().await.unwrap() == content);
    let mode = api.run("stat -c %a '/tmp/new folder/a+b'", "mode").await;
    assert_eq!(mode.stdout, "640\n");
    for (query, status, code) in
        [("path=/no/such", 404, "FileNotFound"), ("path=/tmp", 422, "FileRefused")]
    {
        let answer = api.request(Method::GET, &at(query)).send().await.unwrap();
        let answered = answer.status().as_u16();
        let error: ErrorBody = answer.json().await.unwrap();
        assert_eq!((answered, &*error.error.code), (status, code), "{query}");
    }
    let details = path::details(&group(), &api.sandbox);
    let details: holdfast_api::node::SandboxDetails =
        api.request(Method::GET, &details).send().await.unwrap().json().await.unwrap();
    let vmm = details.vmm.unwrap();
    assert!(vmm.pid > 1 && vmm.exits.is_some() && vmm.resident_kib.is_some(), "{vmm:?}");
    api.stop().await;
}

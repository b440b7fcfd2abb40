//! What stands before every call: TLS, token, paths and methods, time and size.

use std::time::{Duration, Instant};

use futures_util::stream;
use holdfast_api::path;
use reqwest::Method;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::server::{Answer, Server, TOKEN, sandboxes};

#[tokio::test]
async fn no_call_but_the_open_ones_is_answered_without_a_token_that_is_known() {
    let server = Server::start().await;
    for open in [path::HEALTHZ, path::READYZ, path::CA] {
        let answer = Answer::of(server.open(Method::GET, open).send().await.unwrap()).await;
        assert_eq!(answer.status, 200, "{open}");
    }
    let closed = [&*sandboxes(), path::NODE, "/", "/nothing", "/metrics"];
    let headers = [
        "",
        "Bearer",
        "Bearer ",
        "Bearer hf_wrong",
        &format!("Basic {TOKEN}"),
        &format!("Bearer {TOKEN}x"),
        &format!("Bearer {}", "x".repeat(20_000)),
    ];
    for path in closed {
        for header in headers {
            let request = server.open(Method::GET, path).header("authorization", header);
            let answer = Answer::of(request.send().await.unwrap()).await;
            answer.refused(401, "Unauthorized");
            assert_eq!(answer.headers["www-authenticate"], "Bearer");
        }
    }
}

#[tokio::test]
async fn the_ca_and_its_fingerprint_are_told_to_whoever_stands_at_the_console() {
    use sha2::Digest as _;
    let server = Server::start().await;
    let answer = Answer::of(server.open(Method::GET, path::CA).send().await.unwrap()).await;
    assert_eq!(answer.text, server.ca_pem());
    let der = reqwest::tls::Certificate::from_pem(answer.text.as_bytes());
    assert!(der.is_ok());
    let base64: String = answer.text.lines().filter(|line| !line.starts_with('-')).collect();
    let der = data_encoding(&base64);
    let hex: String = sha2::Sha256::digest(der).iter().map(|b| format!("{b:02x}")).collect();
    assert!(server.greeting().ends_with(&format!(", CA SHA256:{hex}")), "{}", server.greeting());
}

/// Base64, decoded: too little to bring a crate for.
fn data_encoding(text: &str) -> Vec<u8> {
    const ALPHABET: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut bits = (0_u32, 0_u32);
    let mut bytes = Vec::new();
    for value in text.chars().filter_map(|c| ALPHABET.find(c)) {
        bits = (bits.0 << 6 | u32::try_from(value).unwrap(), bits.1 + 6);
        if bits.1 >= 8 {
            bits.1 -= 8;
            bytes.push(u8::try_from(bits.0 >> bits.1 & 0xff).unwrap());
        }
    }
    bytes
}

#[tokio::test]
async fn a_path_or_method_that_does_not_exist_has_a_typed_error() {
    let server = Server::start().await;
    for path in ["/", "/index.html", "/v1", "/v1/nothing", "/subscriptions/a"] {
        server.get(path).await.refused(404, "RouteNotFound");
    }
    server.delete(&sandboxes()).await.refused(405, "MethodNotAllowed");
    server.put(path::NODE, "").await.refused(405, "MethodNotAllowed");
    let post = server.request(Method::POST, path::HEALTHZ).send().await.unwrap();
    Answer::of(post).await.refused(405, "MethodNotAllowed");
}

#[tokio::test]
async fn a_call_of_the_contract_that_is_not_carried_out_says_so() {
    let server = Server::start().await;
    let group = path::group(&crate::server::group());
    let sandbox = format!("{group}/sandboxes/aaaaaaaaaaaaaaaaaaaa");
    let posts = ["enable", "commit", "ports/add", "files/mkdir"];
    for call in posts {
        server.post(&format!("{sandbox}/{call}"), "").await.refused(404, "UnsupportedOperation");
    }
    for call in ["volumes", "volumes/a"] {
        server.get(&format!("{group}/{call}")).await.refused(404, "UnsupportedOperation");
    }
}

#[tokio::test]
async fn the_api_version_of_the_contract_or_none_is_accepted_and_no_other() {
    let server = Server::start().await;
    let known = format!("{}?api-version=2026-02-01-preview", sandboxes());
    assert_eq!(server.get(&known).await.status, 200);
    let other = format!("{}?api-version=2020-01-01", sandboxes());
    server.get(&other).await.refused(400, "UnsupportedApiVersion");
}

#[tokio::test]
async fn a_json_body_over_the_limit_is_refused_whether_or_not_its_length_was_said() {
    let server = Server::start().await;
    let body = vec![b' '; 2 * 1024 * 1024];
    server.put(&sandboxes(), body.clone()).await.refused(413, "BodyTooLarge");
    let pieces: Vec<_> = body.chunks(65_536).map(|c| Ok::<_, std::io::Error>(c.to_vec())).collect();
    let chunked = reqwest::Body::wrap_stream(stream::iter(pieces));
    server.put(&sandboxes(), chunked).await.refused(413, "BodyTooLarge");
}

#[tokio::test]
async fn a_request_id_or_a_query_that_cannot_be_worked_with_is_refused() {
    let server = Server::start().await;
    let long = "x".repeat(129);
    for id in ["", "a b", &long] {
        let request =
            server.request(Method::PUT, &sandboxes()).header("x-ms-client-request-id", id);
        let answer = Answer::of(request.body("{}").send().await.unwrap()).await;
        answer.refused(400, "InvalidRequest");
    }
    server.get(&format!("{}?labels=%ff", sandboxes())).await.refused(400, "InvalidRequest");
    let bad_path = sandboxes().replace("/default/", "/%ff/");
    server.get(&bad_path).await.refused(400, "InvalidRequest");
}

#[tokio::test]
async fn clients_that_say_nothing_keep_nobody_else_from_being_served() {
    let server = Server::prepared(|config| config.limits.connections_max = 3).await;
    let address = server.host();
    let connect = || TcpStream::connect(address.clone());
    // One that never begins TLS, one that begins it and stops.
    let mut silent = connect().await.unwrap();
    let mut half = connect().await.unwrap();
    half.write_all(&[22, 3, 1, 2, 0]).await.unwrap();
    assert_eq!(server.get(path::NODE).await.status, 200);
    let began = Instant::now();
    let mut rest = Vec::new();
    for stream in [&mut silent, &mut half] {
        // The server closes; whether by FIN or RST says nothing.
        let _ = stream.read_to_end(&mut rest).await;
    }
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    assert_eq!(server.get(path::NODE).await.status, 200);
}

/// A TLS connection that has sent `bytes`.
async fn connection(server: &Server, bytes: &[u8]) -> tokio_rustls::client::TlsStream<TcpStream> {
    use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(server.ca_pem().as_bytes()).unwrap()).unwrap();
    let config =
        rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
    let tcp = TcpStream::connect(server.host()).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let mut stream = connector.connect(name, tcp).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    stream.flush().await.unwrap();
    stream
}

/// What the server says until it closes, and how long that takes.
async fn rest(mut stream: tokio_rustls::client::TlsStream<TcpStream>) -> (String, Duration) {
    let (began, mut said) = (Instant::now(), Vec::new());
    // A close without TLS's own goodbye is one too.
    let _ = stream.read_to_end(&mut said).await;
    (String::from_utf8(said).unwrap(), began.elapsed())
}

#[tokio::test]
async fn a_client_that_stops_in_the_middle_or_stays_after_it_is_cut_off_in_time() {
    let server = Server::start().await;
    let head = format!(
        "PUT {} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 9\r\n\r\n{{",
        sandboxes()
    );
    let half_head = connection(&server, &head.as_bytes()[..60]).await;
    let half_body = connection(&server, head.as_bytes()).await;
    let idle = connection(&server, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await;
    let (half_head, half_body, idle) = tokio::join!(rest(half_head), rest(half_body), rest(idle));
    let limit = Duration::from_secs(75);
    assert!(half_head.1 < limit, "{half_head:?}");
    assert!(half_body.1 < limit && half_body.0.contains("BodyTimedOut"), "{half_body:?}");
    assert!(idle.1 < limit && idle.0.ends_with("ok\n"), "{idle:?}");
}

#[tokio::test]
async fn plain_http_is_not_spoken() {
    let server = Server::start().await;
    let mut stream = TcpStream::connect(server.host()).await.unwrap();
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
}

#[tokio::test]
async fn a_stop_ends_the_daemon_at_once_when_nobody_is_at_work_and_the_next_one_starts() {
    let server = Server::start().await;
    let before = server.ca_pem().to_owned();
    assert_eq!(server.get(path::NODE).await.status, 200);
    let began = Instant::now();
    let folder = server.stop().await;
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    let kept = fs_err::read_to_string(folder.path().join("state/tls/ca.pem")).unwrap();
    assert_eq!(kept, before);
}

#[tokio::test]
async fn what_changes_something_is_in_the_audit_log_and_no_token_is() {
    let server = Server::start().await;
    let id = "request-1";
    let request = server.request(Method::PUT, &sandboxes()).header("x-ms-client-request-id", id);
    let answer = Answer::of(request.body("{").send().await.unwrap()).await;
    answer.refused(400, "MalformedJson");
    server.get(&sandboxes()).await;
    let group = path::arm_group(&holdfast_api::model::GroupKey::new("s", "r", "g").unwrap());
    assert_eq!(server.put(&group, r#"{"location":"x"}"#).await.status, 201);
    let lines = server.audit();
    assert_eq!(lines.len(), 2, "{lines:?}");
    let [refused, made] = &lines[..] else { panic!() };
    assert_eq!(refused["who"], "admin");
    assert_eq!(refused["target"], sandboxes());
    assert_eq!((&refused["status"], &refused["error"]), (&400.into(), &"MalformedJson".into()));
    assert_eq!(refused["requestId"], id);
    assert!(refused["from"].as_str().unwrap().starts_with("127.0.0.1:"), "{refused}");
    assert!(made["what"].as_str().unwrap().starts_with("PUT /subscriptions/{sub}/"), "{made}");
    assert_eq!(made["status"], 201);
    assert!(!format!("{lines:?}").contains(TOKEN));
}

#[tokio::test]
async fn the_node_tells_what_it_is_and_has() {
    let server = Server::start().await;
    let node: holdfast_api::node::NodeInfo =
        serde_json::from_value(server.get(path::NODE).await.json()).unwrap();
    assert_eq!(node.version, env!("CARGO_PKG_VERSION"));
    assert!(node.os_release.contains_key("ID"), "{node:?}");
    assert!(node.memory_mib.capacity > 0.0 && node.memory_mib.reserved == 0.0, "{node:?}");
    assert!(node.disk_mib.total > 0 && node.memory_used_mib > 0, "{node:?}");
}

//! Rows C and D of the attack list that need a client of their own kind: sessions that are resumed,
//! certificates of clients, and frames of HTTP/2 as no library writes them.

use std::{
    io::{self, Read, Write},
    net::Ipv4Addr,
    sync::Arc,
    time::{Duration, Instant},
};

use holdfast_wire::egress::Verdict;
use rustls::{
    AlertDescription, ClientConfig, ConfigBuilder, HandshakeKind, RootCertStore, ServerConfig,
    client::WantsClientCert, pki_types::ServerName,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::rig::{
    ALLOWED, Answer, Authority, EVIL, REFERENCE, Rig, allow_hosts,
    client::{alert, exchange, get, http, https_get, tls, tls_with},
};

const OTHER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 15);
const NAME: &str = "own.wild.test";

fn client(roots: RootCertStore) -> ConfigBuilder<ClientConfig, WantsClientCert> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider);
    builder.with_safe_default_protocol_versions().unwrap().with_root_certificates(roots)
}

async fn connect(config: &Arc<ClientConfig>) -> io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect((OTHER, 443)).await?;
    let connector = TlsConnector::from(config.clone());
    connector.connect(ServerName::try_from(NAME).unwrap(), stream).await
}

/// One request, and whether a session from before would have let it go with the first message, and
/// how TLS began.
fn request_once(config: &Arc<ClientConfig>) -> (bool, HandshakeKind) {
    let name = ServerName::try_from(NAME).unwrap();
    let mut connection = rustls::ClientConnection::new(config.clone(), name).unwrap();
    let mut socket = std::net::TcpStream::connect((OTHER, 443)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let (request, mut answer) = (get(NAME, "/"), Vec::new());
    // It could send with its first message what the server must take before it knows who asks.
    let early = connection.early_data().is_some();
    let mut stream = rustls::Stream::new(&mut connection, &mut socket);
    stream.write_all(request.as_bytes()).unwrap();
    while !answer.ends_with(b"you asked /") {
        let mut buffer = [0; 4096];
        let count = stream.read(&mut buffer).unwrap();
        assert!(count > 0, "{}", String::from_utf8_lossy(&answer));
        answer.extend(&buffer[..count]);
    }
    (early, connection.handshake_kind().unwrap())
}

/// A rig with one server more, which is spoken to by HTTP/1.1.
fn with_server(inspection: &str, config: impl FnOnce(&Rig) -> ServerConfig) -> Rig {
    let rig = Rig::new(&allow_hosts(&["*.wild.test"], inspection));
    let mut config = config(&rig);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    rig.outside.address(OTHER);
    rig.outside.name(NAME, Answer::Address(OTHER.into()));
    rig.outside.tls(OTHER, 443, config);
    rig
}

#[test]
fn c16_no_session_is_resumed_in_what_is_opened_and_no_early_data_can_be_sent() {
    let server = |rig: &Rig| {
        let mut config = rig.outside.authority.server(&[NAME]);
        config.max_early_data_size = 4096;
        config
    };
    let second_time = |rig: &Rig, roots| {
        let mut config = client(roots).with_no_client_auth();
        config.enable_early_data = true;
        let config = Arc::new(config);
        rig.in_guest(|| {
            request_once(&config);
            request_once(&config)
        })
    };
    let passed = with_server("Partial", server);
    let web = passed.outside.authority.roots();
    assert_eq!(second_time(&passed, web), (true, HandshakeKind::Resumed));
    let opened = with_server("Full", server);
    assert_eq!(second_time(&opened, opened.ca.roots()), (false, HandshakeKind::Full));
}

#[test]
fn c17_a_server_that_wants_a_clients_certificate_gets_it_where_tls_is_passed_and_is_named_elsewhere()
 {
    let clients = Authority::new("clients");
    let server = |rig: &Rig| rig.outside.authority.server_to(&[NAME], Some(clients.roots()));
    let ask = |rig: &Rig, roots| {
        let (chain, key) = clients.identity(&["client.test"]);
        let config = Arc::new(client(roots).with_client_auth_cert(chain, key).unwrap());
        rig.guest(async move {
            let mut stream = connect(&config).await.unwrap();
            exchange(&mut stream, &get(NAME, "/")).await.unwrap().0
        })
    };
    let passed = with_server("Partial", server);
    assert_eq!(ask(&passed, passed.outside.authority.roots()), 200);
    let opened = with_server("Full", server);
    assert_eq!(ask(&opened, opened.ca.roots()), 502);
    let failed = opened.decision("failed", |it| it.verdict == Verdict::Failed);
    assert_eq!(
        (failed.host.as_str(), failed.reason.as_str()),
        (NAME, "client_cert_under_inspection")
    );
    assert!(opened.outside.seen(OTHER, 443).requests.is_empty());
}

#[test]
fn c25_no_certificate_is_made_for_a_denied_name_and_none_is_believed_in_another_group() {
    let rig = Rig::new(REFERENCE);
    let shake = |name: &'static str, roots| {
        rig.guest(async move { tls(ALLOWED, name, roots).await.map(drop) })
    };
    for _ in 0..5 {
        let refused = shake("evil.test", rig.ca.roots()).unwrap_err();
        assert_eq!(alert(&refused), Some(AlertDescription::AccessDenied), "{refused}");
    }
    assert_eq!(rig.stats().minted, 0);
    assert!(shake("allowed.test", rig.ca.roots()).is_ok());
    assert_eq!(rig.stats().minted, 1);
    let other = Rig::new(REFERENCE);
    assert!(shake("allowed.test", other.ca.roots()).is_err());
}

/// A header field of HTTP/2 as it stands: no table, no compression.
fn field(name: &str, value: &[u8]) -> Vec<u8> {
    let length = |length: usize| u8::try_from(length).unwrap();
    [&[0, length(name.len())], name.as_bytes(), &[length(value.len())], value].concat()
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const END_OF_STREAM: u8 = 1;
const END_OF_HEADERS: u8 = 4;
const END_OF_STREAM_AND_HEADERS: u8 = 5;

fn request(path: &[u8], more: &[u8]) -> Vec<u8> {
    let mut block = field(":method", b"GET");
    block.extend(field(":scheme", b"https"));
    block.extend(field(":authority", NAME.as_bytes()));
    block.extend(field(":path", path));
    block.extend(more);
    block
}

/// The next frame that is about a stream or the end: its kind, flags, stream, and payload.
async fn next(stream: &mut TlsStream<TcpStream>) -> io::Result<(u8, u8, u32, Vec<u8>)> {
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; usize::try_from(length).unwrap()];
        stream.read_exact(&mut payload).await?;
        let number = u32::from_be_bytes(head[5..].try_into().unwrap());
        if [HEADERS, RST_STREAM, GOAWAY].contains(&head[3]) {
            return Ok((head[3], head[4], number, payload));
        }
    }
}

async fn open(roots: RootCertStore) -> TlsStream<TcpStream> {
    let mut stream = tls_with(OTHER, 443, NAME, roots, &["h2"]).await.unwrap();
    stream.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()).await.unwrap();
    stream
}

#[test]
fn d8_what_would_be_two_requests_or_two_headers_in_http_1_is_reset() {
    let rig = with_server("Full", |rig| rig.outside.authority.server(&[NAME]));
    let sent = |block: Vec<u8>| {
        let roots = rig.ca.roots();
        rig.guest(async move {
            let mut stream = open(roots).await;
            stream.write_all(&frame(HEADERS, END_OF_STREAM_AND_HEADERS, 1, &block)).await.unwrap();
            next(&mut stream).await.map(|(kind, _, _, payload)| (kind, payload))
        })
    };
    let (kind, _) = sent(request(b"/", &field("x-plain", b"1"))).unwrap();
    assert_eq!(kind, HEADERS);
    let before = rig.outside.seen(OTHER, 443).requests;
    assert_eq!(before.len(), 1);
    assert!(before[0].2.contains(&("x-plain".into(), "1".into())));
    for (what, block) in [
        ("CRLF in a value", request(b"/", &field("x", b"a\r\nx-injected: 1"))),
        ("LF in a value", request(b"/", &field("x", b"a\nx-injected: 1"))),
        ("NUL in a value", request(b"/", &field("x", b"a\0b"))),
        ("colon in a name", request(b"/", &field("x: 1\r\ny", b"1"))),
        ("capitals in a name", request(b"/", &field("X-Plain", b"1"))),
        ("space in a name", request(b"/", &field("x y", b"1"))),
        ("transfer-encoding", request(b"/", &field("transfer-encoding", b"chunked"))),
        ("connection", request(b"/", &field("connection", b"x-plain"))),
        ("space in the path", request(b"/a HTTP/1.1", &[])),
        ("CRLF in the path", request(b"/ HTTP/1.1\r\nx-injected: 1\r\n\r\nGET /", &[])),
        ("a second path", request(b"/", &field(":path", b"/admin"))),
        (
            "a pseudo-header behind others",
            request(b"/", &[field("x", b"1"), field(":path", b"/b")].concat()),
        ),
        ("an unknown pseudo-header", request(b"/", &field(":protocol", b"x"))),
    ] {
        match sent(block) {
            // PROTOCOL_ERROR in the one or the other.
            Ok((RST_STREAM, payload)) => assert_eq!(payload, [0, 0, 0, 1], "{what}"),
            Ok((GOAWAY, payload)) => assert_eq!(payload[4..8], [0, 0, 0, 1], "{what}"),
            Ok((kind, payload)) => {
                // Our own answer is as good: 400 is in the table of HPACK.
                assert_eq!((kind, payload.first()), (HEADERS, Some(&0x8c)), "{what}");
            }
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{what}"),
        }
        assert_eq!(rig.outside.seen(OTHER, 443).requests.len(), 1, "{what} went on");
    }
}

#[test]
fn d14_a_head_of_http_2_that_does_not_end_is_given_10_seconds() {
    let rig = with_server("Full", |rig| rig.outside.authority.server(&[NAME]));
    let roots = rig.ca.roots();
    let (kind, took) = rig.guest(async move {
        let begin = frame(HEADERS, END_OF_STREAM, 1, &request(b"/", &[]));
        // The same in two frames that come at once.
        let mut whole = open(roots.clone()).await;
        let end = frame(CONTINUATION, END_OF_HEADERS, 1, &field("x", b"1"));
        whole.write_all(&[&begin[..], &end].concat()).await.unwrap();
        let (kind, ..) = next(&mut whole).await.unwrap();

        // Of frames there is a limit: byte by byte it takes the longest.
        let mut slow = open(roots).await;
        let endless = &frame(CONTINUATION, END_OF_HEADERS, 1, &[0; 1000])[..9];
        slow.write_all(&[&begin[..], endless].concat()).await.unwrap();
        let began = Instant::now();
        loop {
            tokio::select! {
                told = next(&mut slow) => {
                    assert!(matches!(told, Ok((GOAWAY, ..)) | Err(_)), "it was answered: {told:?}");
                    break;
                }
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
            }
            if slow.write_all(&[0]).await.is_err() {
                break;
            }
        }
        (kind, began.elapsed())
    });
    assert_eq!(kind, HEADERS, "what is whole is answered");
    assert!((9..20).contains(&took.as_secs()), "{took:?}");
    assert_eq!(rig.outside.seen(OTHER, 443).requests.len(), 1);
}

#[test]
fn d5_connect_is_refused_in_http_2_in_its_extended_form_too() {
    let rig = with_server("Full", |rig| rig.outside.authority.server(&[NAME]));
    let (get, target) = (b"GET".as_slice(), b"evil.test:443".as_slice());
    let block = |method: &[u8], fields: &[(&str, &[u8])]| {
        let mut block = field(":method", method);
        block.extend(fields.iter().flat_map(|(name, value)| field(name, value)));
        block
    };
    let whole =
        [(":scheme", b"https".as_slice()), (":path", b"/"), (":authority", NAME.as_bytes())];
    let extended = [&whole[..], &[(":protocol", b"websocket")]].concat();
    let sent = |block: Vec<u8>| {
        let roots = rig.ca.roots();
        rig.guest(async move {
            let mut stream = open(roots).await;
            stream.write_all(&frame(HEADERS, END_OF_HEADERS, 1, &block)).await.unwrap();
            stream.write_all(&frame(0, END_OF_STREAM, 1, &[])).await.unwrap();
            next(&mut stream).await
        })
    };
    let (kind, _, _, payload) = sent(block(get, &whole)).unwrap();
    assert_eq!((kind, payload.first()), (HEADERS, Some(&0x88)), "what is no CONNECT is answered");
    for (what, block) in [
        ("CONNECT", block(b"CONNECT", &[(":authority", target)])),
        ("CONNECT to the host itself", block(b"CONNECT", &whole[2..])),
        ("extended CONNECT", block(b"CONNECT", &extended)),
    ] {
        match sent(block) {
            // Ours says 405, which is not in the table of HPACK; 400 and 421 neither pass it on.
            Ok((HEADERS, _, _, payload)) => assert_ne!(payload.first(), Some(&0x88), "{what}"),
            Ok((kind, ..)) => assert!([RST_STREAM, GOAWAY].contains(&kind), "{what}: {kind}"),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{what}"),
        }
    }
    let seen = rig.outside.seen(OTHER, 443);
    assert!(seen.requests.iter().all(|(method, ..)| method == "GET"), "{:?}", seen.requests);
    assert_eq!(seen.requests.len(), 1);
    rig.outside.evil_saw_nothing();
}

fn resident_kib(rig: &Rig) -> usize {
    let status = fs_err::read_to_string(format!("/proc/{}/status", rig.program_id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn d13_heads_without_end_are_refused_and_cost_no_memory() {
    let rig = Rig::new(REFERENCE);
    let before = resident_kib(&rig);
    let head = |rest: &str| format!("GET / HTTP/1.1\r\nHost: allowed.test\r\n{rest}\r\n");
    assert_eq!(rig.guest(http(ALLOWED, &head("X: x\r\n"))).unwrap().0, 200);
    for (what, request) in [
        ("a header of 1 MiB", head(&format!("X: {}\r\n", "x".repeat(1 << 20)))),
        ("10 000 headers", head(&"X: x\r\n".repeat(10_000))),
        (
            "a path of 80 KiB",
            format!("GET /{} HTTP/1.1\r\nHost: allowed.test\r\n\r\n", "x".repeat(80 << 10)),
        ),
        (
            "a method of 10 KiB",
            format!("{} / HTTP/1.1\r\nHost: allowed.test\r\n\r\n", "X".repeat(10 << 10)),
        ),
    ] {
        // What it had still to say when it was refused may turn the answer into a reset.
        match rig.guest(http(ALLOWED, &request)) {
            Ok((status, body)) => assert!([400, 414, 431].contains(&status), "{what}: {body}"),
            Err(error) => assert_ne!(error.kind(), io::ErrorKind::TimedOut, "{what}"),
        }
    }
    assert_eq!(rig.outside.seen(ALLOWED, 80).requests.len(), 1);
    assert!(resident_kib(&rig) < before + 8 * 1024);
}

#[test]
fn d13_floods_of_http_2_are_cut_or_wait_and_cost_no_memory() {
    let rig = with_server("Full", |rig| rig.outside.authority.server(&[NAME]));
    let roots = rig.ca.roots();
    assert_eq!(rig.guest(https_get(OTHER, NAME, "/", roots)).unwrap().0, 200);
    let before = resident_kib(&rig);
    let block = request(b"/", &[]);
    let asks = |number: u32| {
        let stream = number * 2 + 1;
        let begun = frame(HEADERS, END_OF_STREAM_AND_HEADERS, stream, &block);
        [begun, frame(RST_STREAM, 0, stream, &[0, 0, 0, 8])].concat()
    };
    // A table that is told to grow, and then one reference to it after the other.
    let large = [&[0x40, 1, b'x', 0x7f, 0x80, 0x1f][..], &[b'y'; 4095]].concat();
    let bomb = [request(b"/", &large), vec![0xbe; 12_000]].concat();
    let mut endless = frame(HEADERS, 1, 1, &block);
    endless.extend(frame(
        CONTINUATION,
        0,
        1,
        &[&[0, 1, b'x', 0x7f, 0x81, 0x7e][..], &[b'y'; 16_000]].concat(),
    ));
    let never: Vec<u8> = frame(CONTINUATION, 0, 1, &[b'y'; 16_000]);
    for (what, first, again, times) in [
        ("continuations", endless, never, 4000),
        ("streams that are reset at once", Vec::new(), (0..20_000).flat_map(asks).collect(), 1),
        (
            "a bomb of references",
            frame(HEADERS, END_OF_STREAM_AND_HEADERS, 1, &bomb),
            Vec::new(),
            0,
        ),
        ("pings", Vec::new(), frame(PING, 0, 0, &[7; 8]).repeat(1000), 200),
        ("settings", Vec::new(), frame(SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0]).repeat(1000), 200),
    ] {
        let roots = rig.ca.roots();
        let ended = rig.guest(async {
            let mut stream = open(roots).await;
            let flood = async {
                stream.write_all(&first).await?;
                for _ in 0..times {
                    stream.write_all(&again).await?;
                }
                // It does not read what it is answered: there is an end, or no more is taken.
                next(&mut stream).await.map(|(kind, ..)| kind)
            };
            timeout(Duration::from_secs(10), flood).await
        });
        if let Ok(Ok(kind)) = ended {
            assert_ne!(kind, 0, "{what}");
        }
        let after = resident_kib(&rig);
        assert!(after < before + 12 * 1024, "{what}: {before} KiB, then {after}");
        // Everybody else is served.
        let roots = rig.ca.roots();
        assert_eq!(rig.guest(https_get(OTHER, NAME, "/", roots)).unwrap().0, 200, "{what}");
    }
    // Of the streams that were reset next to nothing has gone on to the server.
    let requests = rig.outside.seen(OTHER, 443).requests.len();
    assert!(requests < 1000, "{requests}");
}

#[test]
fn e13_what_looks_like_the_place_of_a_secret_is_text() {
    let rig = Rig::new(REFERENCE);
    let body = "{value} ${token} {{secrets.token}}";
    let request = format!(
        "POST /?q={{value}} HTTP/1.1\r\nHost: allowed.test\r\nX-Mine: Bearer {{value}}\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let (status, answer) = rig.guest(http(EVIL, &request)).unwrap();
    assert_eq!(status, 200);
    assert!(answer.ends_with(body) && !answer.contains(crate::rig::SECRET), "{answer}");
    let (_, target, headers) = rig.outside.seen(ALLOWED, 80).requests[0].clone();
    assert_eq!(target, "/?q={value}");
    assert!(headers.contains(&("x-mine".into(), "Bearer {value}".into())), "{headers:?}");
}

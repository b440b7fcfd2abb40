//! Servers, all in one namespace and on one thread, and what they have seen.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::{IpAddr, Ipv4Addr},
    os::fd::AsFd,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer},
    server::WebPkiClientVerifier,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, UdpSocket},
    runtime::Handle,
};
use tokio_rustls::TlsAcceptor;

use super::{ALLOWED, API, DATABASE, EVIL, Namespace, PROXY, RESOLVER, WILD, run};

/// A certificate authority.
pub(crate) struct Authority {
    cert: rcgen::Certificate,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let cert = params.self_signed(&key).unwrap();
        Self { cert, issuer: Issuer::new(params, key) }
    }

    pub(crate) fn pem(&self) -> String {
        self.cert.pem()
    }

    pub(crate) fn key_pem(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    pub(crate) fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(self.cert.der().clone()).unwrap();
        roots
    }

    /// A certificate for these names and its key, as PEM.
    pub(crate) fn pair(&self, names: &[&str]) -> String {
        let key = KeyPair::generate().unwrap();
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let leaf = CertificateParams::new(names).unwrap().signed_by(&key, &self.issuer).unwrap();
        format!("{}{}{}", leaf.pem(), self.cert.pem(), key.serialize_pem())
    }

    /// A certificate for these names with its key.
    pub(crate) fn identity(
        &self,
        names: &[&str],
    ) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        self.identity_with(names, |_| {})
    }

    fn identity_with(
        &self,
        names: &[&str],
        change: impl FnOnce(&mut CertificateParams),
    ) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate().unwrap();
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        change(&mut params);
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        (vec![leaf.der().clone()], PrivateKeyDer::try_from(key.serialize_der()).unwrap())
    }

    /// A server with a certificate for these names.
    pub(crate) fn server(&self, names: &[&str]) -> rustls::ServerConfig {
        self.server_to(names, None)
    }

    /// A server that lets in only whom one of `clients` vouches for.
    pub(crate) fn server_to(
        &self,
        names: &[&str],
        clients: Option<RootCertStore>,
    ) -> rustls::ServerConfig {
        Self::server_as(self.identity(names), clients)
    }

    /// A server whose certificate was good until some years ago.
    pub(crate) fn expired_server(&self, names: &[&str]) -> rustls::ServerConfig {
        let expired = self.identity_with(names, |params| {
            params.not_before = rcgen::date_time_ymd(2020, 1, 1);
            params.not_after = rcgen::date_time_ymd(2021, 1, 1);
        });
        Self::server_as(expired, None)
    }

    fn server_as(
        (chain, key): (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>),
        clients: Option<RootCertStore>,
    ) -> rustls::ServerConfig {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = match clients {
            None => WebPkiClientVerifier::no_client_auth(),
            Some(roots) => {
                let roots = Arc::new(roots);
                let builder = WebPkiClientVerifier::builder_with_provider(roots, provider.clone());
                builder.build().unwrap()
            }
        };
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        config
    }
}

/// Names and values, as they came.
type Headers = Vec<(String, String)>;

/// What a server got.
#[derive(Debug, Clone, Default)]
pub(crate) struct Seen {
    pub(crate) connections: u64,
    /// Of connections that are not HTTP, and of those to the attacker.
    pub(crate) bytes: Vec<u8>,
    /// Requests: method, path and query, headers.
    pub(crate) requests: Vec<(String, String, Headers)>,
}

type Zone = HashMap<String, Vec<Answer>>;

/// What the resolver says to a name.
#[derive(Debug, Clone)]
pub(crate) enum Answer {
    Address(IpAddr),
    Alias(String),
    Text(String),
}

#[derive(Default)]
struct Notes {
    seen: Mutex<HashMap<(IpAddr, u16), Seen>>,
    zone: Mutex<Zone>,
    /// Names asked for, in lower case.
    asked: Mutex<Vec<String>>,
    ttl: AtomicU64,
}

pub(crate) struct Outside {
    namespace: Namespace,
    pub(crate) authority: Authority,
    notes: Arc<Notes>,
    runtime: Handle,
}

impl Outside {
    pub(super) fn new(namespace: Namespace) -> Self {
        let name = &namespace.name;
        for address in [ALLOWED, WILD, API, EVIL, DATABASE, RESOLVER, PROXY] {
            run(&format!("ip -n {name} addr add {address}/32 dev lo"));
        }
        let (tell, told) = std::sync::mpsc::channel();
        let file = namespace.file.file().try_clone().unwrap();
        thread::spawn(move || {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            let mut builder = tokio::runtime::Builder::new_current_thread();
            let runtime = builder.enable_all().build().unwrap();
            tell.send(runtime.handle().clone()).unwrap();
            runtime.block_on(std::future::pending::<()>());
        });
        let runtime = told.recv().unwrap();
        let outside =
            Self { namespace, authority: Authority::new("web"), notes: Arc::default(), runtime };
        outside.notes.ttl.store(60, Ordering::Relaxed);
        for (name, address) in [
            ("allowed.test", ALLOWED),
            ("a.wild.test", WILD),
            ("api.test", API),
            ("evil.test", EVIL),
            ("proxy.site.test", PROXY),
        ] {
            outside.name(name, Answer::Address(address.into()));
        }
        outside.resolver();
        outside.web(ALLOWED, &["allowed.test"]);
        outside.web(WILD, &["*.wild.test"]);
        outside.web(API, &["api.test"]);
        for port in [22, 53, 80, 443, 853, 8443] {
            outside.attacker(EVIL, port);
        }
        outside.echo(DATABASE, 5432);
        outside
    }

    pub(super) fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Starts something that listens, and waits until it does.
    fn start<F>(&self, server: impl FnOnce() -> F + Send + 'static)
    where
        F: Future<Output = Box<dyn FnOnce() + Send>> + Send + 'static,
    {
        let (tell, told) = std::sync::mpsc::channel();
        self.runtime.spawn(async move {
            let go_on = server().await;
            tell.send(()).unwrap();
            go_on();
        });
        told.recv_timeout(Duration::from_secs(10)).expect("the server listens");
    }

    /// Accepts at an address, and gives every connection to `serve`.
    fn listen<F>(
        &self,
        address: Ipv4Addr,
        port: u16,
        serve: impl Fn(tokio::net::TcpStream) -> F + Send + 'static,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        let notes = self.notes.clone();
        self.start(move || async move {
            let listener = TcpListener::bind((address, port)).await.unwrap();
            let accept = async move {
                while let Ok((stream, _)) = listener.accept().await {
                    notes.at(address, port, |seen| seen.connections += 1);
                    tokio::spawn(serve(stream));
                }
            };
            Box::new(move || drop(tokio::spawn(accept))) as Box<dyn FnOnce() + Send>
        });
    }

    /// One more address that servers can listen at.
    pub(crate) fn address(&self, address: Ipv4Addr) {
        run(&format!("ip -n {} addr add {address}/32 dev lo", self.namespace.name));
    }

    pub(crate) fn name(&self, name: &str, answer: Answer) {
        self.notes.zone.lock().unwrap().entry(name.to_owned()).or_default().push(answer);
    }

    pub(crate) fn rename(&self, name: &str, answer: Answer) {
        self.notes.zone.lock().unwrap().insert(name.to_owned(), vec![answer]);
    }

    pub(crate) fn ttl(&self, seconds: u64) {
        self.notes.ttl.store(seconds, Ordering::Relaxed);
    }

    pub(crate) fn asked(&self) -> Vec<String> {
        self.notes.asked.lock().unwrap().clone()
    }

    pub(crate) fn seen(&self, address: Ipv4Addr, port: u16) -> Seen {
        let seen = self.notes.seen.lock().unwrap();
        seen.get(&(address.into(), port)).cloned().unwrap_or_default()
    }

    /// Nothing has come to any port of the attacker's.
    pub(crate) fn evil_saw_nothing(&self) {
        let seen = self.notes.seen.lock().unwrap();
        let evil: Vec<_> = seen.iter().filter(|((address, _), _)| *address == EVIL).collect();
        assert!(evil.iter().all(|(_, seen)| seen.connections == 0), "{evil:?}");
    }

    /// Answers requests on 80 and, for these names, on 443, by what it got.
    fn web(&self, address: Ipv4Addr, names: &[&str]) {
        let notes = self.notes.clone();
        self.listen(address, 80, move |stream| http(stream, notes.clone(), (address, 80)));
        self.tls(address, 443, self.authority.server(names));
    }

    pub(crate) fn tls(&self, address: Ipv4Addr, port: u16, config: rustls::ServerConfig) {
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let notes = self.notes.clone();
        self.listen(address, port, move |stream| {
            let (acceptor, notes) = (acceptor.clone(), notes.clone());
            async move {
                if let Ok(stream) = acceptor.accept(stream).await {
                    if stream.get_ref().1.alpn_protocol() == Some(b"h2") {
                        http2(stream, notes, (address, port)).await;
                    } else {
                        http(stream, notes, (address, port)).await;
                    }
                }
            }
        });
    }

    /// Notes every byte and answers none.
    fn attacker(&self, address: Ipv4Addr, port: u16) {
        let notes = self.notes.clone();
        self.listen(address, port, move |mut stream| {
            let notes = notes.clone();
            async move {
                let mut buffer = [0; 4096];
                while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                    notes.at(address, port, |seen| seen.bytes.extend(&buffer[..count]));
                }
            }
        });
    }

    /// Sends back what it gets, and notes it.
    pub(crate) fn echo(&self, address: Ipv4Addr, port: u16) {
        let notes = self.notes.clone();
        self.listen(address, port, move |mut stream| {
            let notes = notes.clone();
            async move {
                let mut buffer = vec![0; 65_536];
                while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                    notes.at(address, port, |seen| seen.bytes.extend(&buffer[..count]));
                    if stream.write_all(&buffer[..count]).await.is_err() {
                        break;
                    }
                }
            }
        });
    }

    /// Speaks first.
    pub(crate) fn greeter(&self, address: Ipv4Addr, port: u16) {
        self.listen(address, port, |mut stream| async move {
            let _ = stream.write_all(b"220 hello\r\n").await;
            let _ = stream.read(&mut [0; 64]).await;
        });
    }

    /// Serves with whatever the test wants.
    pub(crate) fn custom<F>(
        &self,
        address: Ipv4Addr,
        port: u16,
        serve: impl Fn(tokio::net::TcpStream) -> F + Send + 'static,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        self.listen(address, port, serve);
    }

    fn resolver(&self) {
        let notes = self.notes.clone();
        self.start(move || async move {
            let socket = UdpSocket::bind((RESOLVER, 53)).await.unwrap();
            let serve = async move {
                let mut buffer = [0; 1024];
                while let Ok((count, from)) = socket.recv_from(&mut buffer).await {
                    let answer = notes.resolve(&buffer[..count], 1232);
                    let _ = socket.send_to(&answer, from).await;
                }
            };
            Box::new(move || drop(tokio::spawn(serve))) as Box<dyn FnOnce() + Send>
        });
        let notes = self.notes.clone();
        self.listen(RESOLVER, 53, move |mut stream| {
            let notes = notes.clone();
            async move {
                let Ok(length) = stream.read_u16().await else { return };
                let mut query = vec![0; length.into()];
                let _ = stream.read_exact(&mut query).await;
                let answer = notes.resolve(&query, 65_535);
                let length = u16::try_from(answer.len()).unwrap();
                let _ = stream.write_all(&[&length.to_be_bytes(), &answer[..]].concat()).await;
            }
        });
    }
}

impl Notes {
    fn at(&self, address: Ipv4Addr, port: u16, note: impl FnOnce(&mut Seen)) {
        note(self.seen.lock().unwrap().entry((address.into(), port)).or_default());
    }

    fn resolve(&self, query: &[u8], bytes_max: usize) -> Vec<u8> {
        let (name, end) = read_name(query);
        let kind = u16::from_be_bytes([query[end], query[end + 1]]);
        let lower = name.to_ascii_lowercase();
        self.asked.lock().unwrap().push(lower.clone());
        let zone = self.zone.lock().unwrap();
        let ttl = u32::try_from(self.ttl.load(Ordering::Relaxed)).unwrap();
        let (mut records, mut current) = (Vec::new(), lower);
        let known = zone.contains_key(&current);
        for _ in 0..9 {
            let mut alias = None;
            for answer in zone.get(&current).into_iter().flatten() {
                let (own, data) = match answer {
                    Answer::Address(IpAddr::V4(v4)) => (1, v4.octets().to_vec()),
                    Answer::Address(IpAddr::V6(v6)) => (28, v6.octets().to_vec()),
                    Answer::Alias(to) => {
                        alias = Some(to.clone());
                        (5, write_name(to))
                    }
                    Answer::Text(text) => {
                        (16, [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat())
                    }
                };
                if own == kind || own == 5 {
                    let mut record = write_name(&current);
                    record.extend(u16::to_be_bytes(own));
                    record.extend([0, 1]);
                    record.extend(ttl.to_be_bytes());
                    record.extend(u16::try_from(data.len()).unwrap().to_be_bytes());
                    record.extend(data);
                    records.push(record);
                }
            }
            match alias {
                Some(to) => current = to,
                None => break,
            }
        }
        let size = end + 4 + records.iter().map(Vec::len).sum::<usize>();
        let cut = size > bytes_max;
        let mut out = query[..2].to_vec();
        out.extend([if cut { 0x83 } else { 0x81 }, if known { 0x80 } else { 0x83 }, 0, 1]);
        let count = if cut { 0 } else { records.len() };
        out.extend(u16::try_from(count).unwrap().to_be_bytes());
        out.extend([0; 4]);
        out.extend(&query[12..end + 4]);
        if !cut {
            out.extend(records.concat());
        }
        out
    }
}

/// The name of a query's question, and where it ends.
fn read_name(query: &[u8]) -> (String, usize) {
    let (mut name, mut at) = (String::new(), 12);
    while query[at] != 0 {
        let length = usize::from(query[at]);
        if !name.is_empty() {
            name.push('.');
        }
        name.push_str(&String::from_utf8_lossy(&query[at + 1..at + 1 + length]));
        at += 1 + length;
    }
    (name, at + 1)
}

pub(crate) fn write_name(name: &str) -> Vec<u8> {
    let mut out = Vec::new();
    for label in name.split('.').filter(|label| !label.is_empty()) {
        out.push(u8::try_from(label.len()).unwrap());
        out.extend(label.as_bytes());
    }
    out.push(0);
    out
}

async fn http<S>(stream: S, notes: Arc<Notes>, at: (Ipv4Addr, u16))
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request| respond(request, notes.clone(), at));
    let connection =
        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    let _ = connection.with_upgrades().await;
}

async fn http2<S>(stream: S, notes: Arc<Notes>, at: (Ipv4Addr, u16))
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request| respond(request, notes.clone(), at));
    let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

/// Notes a request, and sends its body back; a WebSocket becomes an echo.
async fn respond(
    mut request: Request<Incoming>,
    notes: Arc<Notes>,
    (address, port): (Ipv4Addr, u16),
) -> Result<Response<Full<Bytes>>, Infallible> {
    let target = request.uri().path_and_query().map(ToString::to_string).unwrap_or_default();
    let text =
        |value: &hyper::header::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let mut headers: Vec<_> =
        request.headers().iter().map(|(name, value)| (name.to_string(), text(value))).collect();
    headers.extend(request.uri().authority().map(|it| (":authority".into(), it.to_string())));
    let method = request.method().to_string();
    notes.at(address, port, |seen| seen.requests.push((method, target.clone(), headers)));
    if request.headers().contains_key("upgrade") {
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let Ok(stream) = upgrade.await else { return };
            let mut stream = TokioIo::new(stream);
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                notes.at(address, port, |seen| seen.bytes.extend(&buffer[..count]));
                if stream.write_all(&buffer[..count]).await.is_err() {
                    break;
                }
            }
        });
        let response = Response::builder()
            .status(101)
            .header("connection", "upgrade")
            .header("upgrade", "websocket")
            .body(Full::default());
        return Ok(response.unwrap());
    }
    if let Some(count) = target.strip_prefix("/zeros/").and_then(|it| it.parse::<usize>().ok()) {
        return Ok(Response::new(Full::new(Bytes::from(vec![0; count << 20]))));
    }
    let body = request.into_body().collect().await.map(|it| it.to_bytes()).unwrap_or_default();
    let mut builder = Response::builder().header("alt-svc", "h3=\":443\"").header("x-own", "1");
    if target.starts_with("/redirect") {
        builder = builder.status(302).header("location", "https://evil.test/");
    }
    let content = if body.is_empty() { Bytes::from(format!("you asked {target}")) } else { body };
    Ok(builder.body(Full::new(content)).unwrap())
}

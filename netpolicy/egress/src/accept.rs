//! A guest's connections: what they are is seen in their first bytes, where they may go is judged
//! by the name in them, and without a name by the address they were meant for.

use std::{
    future::poll_fn,
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{Arc, atomic::Ordering::Relaxed},
    task::{Poll, ready},
    time::{Duration, Instant},
};

use holdfast_netpolicy::{self as netpolicy, HostName, Outcome, Protocol, RuleRef};
use holdfast_wire::egress::{Kind, Verdict};
use tokio::{
    io::{AsyncRead, ReadBuf},
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};

use crate::{
    dial::{Destination, DialError, dial},
    dns::server::serve_tcp,
    http,
    proxy::Line,
    relay::{left_of, relay, with_scratch},
    sandbox::{
        Because, Handshake, Sandbox, Subject,
        flow::{Claim, Flow},
        turns,
    },
    setup::Setup,
    socket::Socket,
    tls::hello::{self, BadHello, HELLO_BYTES_MAX, Hello},
};

/// How long a guest may take until its first message is whole.
const FIRST_MESSAGE_TIME_MAX: Duration = Duration::from_secs(5);
/// How long we wait for the guest to say what it speaks where the policy lets through what we know
/// nothing of: in some protocols the server speaks first.
const SERVER_FIRST_WAIT: Duration = Duration::from_millis(300);
/// A wait after an accept that failed for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);
/// Bytes in which a request must show that it is one.
const METHOD_BYTES_MAX: usize = 33;
/// First byte of whoever begins with TLS.
const TLS_HANDSHAKE: u8 = 22;
const DNS_PORT: u16 = 53;
const WEB_PORTS: [u16; 2] = [80, 443];

/// Accepts until the task is aborted.
pub(crate) async fn serve(sandbox: Arc<Sandbox>, listener: TcpListener) {
    loop {
        // Connections that came in while other sandboxes had their turns would all be begun, or
        // refused, in one go.
        turns::pause().await;
        match listener.accept().await {
            Ok((stream, _)) => begin(&sandbox, stream),
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                log::warn!(sandbox:% = sandbox.id, error:%; "a connection is not accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn begin(sandbox: &Arc<Sandbox>, stream: TcpStream) {
    let setup = sandbox.group.setup();
    // The socket is bound to what the guest connected to.
    let original = stream.local_addr();
    let flow = sandbox.open(setup.limits.connections);
    let (Ok(original), Some(flow)) = (original, flow) else {
        let _ = stream.set_zero_linger();
        return;
    };
    let socket = Socket::of_guest(stream, flow.clone());
    let original = SocketAddr::new(original.ip().to_canonical(), original.port());
    sandbox.group.tick();
    let guest = Guest { flow: flow.clone(), setup, original };
    flow.spawn(async move {
        if let Err(error) = guest.serve(socket).await {
            log::trace!(sandbox:% = guest.flow.sandbox.id, error:%; "a connection failed");
        }
    });
}

/// What is known of a connection before its first byte.
pub(crate) struct Guest {
    pub(crate) flow: Arc<Flow>,
    pub(crate) setup: Arc<Setup>,
    /// Where the guest meant it to go.
    pub(crate) original: SocketAddr,
}

/// What the first bytes of a connection are.
enum First {
    Tls(Hello),
    BadTls(BadHello),
    Http,
    Other,
    /// Not enough of them came in time, or the guest has closed.
    Nothing,
}

/// A judgement over a tunnel.
struct Ruled {
    outcome: Ruling,
    because: Because,
    by_rule: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Ruling {
    Allow,
    Deny,
    Open,
}

impl Guest {
    async fn serve(&self, mut socket: Socket) -> io::Result<()> {
        let sandbox = &self.flow.sandbox;
        // What is large and seldom is on the heap: every idle tunnel keeps the rest of this.
        if self.original.port() == DNS_PORT {
            return Box::pin(serve_tcp(sandbox, socket)).await;
        }
        let Some(handshake) = Handshake::begin(sandbox, self.setup.limits.handshakes) else {
            return Ok(());
        };
        let raw = self.judge_raw();
        let web = WEB_PORTS.contains(&self.original.port());
        if !web && raw.by_rule {
            // A rule speaks of the address: nothing in the connection matters.
            drop(handshake);
            return self.tunnel_raw(socket, Vec::new(), raw).await;
        }
        let patience = if !web && raw.outcome == Ruling::Allow {
            SERVER_FIRST_WAIT
        } else {
            FIRST_MESSAGE_TIME_MAX
        };
        let mut bytes = Vec::new();
        match self.first(&mut socket, &mut bytes, patience).await? {
            First::Tls(hello) => self.tls(socket, bytes, hello, handshake).await,
            First::BadTls(error) => {
                let because = Because::own(raw.because.generation, error.reason());
                self.deny(Kind::Tls, &because, self.original.ip().to_string());
                alert(socket, error.alert()).await
            }
            First::Http => {
                drop(handshake);
                Box::pin(http::serve_plain(self, socket, bytes)).await
            }
            First::Other => {
                drop(handshake);
                self.tunnel_raw(socket, bytes, raw).await
            }
            // Neither TLS nor a request: some other protocol, in which perhaps the server speaks first.
            First::Nothing if !web && bytes.first() != Some(&TLS_HANDSHAKE) => {
                drop(handshake);
                self.tunnel_raw(socket, bytes, raw).await
            }
            First::Nothing => {
                let because = Because::own(raw.because.generation, "no_first_message");
                self.deny(Kind::Tcp, &because, self.original.ip().to_string());
                Ok(())
            }
        }
    }

    /// Reads until it is clear what the bytes are.
    async fn first(
        &self,
        socket: &mut Socket,
        bytes: &mut Vec<u8>,
        patience: Duration,
    ) -> io::Result<First> {
        let start = Instant::now();
        loop {
            let begun = bytes.first() == Some(&TLS_HANDSHAKE);
            let max = if begun { FIRST_MESSAGE_TIME_MAX } else { patience };
            let left = left_of(max, start, Instant::now());
            let space = HELLO_BYTES_MAX + 1 - bytes.len();
            let read = poll_fn(|cx| {
                with_scratch(|scratch| {
                    let mut buffer = ReadBuf::new(&mut scratch[..space]);
                    ready!(Pin::new(&mut socket.stream).poll_read(cx, &mut buffer))?;
                    bytes.extend_from_slice(buffer.filled());
                    Poll::Ready(Ok::<_, io::Error>(buffer.filled().len()))
                })
            });
            match timeout(left, read).await {
                Err(_) | Ok(Ok(0)) => return Ok(First::Nothing),
                Ok(read) => read?,
            };
            if let Some(first) = tell(bytes) {
                return Ok(first);
            }
        }
    }

    fn judge_raw(&self) -> Ruled {
        let rules = self.flow.sandbox.rules();
        let (address, port) = (self.original.ip(), self.original.port());
        let flow = netpolicy::Flow::Raw { protocol: Protocol::Tcp, address, port };
        Ruled::of(&rules, &netpolicy::decide(&rules.policy, &flow))
    }

    /// Judges anew, so that the flow stands or falls with the policy from here on, and relays.
    async fn tunnel_raw(&self, guest: Socket, first: Vec<u8>, before: Ruled) -> io::Result<()> {
        let (address, port) = (self.original.ip(), self.original.port());
        let claim = || Claim::Raw { address, port };
        let ruled = self.claim(claim).unwrap_or(before);
        if ruled.outcome != Ruling::Allow {
            self.deny(Kind::Tcp, &ruled.because, address.to_string());
            return Ok(());
        }
        let about = self.about(address.to_string(), "tcp");
        let to = Destination::Address(address);
        self.tunnel(guest, first, to, &ruled, (Kind::Tcp, about), None).await
    }

    /// Makes the flow stand under what the claim says. `None`: the flow is gone.
    fn claim(&self, claim: impl Fn() -> Claim) -> Option<Ruled> {
        self.flow.sandbox.judge(&self.flow, |rules| {
            let made = claim();
            let ruled = made.judge(&rules.policy, |verdict| Ruled::of(rules, verdict));
            let stands = ruled.outcome == Ruling::Allow;
            (stands.then_some(made), Some(ruled))
        })
    }

    async fn tls(
        &self,
        socket: Socket,
        bytes: Vec<u8>,
        hello: Hello,
        handshake: Handshake,
    ) -> io::Result<()> {
        let Some(text) = hello.server_name else {
            // Without a name only the address counts.
            let raw = self.judge_raw();
            if raw.outcome == Ruling::Allow {
                drop(handshake);
                return self.tunnel_raw(socket, bytes, raw).await;
            }
            self.deny(Kind::Tls, &raw.because.but("no_name"), self.original.ip().to_string());
            return alert(socket, hello::ALERT_UNRECOGNIZED_NAME).await;
        };
        let Ok(name) = HostName::of_wire(&text) else {
            let because = Because::own(self.judge_raw().because.generation, "no_name");
            self.deny(Kind::Tls, &because, text);
            return alert(socket, hello::ALERT_UNRECOGNIZED_NAME).await;
        };
        let port = self.original.port();
        let claim = || Claim::Tls { name: name.clone(), port, address: None };
        let Some(ruled) = self.claim(claim) else { return Ok(()) };
        match ruled.outcome {
            Ruling::Deny => {
                self.deny(Kind::Tls, &ruled.because, text);
                alert(socket, hello::ALERT_ACCESS_DENIED).await
            }
            Ruling::Allow => {
                drop(handshake);
                let about = self.about(name.to_string(), "https");
                let to = Destination::Name(&name);
                self.tunnel(socket, bytes, to, &ruled, (Kind::Tls, about), Some(&name)).await
            }
            Ruling::Open => {
                let because = &ruled.because;
                Box::pin(http::serve_tls(self, socket, bytes, name, because, handshake)).await
            }
        }
    }

    /// Dials and relays what the policy has allowed.
    async fn tunnel(
        &self,
        guest: Socket,
        first: Vec<u8>,
        to: Destination<'_>,
        ruled: &Ruled,
        (kind, mut about): (Kind, Subject),
        name: Option<&HostName>,
    ) -> io::Result<()> {
        let port = self.original.port();
        let sandbox = &self.flow.sandbox;
        let dialled = Box::pin(dial(&self.flow, &self.setup, to, port, self.original.ip())).await;
        let (server, address) = match dialled {
            Ok(dialled) => dialled,
            Err(error) => {
                self.not_dialled(&error, kind, &ruled.because, about);
                return match kind {
                    Kind::Tls if error.is_denial() => {
                        alert(guest, hello::ALERT_ACCESS_DENIED).await
                    }
                    Kind::Tls => alert(guest, hello::ALERT_INTERNAL_ERROR).await,
                    _ => Ok(()),
                };
            }
        };
        about.address = Some(address);
        if let Some(name) = name {
            // The policy may have changed meanwhile, and may speak of the address.
            let claim = || Claim::Tls { name: name.clone(), port, address: Some(address) };
            match self.claim(claim) {
                Some(Ruled { outcome: Ruling::Allow, .. }) => {}
                Some(ruled) => {
                    sandbox.record(kind, Verdict::Denied, &ruled.because, about);
                    return Ok(());
                }
                None => return Ok(()),
            }
        }
        about.flow = self.flow.number;
        self.flow.tell_end();
        sandbox.record(kind, Verdict::Allowed, &ruled.because, about);
        let limits = &self.setup.limits;
        let idle = Duration::from_secs(u64::from(limits.idle_seconds));
        match server {
            Line::Plain(mut server) => {
                crate::relay::send_first(&mut server, first, &self.flow.sent).await?;
                relay(guest, server, limits.buffer_bytes, idle).await
            }
            Line::Wrapped(server) => {
                Box::pin(crate::relay::relay_wrapped(guest, server, first, idle)).await
            }
        }
    }

    /// A subject with what is known of every connection.
    pub(crate) fn about(&self, host: String, scheme: &'static str) -> Subject {
        Subject {
            host,
            scheme,
            address: Some(self.original.ip()),
            port: self.original.port(),
            ..Subject::default()
        }
    }

    pub(crate) fn deny(&self, kind: Kind, because: &Because, host: String) {
        let scheme = if kind == Kind::Tls { "https" } else { "tcp" };
        let about = self.about(host, scheme);
        self.flow.sandbox.record(kind, Verdict::Denied, because, about);
    }

    pub(crate) fn not_dialled(
        &self,
        error: &DialError,
        kind: Kind,
        because: &Because,
        mut about: Subject,
    ) {
        log::debug!(sandbox:% = self.flow.sandbox.id, host:% = about.host, error:%; "not dialled");
        let verdict = if error.is_denial() { Verdict::Denied } else { Verdict::Failed };
        about.address = error.address().or(about.address);
        self.flow.sandbox.record(kind, verdict, &because.but(error.reason()), about);
    }
}

impl Ruled {
    fn of(rules: &crate::sandbox::Rules, verdict: &netpolicy::Verdict<'_>) -> Self {
        let outcome = match verdict.outcome {
            Outcome::Allow => Ruling::Allow,
            Outcome::Open(_) => Ruling::Open,
            // What changes requests cannot be done to what is not opened.
            Outcome::Deny | Outcome::Transform(_) | Outcome::Rewrite(_) => Ruling::Deny,
        };
        let by_rule = !matches!(verdict.rule, RuleRef::Default);
        Self { outcome, because: Because::of(rules, verdict), by_rule }
    }
}

/// What the bytes so far are. `None`: too few to tell.
fn tell(bytes: &[u8]) -> Option<First> {
    if bytes.first() == Some(&TLS_HANDSHAKE) {
        return match hello::read(bytes) {
            Ok(Some(hello)) => Some(First::Tls(hello)),
            Ok(None) => None,
            Err(error) => Some(First::BadTls(error)),
        };
    }
    // A token and a space: nobody else begins so and is no harm if it does, since then a parser of
    // HTTP refuses it.
    let head = &bytes[..bytes.len().min(METHOD_BYTES_MAX)];
    let token = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    match head.iter().position(|byte| !token(byte)) {
        Some(at) if at > 0 && head[at] == b' ' => Some(First::Http),
        Some(_) => Some(First::Other),
        None if bytes.len() >= METHOD_BYTES_MAX => Some(First::Other),
        None => None,
    }
}

/// Says to a TLS client that it is refused, and ends.
pub(crate) async fn alert(mut socket: Socket, description: u8) -> io::Result<()> {
    tokio::io::AsyncWriteExt::write_all(&mut socket, &hello::alert(description)).await?;
    socket.end_cleanly().await
}

/// Counts a certificate against what the sandbox may have made.
pub(crate) fn may_mint(sandbox: &Sandbox, per_minute: u32) -> bool {
    let fits = sandbox.admit_mint(per_minute, Instant::now());
    let counter = if fits { &sandbox.counters.minted } else { &sandbox.counters.limited };
    counter.fetch_add(1, Relaxed);
    fits
}

/// The address a connection was meant for, where its host is that address in text.
pub(crate) fn same_address(text: &str, original: IpAddr) -> bool {
    let text = text.trim_start_matches('[').trim_end_matches(']');
    text.parse::<IpAddr>().is_ok_and(|address| address.to_canonical() == original)
}

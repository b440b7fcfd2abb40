//! Requests of guests, over TLS that we opened or over none: each one is read, judged and written
//! anew to a server that we found ourselves.

mod answer;
mod ask;
mod forward;
mod frames;
mod head;
mod headers;
mod judge;
mod server;

use std::{io, net::IpAddr, sync::Arc, time::Duration};

use holdfast_netpolicy::{HostName, Scheme};
use holdfast_wire::egress::{Kind, Verdict};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::AlertDescription;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};
use tokio_rustls::TlsAcceptor;

use self::{
    answer::Body,
    frames::Prompt,
    head::{HEAD_TIME_MAX, NEXT_TIME_MAX},
    server::Servers,
};
use crate::{
    accept::{Guest, alert, may_mint},
    relay::quiet,
    sandbox::{Because, Handshake, flow::Flow},
    setup::Setup,
    socket::{Prefix, Reading, Socket},
    tls::hello::ALERT_INTERNAL_ERROR,
};

/// How long a TLS handshake with us may take, the first message aside.
const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(10);
/// Bytes of a request's or response's head, and headers in it.
const HEAD_BYTES_MAX: usize = 64 * 1024;
const HEADERS_MAX: usize = 128;
/// Requests at a time on one connection of HTTP/2.
const STREAMS_MAX: u32 = 64;
/// Bytes of bodies on their way in one stream and in all of a connection of HTTP/2.
const STREAM_WINDOW_BYTES: u32 = 256 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 1024 * 1024;
/// Streams that a guest has reset and we have not dealt with yet.
const RESETS_MAX: usize = 32;

/// One connection of a guest that speaks HTTP.
struct Door {
    flow: Arc<Flow>,
    setup: Arc<Setup>,
    scheme: Scheme,
    /// The server name, of TLS.
    name: Option<HostName>,
    /// Where the guest meant it to go.
    address: IpAddr,
    port: u16,
    servers: Servers,
}

impl Door {
    fn new(guest: &Guest, scheme: Scheme, name: Option<HostName>) -> Arc<Self> {
        Arc::new(Self {
            flow: guest.flow.clone(),
            setup: guest.setup.clone(),
            scheme,
            name,
            address: guest.original.ip(),
            port: guest.original.port(),
            servers: Servers::default(),
        })
    }
}

/// Answers requests that come without TLS.
pub(crate) async fn serve_plain(guest: &Guest, socket: Socket, first: Vec<u8>) -> io::Result<()> {
    let door = Door::new(guest, Scheme::Http, None);
    serve(door, Reading::new(Prefix::new(first), socket), false).await
}

/// Answers in the server's place, with a certificate of the group's CA.
pub(crate) async fn serve_tls(
    guest: &Guest,
    socket: Socket,
    first: Vec<u8>,
    name: HostName,
    because: &Because,
    handshake: Handshake,
) -> io::Result<()> {
    let sandbox = &guest.flow.sandbox;
    let minter = &guest.setup.minter;
    if !minter.has(&name) {
        if !may_mint(sandbox, guest.setup.limits.mints_per_minute) {
            guest.deny(Kind::Tls, &because.but("mint_limit"), name.to_string());
            return alert(socket, ALERT_INTERNAL_ERROR).await;
        }
        if let Err(error) = minter.mint(&name) {
            log::warn!(sandbox:% = sandbox.id, error:%; "no certificate");
            return alert(socket, ALERT_INTERNAL_ERROR).await;
        }
    }
    let acceptor = TlsAcceptor::from(minter.server.clone());
    // On the heap what is over before the connection is: every idle one keeps the rest of this.
    let accepting = acceptor.accept(Reading::new(Prefix::new(first), socket));
    let accepted = Box::pin(timeout(HANDSHAKE_TIME_MAX, accepting)).await;
    let stream = match accepted.unwrap_or(Err(io::ErrorKind::TimedOut.into())) {
        Ok(stream) => Box::new(stream),
        Err(error) => {
            // Most often a client that pins certificates, or was not given the group's CA.
            let reason = match alert_of(&error) {
                Some(
                    AlertDescription::UnknownCA
                    | AlertDescription::BadCertificate
                    | AlertDescription::CertificateUnknown,
                ) => "tls_client_rejected_ca",
                _ => "tls_handshake",
            };
            let about = guest.about(name.to_string(), "https");
            sandbox.record(Kind::Tls, Verdict::Failed, &because.but(reason), about);
            return Err(error);
        }
    };
    drop(handshake);
    let h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    serve(Door::new(guest, Scheme::Https, Some(name)), stream, h2).await
}

/// The alert that a TLS error is about, if it is about one that came in.
fn alert_of(error: &io::Error) -> Option<AlertDescription> {
    let inner = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    match inner {
        rustls::Error::AlertReceived(description) => Some(*description),
        _ => None,
    }
}

async fn serve<S>(door: Arc<Door>, stream: S, h2: bool) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let idle = Duration::from_secs(u64::from(door.setup.limits.idle_seconds));
    let flow = door.flow.clone();
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let door = door.clone();
        // On the heap while there is a request: a connection has place for what it is given here.
        Box::pin(async move {
            Ok::<hyper::Response<Body>, std::convert::Infallible>(
                forward::answer(door, request).await,
            )
        })
    });
    let served = async {
        if h2 {
            let io = TokioIo::new(Reading::new(Prompt::new(HEAD_TIME_MAX), stream));
            hyper::server::conn::http2::Builder::new(FlowTasks(flow.clone()))
                .timer(TokioTimer::new())
                .auto_date_header(false)
                .max_concurrent_streams(STREAMS_MAX)
                .max_header_list_size(u32::try_from(HEAD_BYTES_MAX).unwrap_or(u32::MAX))
                .max_pending_accept_reset_streams(RESETS_MAX)
                .max_local_error_reset_streams(RESETS_MAX)
                .initial_stream_window_size(STREAM_WINDOW_BYTES)
                .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
                .serve_connection(io, service)
                .await
        } else {
            let (stream, timer) = head::timed(stream);
            let io = TokioIo::new(stream);
            hyper::server::conn::http1::Builder::new()
                .timer(timer)
                .auto_date_header(false)
                .header_read_timeout(NEXT_TIME_MAX)
                .max_headers(HEADERS_MAX)
                .max_header_size(HEAD_BYTES_MAX)
                .max_buf_size(HEAD_BYTES_MAX)
                .serve_connection(io, service)
                .with_upgrades()
                .await
        }
    };
    tokio::select! {
        served = served => served.map_err(io::Error::other),
        () = quiet(&flow, idle) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Starts tasks of a connection as tasks of its flow.
#[derive(Clone)]
struct FlowTasks(Arc<Flow>);

impl<F> hyper::rt::Executor<F> for FlowTasks
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, task: F) {
        self.0.spawn(task);
    }
}

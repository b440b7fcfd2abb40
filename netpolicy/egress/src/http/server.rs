//! Connections to servers, kept for the next request of the same guest connection and for nobody
//! else's.

use std::{
    io,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use holdfast_netpolicy::Scheme;
use hyper::{
    Request, Response,
    body::Incoming,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::{AlertDescription, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};
use tokio_rustls::TlsConnector;

use super::{
    CONNECTION_WINDOW_BYTES, Door, FlowTasks, HEAD_BYTES_MAX, HEADERS_MAX, STREAM_WINDOW_BYTES,
    alert_of, answer::Body, ask::Host, judge::Plan,
};
use crate::dial::{Destination, DialError, dial};

/// How long a TLS handshake with a server may take.
const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(10);
/// How long a connection that was used may take until it is ready again.
const READY_TIME_MAX: Duration = Duration::from_millis(200);
/// Connections that wait for another request.
const IDLE_MAX: usize = 4;

#[derive(Debug, thiserror::Error)]
pub(super) enum ServerError {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("TLS with the server failed")]
    Tls(#[source] io::Error),
    #[error("HTTP with the server failed")]
    Http(#[source] hyper::Error),
    #[error("the server did not answer in time")]
    Silent,
}

impl ServerError {
    /// Why, for the record.
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::Dial(error) => error.reason(),
            Self::Tls(error) if wants_certificate(error) => "client_cert_under_inspection",
            // In TLS 1.3 the server says so when the handshake is over for us.
            Self::Http(error) if wants_certificate(error) => "client_cert_under_inspection",
            Self::Tls(_) => "upstream_tls",
            Self::Http(_) => "upstream_http",
            Self::Silent => "upstream_timeout",
        }
    }
}

/// Whether the server has refused us for want of a client's certificate.
fn wants_certificate(error: &(dyn std::error::Error + 'static)) -> bool {
    let chain = std::iter::successors(Some(error), |error| error.source());
    let mut alerts = chain.filter_map(|error| alert_of(error.downcast_ref::<io::Error>()?));
    alerts.any(|alert| alert == AlertDescription::CertificateRequired)
}

/// Where a connection leads.
#[derive(Debug, Clone, PartialEq, Eq)]
struct End {
    scheme: Scheme,
    host: String,
    port: u16,
}

impl End {
    fn of(plan: &Plan) -> Self {
        let host = match &plan.host {
            Host::Name(name) => name.to_string(),
            Host::Address(address) => address.to_string(),
        };
        Self { scheme: plan.scheme, host, port: plan.port }
    }
}

enum Sender {
    H1(http1::SendRequest<Body>),
    H2(http2::SendRequest<Body>),
}

#[derive(Default)]
pub(super) struct Servers(Arc<Mutex<Vec<Server>>>);

/// One connection to a server.
pub(super) struct Server {
    end: End,
    sender: Sender,
    pub(super) address: IpAddr,
    /// It has answered a request before: it may have been closed since.
    pub(super) used: bool,
}

/// A connection that is to come back when the answer is through.
pub(super) struct Lent {
    server: Server,
    home: Arc<Mutex<Vec<Server>>>,
}

impl Lent {
    pub(super) fn give_back(self) {
        let mut idle = self.home.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < IDLE_MAX {
            idle.push(Server { used: true, ..self.server });
        }
    }
}

impl Servers {
    /// A connection for this plan: one that waits, or a new one. `h2`: the server may be spoken to
    /// by HTTP/2.
    pub(super) async fn get(
        &self,
        door: &Door,
        plan: &Plan,
        h2: bool,
        fresh: bool,
    ) -> Result<Server, ServerError> {
        let end = End::of(plan);
        while !fresh && let Some(mut server) = self.take(&end) {
            let ready = match &mut server.sender {
                Sender::H1(sender) => timeout(READY_TIME_MAX, sender.ready()).await,
                Sender::H2(sender) => timeout(READY_TIME_MAX, sender.ready()).await,
            };
            if matches!(ready, Ok(Ok(()))) {
                return Ok(server);
            }
        }
        connect(door, plan, end, h2).await
    }

    fn take(&self, end: &End) -> Option<Server> {
        let mut idle = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let place = idle.iter().position(|server| server.end == *end)?;
        // One of HTTP/2 serves many at a time.
        if let Sender::H2(sender) = &idle[place].sender {
            if sender.is_closed() {
                idle.swap_remove(place);
                return None;
            }
            let (sender, address) = (Sender::H2(sender.clone()), idle[place].address);
            return Some(Server { end: end.clone(), sender, address, used: true });
        }
        Some(idle.swap_remove(place))
    }

    /// To be given back with the end of its answer.
    pub(super) fn lend(&self, server: Server) -> Option<Lent> {
        match &server.sender {
            Sender::H1(_) => Some(Lent { server, home: self.0.clone() }),
            Sender::H2(_) => {
                if !server.used {
                    Lent { server, home: self.0.clone() }.give_back();
                }
                None
            }
        }
    }
}

impl Server {
    pub(super) fn is_h2(&self) -> bool {
        matches!(self.sender, Sender::H2(_))
    }

    /// Sends a request. It comes back with the error when nothing of it was sent.
    pub(super) async fn send(
        &mut self,
        request: Request<Body>,
    ) -> Result<Response<Incoming>, (hyper::Error, Option<Request<Body>>)> {
        let sent = match &mut self.sender {
            Sender::H1(sender) => sender.try_send_request(request).await,
            Sender::H2(sender) => sender.try_send_request(request).await,
        };
        sent.map_err(|mut error| {
            let request = error.take_message();
            (error.into_error(), request)
        })
    }
}

async fn connect(door: &Door, plan: &Plan, end: End, h2: bool) -> Result<Server, ServerError> {
    let to = match &plan.host {
        Host::Name(name) => Destination::Name(name),
        Host::Address(address) => Destination::Address(*address),
    };
    let (line, address) = dial(&door.flow, &door.setup, to, plan.port, door.address).await?;
    let sender = match plan.scheme {
        Scheme::Http => h1(door, line).await?,
        Scheme::Https => {
            let name = match &plan.host {
                Host::Name(name) => ServerName::try_from(name.to_string()),
                Host::Address(address) => Ok(ServerName::from(*address)),
            };
            let bad_name = |_| ServerError::Tls(io::ErrorKind::InvalidInput.into());
            let config = if h2 { &door.setup.client_any } else { &door.setup.client_h1 };
            let connecting =
                TlsConnector::from(config.clone()).connect(name.map_err(bad_name)?, line);
            let stream = match timeout(HANDSHAKE_TIME_MAX, connecting).await {
                Ok(stream) => stream.map_err(ServerError::Tls)?,
                Err(_) => return Err(ServerError::Silent),
            };
            let speaks_h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
            if speaks_h2 { self::h2(door, stream).await? } else { h1(door, stream).await? }
        }
    };
    Ok(Server { end, sender, address, used: false })
}

async fn h1<S>(door: &Door, stream: S) -> Result<Sender, ServerError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = http1::Builder::new()
        .max_headers(HEADERS_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(ServerError::Http)?;
    door.flow.spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            log::trace!(error:%; "a connection to a server failed");
        }
    });
    Ok(Sender::H1(sender))
}

async fn h2<S>(door: &Door, stream: S) -> Result<Sender, ServerError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = http2::Builder::new(FlowTasks(door.flow.clone()))
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_header_list_size(u32::try_from(HEAD_BYTES_MAX).unwrap_or(u32::MAX))
        .handshake(TokioIo::new(stream))
        .await
        .map_err(ServerError::Http)?;
    door.flow.spawn(async move {
        if let Err(error) = connection.await {
            log::trace!(error:%; "a connection to a server failed");
        }
    });
    Ok(Sender::H2(sender))
}

//! Connections to servers, kept for the next request of the same guest connection and for nobody
//! else's.

use std::{
    future::poll_fn,
    io,
    net::IpAddr,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::Poll,
    time::Duration,
};

use holdfast_netpolicy::Scheme;
use hyper::{
    Request, Response, Version,
    body::Incoming,
    client::conn::{http1, http2},
    header::CONNECTION,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::{AlertDescription, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::oneshot,
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

/// Bytes to and from a server, whatever they are wrapped in. On the heap, where it is once: what
/// holds it is moved from future to future.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

enum Sender {
    H1 {
        sender: http1::SendRequest<Body>,
        /// The stream, once nobody sends any more and the last answer was whole. `None`: it ends as
        /// what it is asked to become.
        rest: Option<oneshot::Receiver<Box<dyn Stream>>>,
    },
    H2(http2::SendRequest<Body>),
}

/// A connection that waits for the next request. One of HTTP/1.1 without what serves it: that has
/// buffers, and most of those that wait do so for long.
enum Waiting {
    H1 { end: End, address: IpAddr, rest: oneshot::Receiver<Box<dyn Stream>> },
    H2(Server),
}

impl Waiting {
    fn end(&self) -> &End {
        match self {
            Self::H1 { end, .. } => end,
            Self::H2(server) => &server.end,
        }
    }
}

#[derive(Default)]
pub(super) struct Servers(Arc<Mutex<Vec<Waiting>>>);

/// One connection to a server.
pub(super) struct Server {
    end: End,
    sender: Sender,
    pub(super) address: IpAddr,
    /// It has answered a request before: it may have been closed since.
    pub(super) used: bool,
    /// The server has not said that it will close it.
    stays: bool,
}

/// A connection that is to come back when the answer is through.
pub(super) struct Lent {
    server: Server,
    home: Arc<Mutex<Vec<Waiting>>>,
}

impl Lent {
    pub(super) fn give_back(self) {
        let Server { end, sender, address, stays, .. } = self.server;
        let waiting = match sender {
            Sender::H1 { rest: Some(rest), .. } if stays => Waiting::H1 { end, address, rest },
            Sender::H1 { .. } => return,
            sender @ Sender::H2(_) => {
                Waiting::H2(Server { end, sender, address, stays, used: true })
            }
        };
        let mut idle = self.home.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < IDLE_MAX {
            idle.push(waiting);
        }
    }
}

impl Servers {
    /// A connection for this plan: one that waits, or a new one. `h2`: the server may be spoken to
    /// by HTTP/2. `fresh`: a new one, which may become something else by an upgrade.
    pub(super) async fn get(
        &self,
        door: &Door,
        plan: &Plan,
        h2: bool,
        fresh: bool,
    ) -> Result<Server, ServerError> {
        let end = End::of(plan);
        while !fresh && let Some(waiting) = self.take(&end) {
            match waiting {
                Waiting::H1 { end, address, rest } => {
                    let Ok(Ok(mut stream)) = timeout(READY_TIME_MAX, rest).await else { continue };
                    if is_quiet(&mut stream).await {
                        let sender = h1(door, stream, false).await?;
                        return Ok(Server { end, sender, address, used: true, stays: true });
                    }
                }
                Waiting::H2(mut server) => {
                    if let Sender::H2(sender) = &mut server.sender
                        && matches!(timeout(READY_TIME_MAX, sender.ready()).await, Ok(Ok(())))
                    {
                        return Ok(server);
                    }
                }
            }
        }
        connect(door, plan, end, h2, fresh).await
    }

    fn take(&self, end: &End) -> Option<Waiting> {
        let mut idle = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let place = idle.iter().position(|waiting| waiting.end() == end)?;
        // One of HTTP/2 serves many at a time.
        if let Waiting::H2(Server { sender: Sender::H2(sender), address, .. }) = &idle[place] {
            if sender.is_closed() {
                idle.swap_remove(place);
                return None;
            }
            let (sender, address) = (Sender::H2(sender.clone()), *address);
            let end = end.clone();
            return Some(Waiting::H2(Server { end, sender, address, used: true, stays: true }));
        }
        Some(idle.swap_remove(place))
    }

    /// To be given back with the end of its answer.
    pub(super) fn lend(&self, server: Server) -> Option<Lent> {
        match &server.sender {
            Sender::H1 { .. } => Some(Lent { server, home: self.0.clone() }),
            Sender::H2(_) => {
                if !server.used {
                    Lent { server, home: self.0.clone() }.give_back();
                }
                None
            }
        }
    }
}

/// Whether nothing has come over a stream on which nothing should: no end and no answer.
async fn is_quiet(stream: &mut Box<dyn Stream>) -> bool {
    let mut byte = [0];
    poll_fn(|cx| {
        let mut buffer = ReadBuf::new(&mut byte);
        Poll::Ready(Pin::new(&mut *stream).poll_read(cx, &mut buffer).is_pending())
    })
    .await
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
            Sender::H1 { sender, .. } => sender.try_send_request(request).await,
            Sender::H2(sender) => sender.try_send_request(request).await,
        };
        let response = sent.map_err(|mut error| {
            let request = error.take_message();
            (error.into_error(), request)
        })?;
        let mut said = response.headers().get_all(CONNECTION).iter();
        let closes =
            said.any(|it| it.to_str().is_ok_and(|it| it.to_ascii_lowercase().contains("close")));
        self.stays = !closes && response.version() != Version::HTTP_10;
        Ok(response)
    }
}

async fn connect(
    door: &Door,
    plan: &Plan,
    end: End,
    h2: bool,
    fresh: bool,
) -> Result<Server, ServerError> {
    let to = match &plan.host {
        Host::Name(name) => Destination::Name(name),
        Host::Address(address) => Destination::Address(*address),
    };
    let (line, address) = dial(&door.flow, &door.setup, to, plan.port, door.address).await?;
    let sender = match plan.scheme {
        Scheme::Http => h1(door, Box::new(line), fresh).await?,
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
                Ok(stream) => Box::new(stream.map_err(ServerError::Tls)?),
                Err(_) => return Err(ServerError::Silent),
            };
            let speaks_h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
            if speaks_h2 { self::h2(door, stream).await? } else { h1(door, stream, fresh).await? }
        }
    };
    Ok(Server { end, sender, address, used: false, stays: true })
}

async fn h1(door: &Door, stream: Box<dyn Stream>, upgrades: bool) -> Result<Sender, ServerError> {
    let (sender, connection) = http1::Builder::new()
        .max_headers(HEADERS_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(ServerError::Http)?;
    if upgrades {
        // By the box it is in one place, and not in the task and in what it waits for.
        let mut connection = Box::pin(connection.with_upgrades());
        door.flow.spawn(async move { trace(connection.as_mut().await) });
        return Ok(Sender::H1 { sender, rest: None });
    }
    let (give, rest) = oneshot::channel();
    let mut connection = Box::pin(connection.without_shutdown());
    door.flow.spawn(async move {
        match connection.as_mut().await {
            // What comes without having been asked for is no answer to the next request.
            Ok(parts) if parts.read_buf.is_empty() => drop(give.send(parts.io.into_inner())),
            ended => trace(ended.map(drop)),
        }
    });
    Ok(Sender::H1 { sender, rest: Some(rest) })
}

fn trace(ended: hyper::Result<()>) {
    if let Err(error) = ended {
        log::trace!(error:%; "a connection to a server failed");
    }
}

async fn h2(door: &Door, stream: Box<dyn Stream>) -> Result<Sender, ServerError> {
    let (sender, connection) = http2::Builder::new(FlowTasks(door.flow.clone()))
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_header_list_size(u32::try_from(HEAD_BYTES_MAX).unwrap_or(u32::MAX))
        .handshake(TokioIo::new(stream))
        .await
        .map_err(ServerError::Http)?;
    let mut connection = Box::pin(connection);
    door.flow.spawn(async move { trace(connection.as_mut().await) });
    Ok(Sender::H2(sender))
}

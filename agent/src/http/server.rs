//! The listener: TLS, HTTP/1.1, a bound on connections and on how long a silent one may stay.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{Router, body::Body, http::Request};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use log::{debug, warn};
use rustix::net::sockopt;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::task::TaskTracker;
use tower_service::Service;

use super::guard::Peer;

/// How long a client may take for the TLS handshake.
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(10);

/// How long a client may take for a request's head, and stay silent between two requests.
const HEAD_PATIENCE: Duration = Duration::from_secs(30);

/// Longest head of a request, in bytes: a URL with an escaped path of 4 KiB, and a token.
const HEAD_BYTES_MAX: usize = 64 * 1024;

/// Header fields of a request; clients send about ten.
const HEADERS_MAX: usize = 64;

/// How long requests under way are waited for when the daemon stops.
const DRAIN_PATIENCE: Duration = Duration::from_secs(10);

/// How long to wait when the system has no descriptor for another connection.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// Takes connections until `stop` says true, then waits for the ones under way.
pub(crate) async fn serve(
    listener: TcpListener,
    tls: TlsAcceptor,
    router: Router,
    connections_max: u32,
    mut stop: watch::Receiver<bool>,
) {
    let places = usize::try_from(connections_max).unwrap_or(Semaphore::MAX_PERMITS);
    let places = Arc::new(Semaphore::new(places.min(Semaphore::MAX_PERMITS)));
    let connections = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener, &places) => accepted,
            () = stopped(&mut stop) => break,
        };
        match accepted {
            Ok((stream, address, place)) => {
                let connection = Connection { tls: tls.clone(), router: router.clone() };
                let peer = Peer { address, _place: Arc::new(place) };
                connections.spawn(connection.serve(stream, peer, stop.clone()));
            }
            Err(error) => {
                warn!(error:%; "connection not accepted");
                sleep(EXHAUSTED_PAUSE).await;
            }
        }
    }
    drop(listener);
    connections.close();
    if timeout(DRAIN_PATIENCE, connections.wait()).await.is_err() {
        warn!(left = connections.len(); "connections cut");
    }
}

/// Ends when the daemon stops.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    // A daemon that is gone has stopped too.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// A connection and its place among the open ones. Without a place the kernel's queue holds it.
async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> std::io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.map_err(std::io::Error::other)?;
    let (stream, address) = listener.accept().await?;
    Ok((stream, address, place))
}

struct Connection {
    tls: TlsAcceptor,
    router: Router,
}

impl Connection {
    async fn serve(self, stream: TcpStream, peer: Peer, mut stop: watch::Receiver<bool>) {
        let address = peer.address;
        if let Err(error) = tune(&stream) {
            debug!(peer:% = address, error:%; "socket options not set");
        }
        let stream = match timeout(HANDSHAKE_PATIENCE, self.tls.accept(stream)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return debug!(peer:% = address, error:%; "TLS handshake failed"),
            Err(_) => return debug!(peer:% = address; "TLS handshake took too long"),
        };
        let router = self.router;
        let service = service_fn(move |request: Request<Incoming>| {
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(peer.clone());
            router.clone().call(request)
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_PATIENCE)
            .max_headers(HEADERS_MAX)
            .max_buf_size(HEAD_BYTES_MAX)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        let mut connection = std::pin::pin!(connection);
        let ended = tokio::select! {
            ended = &mut connection => ended,
            () = stopped(&mut stop) => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            debug!(peer:% = address, error:%; "connection ended");
        }
    }
}

/// A peer that vanished is noticed within two minutes, also by who only waits for it.
fn tune(stream: &TcpStream) -> rustix::io::Result<()> {
    sockopt::set_tcp_nodelay(stream, true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(60))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(15))?;
    sockopt::set_tcp_keepcnt(stream, 4)
}

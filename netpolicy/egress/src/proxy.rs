//! Connections that go out through a proxy of the site. It is told addresses, not names: what we
//! checked is what it connects to.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use holdfast_netpolicy::HostName;
use holdfast_wire::egress::{ProxyKind, UpstreamProxy};
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{dns, sandbox::flow::Flow, setup::Setup, socket::Socket};

/// How long the proxy may take until the connection stands.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(10);
/// Longest answer of a proxy to CONNECT.
const ANSWER_BYTES_MAX: usize = 8 * 1024;

#[derive(Debug, thiserror::Error)]
pub(crate) enum ProxyError {
    #[error("the name of the upstream proxy, {0:?}, has no address")]
    Name(String),
    #[error("the upstream proxy cannot be spoken to")]
    Io(#[from] io::Error),
    #[error("the upstream proxy refused: {0}")]
    Refused(String),
    #[error("the upstream proxy did not answer in time")]
    Silent,
}

/// A connection to the outside.
pub(crate) enum Line {
    Plain(Socket),
    /// Inside TLS to a proxy.
    Wrapped(Box<TlsStream<Socket>>),
}

/// Connects to `end` through `proxy`.
pub(crate) async fn connect(
    flow: &Arc<Flow>,
    setup: &Setup,
    proxy: &UpstreamProxy,
    end: SocketAddr,
) -> Result<Line, ProxyError> {
    let connect = async {
        let address = address(flow, setup, proxy).await?;
        let stream = TcpStream::connect((address, proxy.port)).await?;
        let mut socket = Socket::new(stream, flow.clone());
        match proxy.kind {
            ProxyKind::Socks5 => socks5(&mut socket, proxy, end).await?,
            ProxyKind::Http => http_connect(&mut socket, proxy, end).await?,
            ProxyKind::Https => {
                let name = ServerName::try_from(proxy.host.clone())
                    .map_err(|_| ProxyError::Name(proxy.host.clone()))?;
                let connector = TlsConnector::from(setup.client_h1.clone());
                let mut stream = connector.connect(name, socket).await?;
                http_connect(&mut stream, proxy, end).await?;
                return Ok(Line::Wrapped(Box::new(stream)));
            }
        }
        Ok(Line::Plain(socket))
    };
    timeout(CONNECT_TIME_MAX, connect).await.unwrap_or(Err(ProxyError::Silent))
}

/// The operator named it: the deny-set is for guests.
async fn address(flow: &Flow, setup: &Setup, proxy: &UpstreamProxy) -> Result<IpAddr, ProxyError> {
    if let Ok(address) = proxy.host.parse() {
        return Ok(address);
    }
    let unknown = || ProxyError::Name(proxy.host.clone());
    let name = HostName::of_wire(&proxy.host).map_err(|_| unknown())?;
    dns::first_address(&flow.sandbox, setup, &name).await.ok_or_else(unknown)
}

async fn http_connect<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    proxy: &UpstreamProxy,
    end: SocketAddr,
) -> Result<(), ProxyError> {
    let mut request = format!("CONNECT {end} HTTP/1.1\r\nHost: {end}\r\n");
    if let Some(username) = &proxy.username {
        let password = proxy.password.as_deref().unwrap_or_default();
        let credentials = STANDARD.encode(format!("{username}:{password}"));
        request.push_str(&format!("Proxy-Authorization: Basic {credentials}\r\n"));
    }
    request.push_str("\r\n");
    stream.write_all(request.as_bytes()).await?;
    // Byte by byte: what follows the head belongs to the connection.
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        if answer.len() >= ANSWER_BYTES_MAX {
            return Err(ProxyError::Refused("its answer is too long".to_owned()));
        }
        answer.push(stream.read_u8().await?);
    }
    let line = answer.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    match line.split(' ').nth(1) {
        Some(status) if line.starts_with("HTTP/1.") && status.starts_with('2') => Ok(()),
        _ => Err(ProxyError::Refused(line.chars().take(80).collect())),
    }
}

/// RFC 1928 and 1929.
async fn socks5<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    proxy: &UpstreamProxy,
    end: SocketAddr,
) -> Result<(), ProxyError> {
    const NO_LOGIN: u8 = 0;
    const LOGIN: u8 = 2;
    let refused = |what: &str| ProxyError::Refused(what.to_owned());
    let method = if proxy.username.is_some() { LOGIN } else { NO_LOGIN };
    stream.write_all(&[5, 1, method]).await?;
    let mut chosen = [0; 2];
    stream.read_exact(&mut chosen).await?;
    if chosen != [5, method] {
        return Err(refused("it takes another kind of login"));
    }
    if let Some(username) = &proxy.username {
        let password = proxy.password.as_deref().unwrap_or_default();
        let mut login = vec![1];
        for part in [username.as_str(), password] {
            let length = u8::try_from(part.len()).map_err(|_| refused("the login is too long"))?;
            login.push(length);
            login.extend(part.as_bytes());
        }
        stream.write_all(&login).await?;
        let mut answer = [0; 2];
        stream.read_exact(&mut answer).await?;
        if answer[1] != 0 {
            return Err(refused("wrong login"));
        }
    }
    let mut request = vec![5, 1, 0];
    match end.ip() {
        IpAddr::V4(v4) => {
            request.push(1);
            request.extend(v4.octets());
        }
        IpAddr::V6(v6) => {
            request.push(4);
            request.extend(v6.octets());
        }
    }
    request.extend(end.port().to_be_bytes());
    stream.write_all(&request).await?;
    let mut head = [0; 4];
    stream.read_exact(&mut head).await?;
    if head[..2] != [5, 0] {
        return Err(ProxyError::Refused(format!("SOCKS5 answer {}", head[1])));
    }
    let bound = match head[3] {
        1 => 4,
        4 => 16,
        3 => usize::from(stream.read_u8().await?),
        _ => return Err(refused("its answer is malformed")),
    };
    stream.read_exact(&mut vec![0; bound + 2]).await?;
    Ok(())
}

impl AsyncRead for Line {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_read(cx, buffer),
            Self::Wrapped(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Line {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_write(cx, bytes),
            Self::Wrapped(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_flush(cx),
            Self::Wrapped(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_shutdown(cx),
            Self::Wrapped(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

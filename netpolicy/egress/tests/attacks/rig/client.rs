//! What guests do.

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::Duration,
};

use rustls::{RootCertStore, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::outside::write_name;

pub(crate) const NO_ERROR: u8 = 0;
pub(crate) const NAME_ERROR: u8 = 3;
pub(crate) const REFUSED: u8 = 5;
pub(crate) const A: u16 = 1;
pub(crate) const TXT: u16 = 16;
pub(crate) const AAAA: u16 = 28;
/// Who the guest is told to ask.
pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 1);

fn config(roots: RootCertStore, protocols: &[&str]) -> Arc<rustls::ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
    Arc::new(config)
}

/// TLS to an address, with a server name that need not have to do with it.
pub(crate) async fn tls(
    address: Ipv4Addr,
    name: &str,
    roots: RootCertStore,
) -> io::Result<TlsStream<TcpStream>> {
    tls_with(address, 443, name, roots, &["http/1.1"]).await
}

pub(crate) async fn tls_with(
    address: Ipv4Addr,
    port: u16,
    name: &str,
    roots: RootCertStore,
    protocols: &[&str],
) -> io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect((address, port)).await?;
    let name = ServerName::try_from(name.to_owned()).map_err(io::Error::other)?;
    TlsConnector::from(config(roots, protocols)).connect(name, stream).await
}

/// The bytes with which such a client begins.
pub(crate) fn client_hello(name: &str) -> Vec<u8> {
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let config = config(RootCertStore::empty(), &[]);
    let mut client = rustls::ClientConnection::new(config, name).unwrap();
    let mut bytes = Vec::new();
    while client.wants_write() {
        client.write_tls(&mut bytes).unwrap();
    }
    bytes
}

/// Sends a request as it stands and reads one answer: its status, head and body.
pub(crate) async fn exchange<S>(stream: &mut S, request: &str) -> io::Result<(u16, String)>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    stream.write_all(request.as_bytes()).await?;
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let text = String::from_utf8_lossy(&bytes).to_ascii_lowercase();
        if let Some(head) = text.find("\r\n\r\n") {
            let length = text[..head]
                .lines()
                .find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
            let whole = head + 4 + length.unwrap_or(0);
            if bytes.len() >= whole {
                break;
            }
        }
        match stream.read(&mut buffer).await? {
            0 => break,
            count => bytes.extend(&buffer[..count]),
        }
    }
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let status = text.get(9..12).and_then(|status| status.parse().ok());
    status.map(|status| (status, text)).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

pub(crate) fn get(host: &str, path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n")
}

/// One request over TLS of its own.
pub(crate) async fn https_get(
    address: Ipv4Addr,
    host: &str,
    path: &str,
    roots: RootCertStore,
) -> io::Result<(u16, String)> {
    let mut stream = tls(address, host, roots).await?;
    exchange(&mut stream, &get(host, path)).await
}

/// One request without TLS, as it stands.
pub(crate) async fn http(address: Ipv4Addr, request: &str) -> io::Result<(u16, String)> {
    let mut stream = TcpStream::connect((address, 80)).await?;
    exchange(&mut stream, request).await
}

/// Sends bytes to an address and reads until the end. `Err`: it was reset.
pub(crate) async fn send_raw(address: Ipv4Addr, port: u16, bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect((address, port)).await?;
    stream.write_all(bytes).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(answer)
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) code: u8,
    pub(crate) truncated: bool,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) answers: u16,
    pub(crate) ttl: Option<u32>,
}

pub(crate) fn query(name: &str, kind: u16, class: u16) -> Vec<u8> {
    let mut query = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    query.extend(write_name(name));
    query.extend(kind.to_be_bytes());
    query.extend(class.to_be_bytes());
    query
}

pub(crate) fn read_reply(bytes: &[u8], question_end: usize) -> Reply {
    assert_eq!(&bytes[..2], &[0x12, 0x34], "the answer to another question");
    let answers = u16::from_be_bytes([bytes[6], bytes[7]]);
    let (mut at, mut addresses, mut ttl) = (question_end, Vec::new(), None);
    for _ in 0..answers {
        while bytes[at] != 0 {
            assert!(bytes[at] < 64, "we write names whole");
            at += 1 + usize::from(bytes[at]);
        }
        at += 1;
        let kind = u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let seconds = u32::from_be_bytes(bytes[at + 4..at + 8].try_into().unwrap());
        ttl = Some(ttl.map_or(seconds, |ttl: u32| ttl.min(seconds)));
        let length = usize::from(u16::from_be_bytes([bytes[at + 8], bytes[at + 9]]));
        let data = &bytes[at + 10..at + 10 + length];
        match kind {
            A => addresses.push(IpAddr::from(<[u8; 4]>::try_from(data).unwrap())),
            AAAA => addresses.push(IpAddr::from(<[u8; 16]>::try_from(data).unwrap())),
            _ => {}
        }
        at += 10 + length;
    }
    Reply { code: bytes[3] & 15, truncated: bytes[2] & 2 != 0, addresses, answers, ttl }
}

/// Asks by UDP. `None`: no answer came.
pub(crate) async fn dig(server: Ipv4Addr, name: &str, kind: u16) -> Option<Reply> {
    dig_class(server, name, kind, 1).await
}

pub(crate) async fn dig_class(
    server: Ipv4Addr,
    name: &str,
    kind: u16,
    class: u16,
) -> Option<Reply> {
    let socket = UdpSocket::bind("0.0.0.0:0").await.unwrap();
    // Connected: answers from another address than the one asked are not taken.
    socket.connect((server, 53)).await.unwrap();
    let query = query(name, kind, class);
    socket.send(&query).await.unwrap();
    let mut buffer = [0; 2048];
    let received = timeout(Duration::from_secs(8), socket.recv(&mut buffer)).await;
    let count = received.ok()?.ok()?;
    Some(read_reply(&buffer[..count], query.len()))
}

pub(crate) async fn dig_by_tcp(server: Ipv4Addr, name: &str, kind: u16) -> io::Result<Reply> {
    let mut stream = TcpStream::connect((server, 53)).await?;
    let query = query(name, kind, 1);
    let length = u16::try_from(query.len()).unwrap();
    stream.write_all(&[&length.to_be_bytes(), &query[..]].concat()).await?;
    let length = stream.read_u16().await?;
    let mut answer = vec![0; length.into()];
    stream.read_exact(&mut answer).await?;
    Ok(read_reply(&answer, query.len()))
}

/// The alert by which a TLS handshake was refused.
pub(crate) fn alert(error: &io::Error) -> Option<rustls::AlertDescription> {
    match error.get_ref()?.downcast_ref::<rustls::Error>()? {
        rustls::Error::AlertReceived(description) => Some(*description),
        _ => None,
    }
}

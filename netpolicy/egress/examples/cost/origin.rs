//! The servers at the end: as cheap as they can be, since they share the machine with what is
//! measured.

use std::{net::Ipv4Addr, sync::Arc};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::TlsAcceptor;

use crate::rig::{Answer, Outside};

/// Answers `GET /N` with N bytes, over TLS.
pub(crate) const WEB: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 30);
pub(crate) const WEB_NAME: &str = "origin.test";
/// Reads a ClientHello, says one byte, reads a length and sends as many bytes: what a proxy that
/// does not open TLS cannot tell from TLS, without the cost of TLS at both ends.
pub(crate) const RAW: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 31);
pub(crate) const RAW_NAME: &str = "raw.test";

static ZEROS: [u8; 128 * 1024] = [0; 128 * 1024];

pub(crate) fn start(outside: &Outside) {
    for (address, name) in [(WEB, WEB_NAME), (RAW, RAW_NAME)] {
        outside.address(address);
        outside.name(name, Answer::Address(address.into()));
    }
    let mut config = outside.authority.server(&[WEB_NAME]);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    outside.custom(WEB, 443, move |stream| {
        let acceptor = acceptor.clone();
        async move {
            let _ = stream.set_nodelay(true);
            if let Ok(stream) = acceptor.accept(stream).await {
                let _ = web(stream).await;
            }
        }
    });
    outside.custom(RAW, 443, |stream| async move {
        let _ = raw(stream).await;
    });
}

async fn zeros<S: AsyncWrite + Unpin>(stream: &mut S, mut left: usize) -> std::io::Result<()> {
    while left > 0 {
        let count = left.min(ZEROS.len());
        stream.write_all(&ZEROS[..count]).await?;
        left -= count;
    }
    stream.flush().await
}

async fn web<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S) -> std::io::Result<()> {
    let (mut head, mut buffer) = (Vec::new(), [0; 2048]);
    loop {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            return stream.shutdown().await;
        }
        head.extend(&buffer[..count]);
        if !head.ends_with(b"\r\n\r\n") {
            continue;
        }
        let path = head.split(|byte| *byte == b' ').nth(1).unwrap_or_default();
        let bytes = std::str::from_utf8(path).ok().and_then(|path| path.get(1..)?.parse().ok());
        let bytes: usize = bytes.unwrap_or(0);
        head.clear();
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {bytes}\r\n\r\n");
        stream.write_all(answer.as_bytes()).await?;
        zeros(&mut stream, bytes).await?;
    }
}

async fn raw(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut head = [0; 5];
    stream.read_exact(&mut head).await?;
    let length = u16::from_be_bytes([head[3], head[4]]);
    stream.read_exact(&mut vec![0; length.into()]).await?;
    stream.write_all(b"!").await?;
    loop {
        let bytes = stream.read_u64().await?;
        zeros(&mut stream, usize::try_from(bytes).unwrap_or(0)).await?;
    }
}

//! What clients do through whatever is in the middle.

use std::{
    io,
    net::Ipv4Addr,
    sync::Arc,
    time::{Duration, Instant},
};

use rustls::{ClientConfig, RootCertStore, client::Resumption, pki_types::ServerName};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{
    origin::{RAW_NAME, WEB_NAME},
    rig::client::client_hello,
};

/// Where clients connect to, and whom they believe.
#[derive(Clone)]
pub(crate) struct Target {
    web: Ipv4Addr,
    raw: Ipv4Addr,
    config: Arc<ClientConfig>,
}

/// Hundredths of times, in milliseconds.
#[derive(Clone, Copy)]
pub(crate) struct Times {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

impl Times {
    pub(crate) fn of(mut times: Vec<f64>) -> Self {
        times.sort_by(f64::total_cmp);
        let at = |hundredth: usize| {
            times.get(times.len() * hundredth / 100).or(times.last()).copied().unwrap_or(f64::NAN)
        };
        Self { p50: at(50), p99: at(99) }
    }
}

impl Target {
    pub(crate) fn new(web: Ipv4Addr, raw: Ipv4Addr, roots: RootCertStore) -> Self {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("the versions are the default")
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        // Every connection is a new one.
        config.resumption = Resumption::disabled();
        Self { web, raw, config: Arc::new(config) }
    }

    async fn open(&self) -> io::Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect((self.web, 443)).await?;
        stream.set_nodelay(true)?;
        let name = ServerName::try_from(WEB_NAME).map_err(io::Error::other)?;
        TlsConnector::from(self.config.clone()).connect(name, stream).await
    }

    async fn open_raw(&self, hello: &[u8]) -> io::Result<TcpStream> {
        let mut stream = TcpStream::connect((self.raw, 443)).await?;
        stream.set_nodelay(true)?;
        stream.write_all(hello).await?;
        stream.read_exact(&mut [0]).await?;
        Ok(stream)
    }
}

/// Asks for so many bytes and reads them all.
async fn ask(stream: &mut TlsStream<TcpStream>, bytes: usize) -> io::Result<()> {
    let request = format!("GET /{bytes} HTTP/1.1\r\nHost: {WEB_NAME}\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut buffer = vec![0; if bytes == 0 { 512 } else { 256 * 1024 }];
    let (mut head, mut got) = (Vec::new(), None);
    loop {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let body = match got {
            Some(before) => before + count,
            None => {
                head.extend_from_slice(&buffer[..count]);
                let Some(at) = head.windows(4).position(|it| it == b"\r\n\r\n") else { continue };
                if !head.starts_with(b"HTTP/1.1 200") {
                    return Err(io::Error::other(String::from_utf8_lossy(&head).into_owned()));
                }
                head.len() - at - 4
            }
        };
        got = Some(body);
        if body >= bytes {
            return Ok(());
        }
    }
}

/// Connections one after the other, with one request each.
pub(crate) async fn connections(target: Target, count: u32) -> io::Result<Vec<f64>> {
    let mut times = Vec::new();
    for _ in 0..count {
        let start = Instant::now();
        let mut stream = target.open().await?;
        ask(&mut stream, 0).await?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
        let _ = stream.shutdown().await;
    }
    Ok(times)
}

/// Requests on so many connections side by side, each as soon as the one before is answered. How
/// long each took, and all together in seconds.
pub(crate) async fn requests(
    target: Target,
    side_by_side: u32,
    each: u32,
) -> io::Result<(Vec<f64>, f64)> {
    let mut streams = Vec::new();
    for _ in 0..side_by_side {
        let mut stream = target.open().await?;
        ask(&mut stream, 0).await?;
        streams.push(stream);
    }
    let (start, mut all) = (Instant::now(), JoinSet::new());
    for mut stream in streams {
        all.spawn(async move {
            let mut times = Vec::new();
            for _ in 0..each {
                let start = Instant::now();
                ask(&mut stream, 0).await?;
                times.push(start.elapsed().as_secs_f64() * 1e3);
            }
            Ok::<_, io::Error>(times)
        });
    }
    let mut times = Vec::new();
    while let Some(done) = all.join_next().await {
        times.extend(done.map_err(io::Error::other)??);
    }
    Ok((times, start.elapsed().as_secs_f64()))
}

/// Bytes to the client on so many connections side by side. Seconds.
pub(crate) async fn relay(
    target: Target,
    opened: bool,
    side_by_side: u32,
    bytes_each: usize,
) -> io::Result<f64> {
    let (start, mut all) = (Instant::now(), JoinSet::new());
    for _ in 0..side_by_side {
        let target = target.clone();
        all.spawn(async move {
            if opened {
                let mut stream = target.open().await?;
                return ask(&mut stream, bytes_each).await;
            }
            let mut stream = target.open_raw(&client_hello(RAW_NAME)).await?;
            stream.write_all(&u64::try_from(bytes_each).unwrap_or(0).to_be_bytes()).await?;
            let (mut left, mut buffer) = (bytes_each, vec![0; 256 * 1024]);
            while left > 0 {
                match stream.read(&mut buffer).await? {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    count => left -= count,
                }
            }
            Ok(())
        });
    }
    while let Some(done) = all.join_next().await {
        done.map_err(io::Error::other)??;
    }
    Ok(start.elapsed().as_secs_f64())
}

/// A connection that has been used and says nothing now.
pub(crate) enum Idle {
    Raw(#[allow(dead_code)] TcpStream),
    Web(#[allow(dead_code)] Box<TlsStream<TcpStream>>),
}

pub(crate) async fn idle(target: Target, opened: bool, count: u32) -> io::Result<Vec<Idle>> {
    let (mut held, hello) = (Vec::new(), client_hello(RAW_NAME));
    for _ in 0..count {
        held.push(if opened {
            let mut stream = Box::new(target.open().await?);
            ask(&mut stream, 0).await?;
            Idle::Web(stream)
        } else {
            Idle::Raw(target.open_raw(&hello).await?)
        });
    }
    // What the last ones left to be done.
    tokio::time::sleep(Duration::from_millis(50)).await;
    Ok(held)
}

//! Row F14 of the attack list: what one sandbox that takes all it can costs its neighbour, beside
//! what one that is busy and well-behaved does. Both are served by the same process.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::{process::setpriority_process, thread::gettid};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::rig::{
    Answer, Rig,
    client::{GATEWAY, client_hello, query},
};

const NEIGHBOUR: &str = "bbbbbbbbbbbbbbbbbbbb";
/// Where the crowd's connections go: as many bytes as anybody reads, whatever is sent.
const SINK: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 40);
const SINK_NAME: &str = "sink.test";
/// The neighbour's server, on a thread of its own: the crowd's is busy with the crowd.
const QUIET: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 41);
const QUIET_NAME: &str = "quiet.test";

const POLICY: &str = r#"{"defaultAction": "Deny", "trafficInspection": "Partial", "hostRules": [
    {"pattern": "sink.test", "action": "Allow"}, {"pattern": "quiet.test", "action": "Allow"}]}"#;

/// Connections of a sandbox that is busy and well-behaved, all at full rate.
const BUSY_CONNECTIONS: u32 = 32;
/// Between two tries of the neighbour's.
const PAUSE: Duration = Duration::from_millis(2);
/// A connection in the making waits for so many others.
const OPENING: usize = 200;
/// The guest and its servers have no more of the machine's memory than this for each connection:
/// they are not what is looked at.
const BUFFERS: &str = "4096 65536 262144";

static PIECE: [u8; 64 * 1024] = [0; 64 * 1024];

/// What a neighbour waited for, in milliseconds, one after the other.
#[derive(Default)]
pub(crate) struct Waits {
    pub(crate) requests: Vec<f64>,
    pub(crate) connections: Vec<f64>,
    pub(crate) names: Vec<f64>,
}

/// What the other sandbox does meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Crowd {
    Nobody,
    Busy,
    /// So many connections at full rate, and all else that a guest can do.
    Hostile(u32),
}

pub(crate) struct Fair {
    rig: Arc<Rig>,
}

impl Fair {
    pub(crate) fn new() -> Self {
        let mut rig = Rig::new(POLICY);
        rig.add(NEIGHBOUR, POLICY);
        for (address, name) in [(SINK, SINK_NAME), (QUIET, QUIET_NAME)] {
            rig.outside.address(address);
            rig.outside.name(name, Answer::Address(address.into()));
        }
        for buffers in ["tcp_rmem", "tcp_wmem"] {
            rig.sysctl_of_both(&format!("net.ipv4.{buffers}='{BUFFERS}'"));
        }
        rig.sysctl_of_both("net.ipv4.ip_local_port_range='2048 65000'");
        rig.outside.custom(SINK, 443, |stream| async move {
            let (mut read, mut write) = stream.into_split();
            let swallow = async {
                let mut buffer = vec![0; 16 * 1024];
                while read.read(&mut buffer).await? > 0 {}
                Ok::<_, io::Error>(())
            };
            let _ = tokio::try_join!(swallow, pour(&mut write));
        });
        Self { rig: Arc::new(rig) }
    }

    /// What the neighbour waits for during `time`, beside this crowd.
    pub(crate) fn measure(&self, crowd: Crowd, time: Duration) -> Waits {
        let (stop, ready) = (AtomicBool::new(false), AtomicU32::new(0));
        thread::scope(|scope| {
            scope.spawn(|| self.serve_neighbour(&stop));
            let wanted = match crowd {
                Crowd::Nobody => 0,
                Crowd::Busy => BUSY_CONNECTIONS,
                Crowd::Hostile(count) => count,
            };
            if wanted > 0 {
                let (ready, stop) = (&ready, &stop);
                scope.spawn(move || self.crowd(wanted, ready, stop));
            }
            if let Crowd::Hostile(_) = crowd {
                scope.spawn(|| self.more(&stop));
                scope.spawn(|| self.questions(&stop));
            }
            let start = Instant::now();
            while ready.load(Relaxed) < wanted {
                assert!(
                    start.elapsed() < Duration::from_secs(120),
                    "{crowd:?} does not come about"
                );
                thread::sleep(Duration::from_millis(20));
            }
            let waits = self.rig.in_guest_of(1, || probe(time));
            stop.store(true, Relaxed);
            waits.unwrap_or_else(|error| panic!("the neighbour of {crowd:?} failed: {error}"))
        })
    }

    fn serve_neighbour(&self, stop: &AtomicBool) {
        self.rig.in_outside(|| {
            ahead();
            let listener = std::net::TcpListener::bind((QUIET, 443)).expect("it listens");
            listener.set_nonblocking(true).expect("it does not block");
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).expect("it listens");
                while !stop.load(Relaxed) {
                    let accepted = tokio::time::timeout(PAUSE * 50, listener.accept()).await;
                    let Ok(Ok((mut stream, _))) = accepted else { continue };
                    tokio::spawn(async move {
                        let _ = stream.set_nodelay(true);
                        let mut buffer = [0; 4096];
                        while let Ok(1..) = stream.read(&mut buffer).await {
                            let _ = stream.write_all(b"!").await;
                        }
                    });
                }
            });
        });
    }

    /// Opens connections and has all of them send and receive as fast as they can.
    fn crowd(&self, count: u32, ready: &AtomicU32, stop: &AtomicBool) {
        self.rig.in_guest(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.expect("a runtime");
            runtime.block_on(async {
                let opening = Arc::new(tokio::sync::Semaphore::new(OPENING));
                let opened = Arc::new(AtomicU32::new(0));
                let mut all = tokio::task::JoinSet::new();
                for _ in 0..count {
                    let (opening, opened) = (opening.clone(), opened.clone());
                    all.spawn(async move { flood(&opening, &opened).await });
                }
                while !stop.load(Relaxed) {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    ready.store(opened.load(Relaxed), Relaxed);
                }
            });
        });
    }

    /// Asks for connections that it may not have any more.
    fn more(&self, stop: &AtomicBool) {
        self.rig.in_guest(|| {
            let hello = client_hello(SINK_NAME);
            while !stop.load(Relaxed) {
                let address = SocketAddr::from((SINK, 443));
                if let Ok(mut stream) = TcpStream::connect_timeout(&address, PAUSE * 50) {
                    let _ = stream.write_all(&hello);
                }
                thread::sleep(Duration::from_micros(200));
            }
        });
    }

    /// Asks for names, all the time.
    fn questions(&self, stop: &AtomicBool) {
        self.rig.in_guest(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
            let mut number = 0;
            while !stop.load(Relaxed) {
                number += 1;
                let query = query(&format!("n{number}.evil.test"), 1, 1);
                for _ in 0..20 {
                    let _ = socket.send_to(&query, (GATEWAY, 53));
                }
                thread::sleep(Duration::from_micros(400));
            }
        });
    }
}

/// This thread is not what is looked at, and is not to wait for the crowd's.
fn ahead() {
    let outcome = setpriority_process(Some(gettid()), -20);
    assert!(outcome.is_ok(), "{outcome:?}");
}

async fn flood(opening: &tokio::sync::Semaphore, opened: &AtomicU32) -> io::Result<()> {
    let stream = {
        let _place = opening.acquire().await.map_err(io::Error::other)?;
        loop {
            let tried = open_sink().await;
            match tried {
                Ok(stream) => break stream,
                // The other crowd of connections had taken its place.
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
        }
    };
    opened.fetch_add(1, Relaxed);
    let (mut read, mut write) = stream.into_split();
    let swallow = async {
        let mut buffer = vec![0; 16 * 1024];
        while read.read(&mut buffer).await? > 0 {}
        Ok::<_, io::Error>(())
    };
    tokio::try_join!(swallow, pour(&mut write)).map(|_| ())
}

/// Sends for as long as anybody reads.
async fn pour(write: &mut tokio::net::tcp::OwnedWriteHalf) -> io::Result<()> {
    loop {
        write.write_all(&PIECE).await?;
    }
}

async fn open_sink() -> io::Result<tokio::net::TcpStream> {
    let mut stream = tokio::net::TcpStream::connect((SINK, 443)).await?;
    stream.write_all(&client_hello(SINK_NAME)).await?;
    stream.read_exact(&mut [0]).await?;
    Ok(stream)
}

fn open_quiet(hello: &[u8]) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect((QUIET, 443))?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    stream.set_nodelay(true)?;
    stream.write_all(hello)?;
    stream.read_exact(&mut [0])?;
    Ok(stream)
}

fn probe(time: Duration) -> io::Result<Waits> {
    ahead();
    let (hello, question) = (client_hello(QUIET_NAME), query(QUIET_NAME, 1, 1));
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(Duration::from_secs(10)))?;
    socket.connect((GATEWAY, 53))?;
    let mut kept = open_quiet(&hello)?;
    let (mut waits, start) = (Waits::default(), Instant::now());
    let ms = |since: Instant| since.elapsed().as_secs_f64() * 1e3;
    while start.elapsed() < time {
        let began = Instant::now();
        kept.write_all(b"?")?;
        kept.read_exact(&mut [0])?;
        waits.requests.push(ms(began));
        thread::sleep(PAUSE);
        let began = Instant::now();
        drop(open_quiet(&hello)?);
        waits.connections.push(ms(began));
        thread::sleep(PAUSE);
        let began = Instant::now();
        socket.send(&question)?;
        socket.recv(&mut [0; 512])?;
        waits.names.push(ms(began));
        thread::sleep(PAUSE);
    }
    Ok(waits)
}

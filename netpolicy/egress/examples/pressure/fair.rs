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

use crate::{
    rig::{
        Answer, Rig,
        client::{GATEWAY, client_hello, query},
    },
    sys::cpu_time_of,
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

/// What a neighbour waited for, one after the other.
#[derive(Default)]
pub(crate) struct Waits {
    pub(crate) requests: Vec<Wait>,
    pub(crate) connections: Vec<Wait>,
    pub(crate) names: Vec<Wait>,
}

/// How long it waited, in milliseconds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wait {
    pub(crate) time: f64,
    /// What the process used meanwhile: all of the wait that is its own doing. The rest is whoever
    /// else wants this machine.
    pub(crate) cpu: f64,
}

/// Something that the neighbour waits for.
struct Waiting {
    process: u32,
    start: Instant,
    used: Duration,
}

impl Waiting {
    fn begin(process: u32) -> Self {
        Self { process, start: Instant::now(), used: cpu_time_of(process) }
    }

    fn end(self) -> Wait {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let used = cpu_time_of(self.process).saturating_sub(self.used);
        Wait { time: ms(self.start.elapsed()), cpu: ms(used) }
    }
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
    /// `connections`: as many as a sandbox may have.
    pub(crate) fn new(connections: u32) -> Self {
        let mut rig = Rig::with(POLICY, |configure| configure.limits.connections = connections);
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
            let _ = sink(stream).await;
        });
        Self { rig: Arc::new(rig) }
    }

    /// What the neighbour waits for during `time`, beside this crowd.
    pub(crate) fn measure(&self, crowd: Crowd, time: Duration) -> Waits {
        let (stop, ready) = (AtomicBool::new(false), AtomicU32::new(0));
        let (serving, served) = std::sync::mpsc::channel();
        thread::scope(|scope| {
            let stop_serving = &stop;
            scope.spawn(move || self.serve_neighbour(&serving, stop_serving));
            served.recv().expect("the neighbour's server begins");
            let wanted = match crowd {
                Crowd::Nobody => 0,
                Crowd::Busy => BUSY_CONNECTIONS,
                Crowd::Hostile(count) => count,
            };
            if wanted > 0 {
                let (ready, stop) = (&ready, &stop);
                scope.spawn(move || self.crowd(wanted, ready, stop));
            }
            let start = Instant::now();
            while ready.load(Relaxed) < wanted {
                assert!(
                    start.elapsed() < Duration::from_secs(120),
                    "{crowd:?} does not come about"
                );
                thread::sleep(Duration::from_millis(20));
            }
            if let Crowd::Hostile(_) = crowd {
                scope.spawn(|| self.more(&stop));
                scope.spawn(|| self.questions(&stop));
            }
            let process = self.rig.program_id();
            let waits = self.rig.in_guest_of(1, || probe(process, time));
            stop.store(true, Relaxed);
            waits.unwrap_or_else(|error| panic!("the neighbour of {crowd:?} failed: {error}"))
        })
    }

    fn serve_neighbour(&self, serving: &std::sync::mpsc::Sender<()>, stop: &AtomicBool) {
        self.rig.in_outside(|| {
            ahead();
            let listener = std::net::TcpListener::bind((QUIET, 443)).expect("it listens");
            listener.set_nonblocking(true).expect("it does not block");
            serving.send(()).expect("somebody waits for it");
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
            behind();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.expect("a runtime");
            runtime.block_on(async {
                let opening = Arc::new(tokio::sync::Semaphore::new(OPENING));
                let opened = Arc::new(AtomicU32::new(0));
                let (go, gone) = tokio::sync::watch::channel(false);
                let mut all = tokio::task::JoinSet::new();
                for _ in 0..count {
                    let (opening, opened, gone) = (opening.clone(), opened.clone(), gone.clone());
                    all.spawn(async move { flood(&opening, &opened, gone).await });
                }
                while !stop.load(Relaxed) {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    if opened.load(Relaxed) == count && !go.send_replace(true) {
                        // All at full rate from here on, and a moment to get there.
                        tokio::time::sleep(Duration::from_millis(500)).await;
                        ready.store(count, Relaxed);
                    }
                }
            });
        });
    }

    /// Asks for connections that it may not have any more.
    fn more(&self, stop: &AtomicBool) {
        self.rig.in_guest(|| {
            behind();
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
            behind();
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
    nice(-20);
}

/// This one neither, and is not to keep the process waiting that is looked at: on a node each guest
/// has its share of the CPU, and the process has its own.
fn behind() {
    nice(19);
}

fn nice(niceness: i32) {
    let outcome = setpriority_process(Some(gettid()), niceness);
    assert!(outcome.is_ok(), "{outcome:?}");
}

/// Answers once, and when it hears more sends and receives as fast as it can.
async fn sink(mut stream: tokio::net::TcpStream) -> io::Result<()> {
    if stream.read(&mut [0; 2048]).await? == 0 {
        return Ok(());
    }
    stream.write_all(b"!").await?;
    stream.read_u8().await?;
    pump(stream).await
}

async fn pump(stream: tokio::net::TcpStream) -> io::Result<()> {
    let (mut read, mut write) = stream.into_split();
    let swallow = async {
        let mut buffer = vec![0; 16 * 1024];
        while read.read(&mut buffer).await? > 0 {
            // A runtime lets one task go on for long, and all of them are to be busy.
            tokio::task::yield_now().await;
        }
        Ok::<_, io::Error>(())
    };
    tokio::try_join!(swallow, pour(&mut write)).map(|_| ())
}

/// Sends for as long as anybody reads.
async fn pour(write: &mut tokio::net::tcp::OwnedWriteHalf) -> io::Result<()> {
    loop {
        write.write_all(&PIECE).await?;
        tokio::task::yield_now().await;
    }
}

/// One connection, which does as much as it can once all are there.
async fn flood(
    opening: &tokio::sync::Semaphore,
    opened: &AtomicU32,
    mut go: tokio::sync::watch::Receiver<bool>,
) -> io::Result<()> {
    let mut stream = {
        let _place = opening.acquire().await.map_err(io::Error::other)?;
        loop {
            match open_sink().await {
                Ok(stream) => break stream,
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
        }
    };
    opened.fetch_add(1, Relaxed);
    go.wait_for(|go| *go).await.map_err(io::Error::other)?;
    stream.write_all(b"?").await?;
    pump(stream).await
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

fn probe(process: u32, time: Duration) -> io::Result<Waits> {
    ahead();
    let (hello, question) = (client_hello(QUIET_NAME), query(QUIET_NAME, 1, 1));
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(Duration::from_secs(10)))?;
    socket.connect((GATEWAY, 53))?;
    let mut kept = open_quiet(&hello)?;
    let (mut waits, start) = (Waits::default(), Instant::now());
    while start.elapsed() < time {
        let waiting = Waiting::begin(process);
        kept.write_all(b"?")?;
        kept.read_exact(&mut [0])?;
        waits.requests.push(waiting.end());
        thread::sleep(PAUSE);
        let waiting = Waiting::begin(process);
        drop(open_quiet(&hello)?);
        waits.connections.push(waiting.end());
        thread::sleep(PAUSE);
        let waiting = Waiting::begin(process);
        socket.send(&question)?;
        socket.recv(&mut [0; 512])?;
        waits.names.push(waiting.end());
        thread::sleep(PAUSE);
    }
    Ok(waits)
}

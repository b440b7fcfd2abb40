//! Bytes between two sockets, both ways: copied first, by way of a buffer that all connections of a
//! thread share, and spliced in the kernel once a direction has shown that it goes on.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    os::fd::{AsFd, OwnedFd},
    pin::Pin,
    sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use rustix::pipe::{PipeFlags, SpliceFlags};
use tokio::{
    io::{AsyncRead, AsyncWriteExt, Interest, ReadBuf},
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    time::sleep,
};

use tokio_rustls::client::TlsStream;

use crate::{
    sandbox::{flow::Flow, turns},
    socket::Socket,
};

/// Bytes of a direction after which it is spliced: a pipe costs two descriptors and its making.
const SPLICE_FROM_BYTES: u64 = 256 * 1024;
/// Bytes copied at a time.
const COPY_BYTES: usize = 64 * 1024;
/// Bytes copied at a time while the sandbox has used up its buffers.
const COPY_BYTES_MIN: usize = 1024;
/// Bytes asked of the kernel in one splice. A pipe has 16 places, each of which holds up to 32 KiB of
/// what came in one piece.
const SPLICE_BYTES: usize = 128 * 1024;
/// Pipes of the process. The kernel gives a user who is not root some 1024 of full size.
const PIPES_MAX: usize = 768;

static PIPES: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Holds bytes only between a read and the write behind it, in which nobody waits.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; COPY_BYTES]);
}

/// Lends the thread's buffer, of [`COPY_BYTES`].
pub(crate) fn with_scratch<T>(work: impl FnOnce(&mut [u8]) -> T) -> T {
    SCRATCH.with_borrow_mut(|scratch| work(scratch))
}

/// One direction.
struct Way<'a> {
    from: ReadHalf<'a>,
    to: WriteHalf<'a>,
    flow: &'a Flow,
    count: &'a AtomicU64,
    /// One of both directions has ended.
    half_ended: &'a AtomicBool,
    buffer_bytes_max: u64,
}

/// Relays until both sides have ended, or one fails, or nothing has come for `idle`.
pub(crate) async fn relay(
    mut guest: Socket,
    mut server: Socket,
    buffer_bytes_max: u32,
    idle: Duration,
) -> io::Result<()> {
    let flow = guest.flow.clone();
    let half_ended = AtomicBool::new(false);
    {
        let (from_guest, to_guest) = guest.stream.split();
        let (from_server, to_server) = server.stream.split();
        let way = |from, to, count| Way {
            from,
            to,
            flow: &flow,
            count,
            half_ended: &half_ended,
            buffer_bytes_max: u64::from(buffer_bytes_max),
        };
        let mut up = way(from_guest, to_server, &flow.sent);
        let mut down = way(from_server, to_guest, &flow.received);
        let both = async { tokio::try_join!(up.run(), down.run()) };
        tokio::select! {
            ended = both => ended?,
            () = quiet(&flow, idle) => return Err(io::ErrorKind::TimedOut.into()),
        };
    }
    guest.close_cleanly();
    server.close_cleanly();
    Ok(())
}

/// Waits until no byte of the guest's has moved for `idle`, and at most twice that.
pub(crate) async fn quiet(flow: &Flow, idle: Duration) {
    let mut seen = None;
    loop {
        sleep(idle).await;
        let now = Some((flow.sent.load(Relaxed), flow.received.load(Relaxed)));
        if now == std::mem::replace(&mut seen, now) {
            return;
        }
    }
}

/// What a read and the write behind it came to.
enum Step {
    End,
    Moved(u64),
    /// The rest, which the other side did not take.
    Left(u64, Vec<u8>),
}

impl Way<'_> {
    async fn run(&mut self) -> io::Result<()> {
        let mut moved = 0;
        loop {
            let count = match poll_fn(|cx| self.poll_step(cx)).await? {
                Step::End => break,
                Step::Moved(count) => count,
                Step::Left(count, rest) => {
                    self.write_rest(&rest).await?;
                    count
                }
            };
            moved += count;
            self.count.fetch_add(count, Relaxed);
            // One connection at full rate must not keep the others waiting.
            turns::pause().await;
            if moved >= SPLICE_FROM_BYTES
                && let Some(pipe) = Pipe::new()
            {
                self.splice(pipe).await?;
                break;
            }
        }
        if self.half_ended.swap(true, Relaxed) {
            // The other direction has ended too: both sockets are closed now.
            return Ok(());
        }
        rustix::net::shutdown(self.to.as_ref(), rustix::net::Shutdown::Write).or_else(gone)
    }

    /// Reads as a stream is polled, not whenever it may be readable: a read that leaves room has
    /// emptied the socket, and the one that would find that out is spared.
    fn poll_step(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Step>> {
        let counter = &self.flow.sandbox.counters.buffer_bytes;
        let free = self.buffer_bytes_max.saturating_sub(counter.load(Relaxed));
        let room = usize::try_from(free).unwrap_or(COPY_BYTES).clamp(COPY_BYTES_MIN, COPY_BYTES);
        with_scratch(|scratch| {
            let mut buffer = ReadBuf::new(&mut scratch[..room]);
            ready!(Pin::new(&mut self.from).poll_read(cx, &mut buffer))?;
            self.flow.check()?;
            let bytes = buffer.filled();
            if bytes.is_empty() {
                return Poll::Ready(Ok(Step::End));
            }
            let written = match self.to.try_write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                written => written?,
            };
            let total = u64::try_from(bytes.len()).unwrap_or(0);
            Poll::Ready(Ok(if written == bytes.len() {
                Step::Moved(total)
            } else {
                Step::Left(total, bytes[written..].to_vec())
            }))
        })
    }

    async fn write_rest(&self, rest: &[u8]) -> io::Result<()> {
        let counter = &self.flow.sandbox.counters.buffer_bytes;
        let _held = Held::new(counter, rest.len());
        let mut at = 0;
        while at < rest.len() {
            self.to.writable().await?;
            self.flow.check()?;
            match self.to.try_write(&rest[at..]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => at += written?,
            }
        }
        Ok(())
    }

    async fn splice(&self, pipe: Pipe) -> io::Result<()> {
        let (from, to): (&TcpStream, &TcpStream) = (self.from.as_ref(), self.to.as_ref());
        // The last segment of what was sent is not full and waits for more.
        let mut waits = false;
        loop {
            let filled = splice_some(from, Interest::READABLE, || {
                let filled = splice(from, &pipe.write, SPLICE_BYTES, false);
                if waits && !matches!(filled, Ok(1..)) {
                    // Nothing more comes for now. Set once more it sends what waits.
                    to.set_nodelay(true)?;
                    waits = false;
                }
                filled
            });
            let mut left = filled.await?;
            if left == 0 {
                return Ok(());
            }
            self.flow.check()?;
            self.count.fetch_add(u64::try_from(left).unwrap_or(0), Relaxed);
            // There is more, most likely: a segment that is not full costs as much as a full one.
            waits = left >= SPLICE_BYTES;
            while left > 0 {
                let drained =
                    splice_some(to, Interest::WRITABLE, || splice(&pipe.read, to, left, waits));
                left -= drained.await?;
                self.flow.check()?;
            }
            turns::pause().await;
        }
    }
}

/// A side that has gone needs to be told nothing.
fn gone(errno: rustix::io::Errno) -> io::Result<()> {
    if errno == rustix::io::Errno::NOTCONN { Ok(()) } else { Err(errno.into()) }
}

async fn splice_some(
    stream: &TcpStream,
    interest: Interest,
    splice: impl FnMut() -> io::Result<usize>,
) -> io::Result<usize> {
    stream.async_io(interest, splice).await
}

fn splice(from: &impl AsFd, to: &impl AsFd, bytes: usize, more: bool) -> io::Result<usize> {
    let mut flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
    flags.set(SpliceFlags::MORE, more);
    Ok(rustix::pipe::splice(from, None, to, None, bytes, flags)?)
}

struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

impl Pipe {
    /// `None`: there are as many as there may be. Copying works too.
    fn new() -> Option<Self> {
        if PIPES.fetch_add(1, Relaxed) < PIPES_MAX
            && let Ok((read, write)) =
                rustix::pipe::pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC)
        {
            return Some(Self { read, write });
        }
        PIPES.fetch_sub(1, Relaxed);
        None
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        PIPES.fetch_sub(1, Relaxed);
    }
}

/// Bytes counted for as long as they are held.
struct Held<'a> {
    counter: &'a AtomicU64,
    bytes: u64,
}

impl<'a> Held<'a> {
    fn new(counter: &'a AtomicU64, bytes: usize) -> Self {
        let bytes = u64::try_from(bytes).unwrap_or(0);
        counter.fetch_add(bytes, Relaxed);
        Self { counter, bytes }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.counter.fetch_sub(self.bytes, Relaxed);
    }
}

/// The same for a server behind TLS, all of it copied.
pub(crate) async fn relay_wrapped(
    guest: Socket,
    server: Box<TlsStream<Socket>>,
    first: Vec<u8>,
    idle: Duration,
) -> io::Result<()> {
    let flow = guest.flow.clone();
    let (mut guest, mut server) = (guest, server);
    server.write_all(&first).await?;
    flow.sent.fetch_add(u64::try_from(first.len()).unwrap_or(0), Relaxed);
    drop(first);
    tokio::select! {
        ended = tokio::io::copy_bidirectional(&mut guest, &mut server) => ended.map(drop),
        () = quiet(&flow, idle) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Sends bytes that were read before the relay began.
pub(crate) async fn send_first(
    server: &mut Socket,
    bytes: Vec<u8>,
    flow_sent: &AtomicU64,
) -> io::Result<()> {
    server.write_all(&bytes).await?;
    flow_sent.fetch_add(u64::try_from(bytes.len()).unwrap_or(0), Relaxed);
    Ok(())
}

/// When, from `now` on, something that began at `start` has had `max`.
pub(crate) fn left_of(max: Duration, start: Instant, now: Instant) -> Duration {
    max.saturating_sub(now.saturating_duration_since(start))
}

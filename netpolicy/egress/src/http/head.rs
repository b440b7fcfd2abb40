//! How long the head of a request may take. A connection may wait for its next request much longer
//! than a request for the rest of its head: the clock is set anew at the first byte.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use hyper::rt::{Sleep, Timer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// From the first byte of a request's head to its last.
pub(super) const HEAD_TIME_MAX: Duration = Duration::from_secs(10);
/// How long a connection may wait for the first byte of its next request.
pub(super) const NEXT_TIME_MAX: Duration = Duration::from_secs(60);

/// Whether anything came since the connection began to wait for a head.
#[derive(Debug, Clone, Default)]
struct Came(Arc<AtomicBool>);

/// The guest's end of a connection, and the clock for it.
pub(super) fn timed<S>(inner: S) -> (Heard<S>, HeadTimer) {
    let came = Came::default();
    (Heard { inner, came: came.clone() }, HeadTimer(came))
}

/// A connection that notes when something comes in.
pub(super) struct Heard<S> {
    inner: S,
    came: Came,
}

impl<S: AsyncRead + Unpin> AsyncRead for Heard<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(cx, buffer);
        if buffer.filled().len() > before {
            self.came.0.store(true, Relaxed);
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Heard<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

/// The timer of one connection of HTTP/1.1. hyper asks it for nothing but the time of a head: when
/// it begins to wait for one, and no more once it has one whole.
#[derive(Clone)]
pub(super) struct HeadTimer(Came);

impl Timer for HeadTimer {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Sleep>> {
        self.sleep_until(Instant::now() + duration)
    }

    fn sleep_until(&self, deadline: Instant) -> Pin<Box<dyn Sleep>> {
        self.0.0.store(false, Relaxed);
        let over = Box::pin(tokio::time::sleep_until(deadline.into()));
        Box::pin(HeadTime { over, came: self.0.clone(), began: false })
    }
}

struct HeadTime {
    over: Pin<Box<tokio::time::Sleep>>,
    came: Came,
    /// The first byte is there.
    began: bool,
}

impl Sleep for HeadTime {}

impl Future for HeadTime {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        // hyper polls it after each read that did not complete the head.
        if !self.began && self.came.0.load(Relaxed) {
            self.began = true;
            let end = tokio::time::Instant::now() + HEAD_TIME_MAX;
            if end < self.over.deadline() {
                self.over.as_mut().reset(end);
            }
        }
        self.over.as_mut().poll(cx)
    }
}

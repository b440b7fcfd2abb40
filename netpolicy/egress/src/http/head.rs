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
use tokio::io::{AsyncRead, ReadBuf};

use crate::socket::{Reading, Reads};

/// From the first byte of a request's head to its last.
pub(super) const HEAD_TIME_MAX: Duration = Duration::from_secs(10);
/// How long a connection may wait for the first byte of its next request.
pub(super) const NEXT_TIME_MAX: Duration = Duration::from_secs(60);

/// Whether anything came since the connection began to wait for a head.
#[derive(Debug, Clone, Default)]
pub(super) struct Came(Arc<AtomicBool>);

/// The guest's end of a connection of HTTP/1.1, and the clock for it.
pub(super) fn timed<S>(inner: S) -> (Reading<Came, S>, HeadTimer) {
    let came = Came::default();
    (Reading::new(came.clone(), inner), HeadTimer(came))
}

/// Notes when something comes in.
impl Reads for Came {
    fn poll_read<S: AsyncRead + Unpin>(
        &mut self,
        inner: Pin<&mut S>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = inner.poll_read(cx, buffer);
        if buffer.filled().len() > before {
            self.0.store(true, Relaxed);
        }
        polled
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

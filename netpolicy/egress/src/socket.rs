//! A TCP socket that belongs to a flow. Dropped before its end it is reset, with whatever still lay
//! in its buffers; once the flow is revoked it moves no byte.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::TcpStream,
    time::timeout,
};

use crate::sandbox::{flow::Flow, turns};

/// How long we wait for the other side to close after we have.
const FAREWELL_TIME_MAX: Duration = Duration::from_secs(2);
/// Bytes that are read and thrown away meanwhile.
const FAREWELL_BYTES_MAX: usize = 64 * 1024;

pub(crate) struct Socket {
    pub(crate) stream: TcpStream,
    /// It is the guest's end: what goes through it is what the flow is said to have moved.
    counts: bool,
    /// Closed as TCP closes, with what is in its buffers.
    clean: bool,
    // Last: the flow ends when the socket is closed.
    pub(crate) flow: Arc<Flow>,
}

impl Socket {
    /// The end towards a server.
    pub(crate) fn new(stream: TcpStream, flow: Arc<Flow>) -> Self {
        // Where it fails the socket is gone already.
        let _ = stream.set_nodelay(true);
        Self { stream, counts: false, clean: false, flow }
    }

    /// The end towards the guest.
    pub(crate) fn of_guest(stream: TcpStream, flow: Arc<Flow>) -> Self {
        let mut socket = Self::new(stream, flow);
        socket.counts = true;
        socket
    }

    fn count(&self, counter: &AtomicU64, bytes: usize) {
        if self.counts {
            counter.fetch_add(u64::try_from(bytes).unwrap_or(0), Relaxed);
        }
    }

    /// When it is dropped it is closed, not reset.
    pub(crate) fn close_cleanly(&mut self) {
        self.clean = true;
    }

    /// Sends what was written, tells the other side that there is no more, and gives it a moment to
    /// read that: a socket closed with something unread in it is reset.
    pub(crate) async fn end_cleanly(mut self) -> io::Result<()> {
        self.stream.shutdown().await?;
        let drain = async {
            let mut scratch = [0; 1024];
            let mut left = FAREWELL_BYTES_MAX;
            while left > 0 {
                match self.stream.read(&mut scratch).await {
                    Ok(0) | Err(_) => break,
                    Ok(count) => left = left.saturating_sub(count),
                }
            }
        };
        let _ = timeout(FAREWELL_TIME_MAX, drain).await;
        self.clean = true;
        Ok(())
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if !self.clean || self.flow.is_revoked() {
            // With no time to linger a close is a reset, and what was not sent is gone.
            let _ = self.stream.set_zero_linger();
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.flow.check()?;
        if turns::is_over() {
            // It goes on in the next turn.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        self.count(&self.flow.sent, buffer.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.flow.check()?;
        let count = ready!(Pin::new(&mut self.stream).poll_write(cx, bytes))?;
        self.count(&self.flow.received, count);
        Poll::Ready(Ok(count))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.flow.check()?;
        let count = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, pieces))?;
        self.count(&self.flow.received, count);
        Poll::Ready(Ok(count))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_shutdown(cx))?;
        self.clean = true;
        Poll::Ready(Ok(()))
    }
}

/// What there is between a stream and whoever reads from it.
pub(crate) trait Reads {
    fn poll_read<S: AsyncRead + Unpin>(
        &mut self,
        inner: Pin<&mut S>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>>;
}

/// A stream that is read from by way of something, and written to as it is.
pub(crate) struct Reading<R, S> {
    by: R,
    inner: S,
}

impl<R, S> Reading<R, S> {
    pub(crate) fn new(by: R, inner: S) -> Self {
        Self { by, inner }
    }
}

impl<R: Reads + Unpin, S: AsyncRead + Unpin> AsyncRead for Reading<R, S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Self { by, inner } = self.get_mut();
        by.poll_read(Pin::new(inner), cx, buffer)
    }
}

impl<R: Unpin, S: AsyncWrite + Unpin> AsyncWrite for Reading<R, S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// Bytes that were read already: they come first.
pub(crate) struct Prefix {
    bytes: Vec<u8>,
    at: usize,
}

impl Prefix {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, at: 0 }
    }
}

impl Reads for Prefix {
    fn poll_read<S: AsyncRead + Unpin>(
        &mut self,
        inner: Pin<&mut S>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let left = &self.bytes[self.at..];
        if left.is_empty() {
            return inner.poll_read(cx, buffer);
        }
        let count = left.len().min(buffer.remaining());
        buffer.put_slice(&left[..count]);
        self.at += count;
        if self.at == self.bytes.len() {
            // It has done its work: a connection may stay for hours.
            *self = Self::new(Vec::new());
        }
        Poll::Ready(Ok(()))
    }
}

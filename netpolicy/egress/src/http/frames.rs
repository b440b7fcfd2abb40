//! How long the parts of HTTP/2 may take that must come whole: what begins a connection, and heads of
//! requests with the frames they come in. hyper has no clock for them. Bodies may take their time.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, ReadBuf},
    time::{Sleep, sleep},
};

use crate::socket::Reads;

/// RFC 9113 3.4: what a client sends first.
const PREFACE_BYTES: usize = 24;
/// RFC 9113 4.1: length, type, flags and stream.
const FRAME_HEAD_BYTES: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

/// Where in its frames a stream of bytes is. Whether they make sense is for others to say.
struct Frames {
    /// Of the frame that comes in, as far as it is there.
    head: [u8; FRAME_HEAD_BYTES],
    head_bytes: usize,
    /// Bytes to come of its payload, or of the preface.
    payload_left: usize,
    /// Headers have begun whose end is not in a frame that is whole.
    in_headers: bool,
    in_preface: bool,
    /// How often something has begun.
    begun: u64,
}

impl Frames {
    const fn new() -> Self {
        Self {
            head: [0; FRAME_HEAD_BYTES],
            head_bytes: 0,
            payload_left: PREFACE_BYTES,
            in_headers: false,
            in_preface: true,
            begun: 0,
        }
    }

    fn heard(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.payload_left > 0 {
                let count = self.payload_left.min(bytes.len());
                self.payload_left -= count;
                bytes = &bytes[count..];
            } else {
                if self.head_bytes == 0 && !self.in_headers {
                    self.begun += 1;
                }
                let count = (FRAME_HEAD_BYTES - self.head_bytes).min(bytes.len());
                let (some, rest) = bytes.split_at(count);
                self.head[self.head_bytes..][..count].copy_from_slice(some);
                self.head_bytes += count;
                bytes = rest;
                if self.head_bytes < FRAME_HEAD_BYTES {
                    return;
                }
                let length = u32::from_be_bytes([0, self.head[0], self.head[1], self.head[2]]);
                self.payload_left = usize::try_from(length).unwrap_or(usize::MAX);
            }
            if self.payload_left == 0 {
                self.ended();
            }
        }
    }

    /// A frame is whole, or the preface.
    fn ended(&mut self) {
        if !self.in_preface && matches!(self.head[3], HEADERS | CONTINUATION) {
            self.in_headers = self.head[4] & END_HEADERS == 0;
        }
        self.in_preface = false;
        self.head_bytes = 0;
    }

    /// The number of what has begun and is to come whole in its time.
    fn due(&self) -> Option<u64> {
        let in_body = self.head_bytes == FRAME_HEAD_BYTES && self.head[3] == DATA;
        let in_frame = self.head_bytes > 0 && !in_body;
        (self.in_preface || self.in_headers || in_frame).then_some(self.begun)
    }
}

/// Fails when something takes longer than it may.
pub(super) struct Prompt {
    frames: Frames,
    time_max: Duration,
    /// For which there is a clock, and this.
    clock: Option<(u64, Pin<Box<Sleep>>)>,
}

impl Prompt {
    pub(super) const fn new(time_max: Duration) -> Self {
        Self { frames: Frames::new(), time_max, clock: None }
    }
}

impl Reads for Prompt {
    fn poll_read<S: AsyncRead + Unpin>(
        &mut self,
        inner: Pin<&mut S>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = inner.poll_read(cx, buffer);
        self.frames.heard(&buffer.filled()[before..]);
        let due = self.frames.due();
        if self.clock.as_ref().map(|(of, _)| *of) != due {
            let time_max = self.time_max;
            self.clock = due.map(|number| (number, Box::pin(sleep(time_max))));
        }
        // Only who waits for the guest looks at the clock: while we do not read it is not the guest
        // that takes its time.
        if polled.is_pending()
            && let Some((_, clock)) = &mut self.clock
            && clock.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        polled
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, duplex},
        time::{Instant, timeout},
    };

    use super::*;
    use crate::socket::Reading;

    const TIME_MAX: Duration = Duration::from_millis(200);

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u8::try_from(payload.len()).unwrap();
        [&[0, 0, length, kind, flags, 0, 0, 0, 1], payload].concat()
    }

    fn whole() -> Vec<u8> {
        let settings = frame(4, 0, &[]);
        let headers = frame(HEADERS, 0, b"begin");
        let ends = frame(CONTINUATION, END_HEADERS, b"end");
        let data = frame(DATA, 0, b"body");
        [&[b'P'; PREFACE_BYTES][..], &settings, &headers, &ends, &data].concat()
    }

    #[test]
    fn what_must_come_whole_is_known_wherever_the_bytes_are_cut() {
        let whole = whole();
        // Behind the preface, behind SETTINGS, behind the end of the headers; and all of the body
        // but the head of its frame.
        let settings = PREFACE_BYTES + FRAME_HEAD_BYTES;
        let headers = settings + 2 * FRAME_HEAD_BYTES + 8;
        let body = headers + FRAME_HEAD_BYTES;
        for cut in 0..=whole.len() {
            let due = ![PREFACE_BYTES, settings, headers].contains(&cut) && cut < body;
            for second in 0..=cut {
                let mut frames = Frames::new();
                frames.heard(&whole[..second]);
                frames.heard(&whole[second..cut]);
                assert_eq!(frames.due().is_some(), due, "cut at {second} and {cut}");
            }
        }
    }

    #[test]
    fn headers_that_go_on_are_one_thing_and_what_comes_behind_them_is_another() {
        let mut frames = Frames::new();
        frames.heard(&[b'P'; PREFACE_BYTES]);
        frames.heard(&frame(HEADERS, 0, b"begin"));
        let begun = frames.due();
        assert!(begun.is_some());
        for _ in 0..3 {
            frames.heard(&frame(CONTINUATION, 0, b"more"));
            assert_eq!(frames.due(), begun);
        }
        frames.heard(&frame(CONTINUATION, END_HEADERS, b"end"));
        assert_eq!(frames.due(), None);
        frames.heard(&frame(HEADERS, 0, b"next"));
        assert!(frames.due().is_some_and(|number| Some(number) != begun));
    }

    /// Sends `begin` and then one of `drops` after the other, forever, or nothing more. How long that
    /// was borne, up to ten times as long as it may be.
    async fn borne(begin: &[u8], drops: Option<&[u8]>, every: Duration) -> Option<Duration> {
        let (mut guest, ours) = duplex(1024);
        let mut ours = Reading::new(Prompt::new(TIME_MAX), ours);
        guest.write_all(begin).await.unwrap();
        let start = Instant::now();
        let drip = async {
            let Some(drops) = drops else { return std::future::pending().await };
            for drop in drops.iter().cycle() {
                tokio::time::sleep(every).await;
                if guest.write_all(&[*drop]).await.is_err() {
                    // The other side has what there is to tell.
                    std::future::pending::<()>().await;
                }
            }
        };
        let read = async {
            while ours.read(&mut [0; 64]).await.is_ok_and(|count| count > 0) {}
            start.elapsed()
        };
        tokio::select! {
            took = timeout(TIME_MAX * 10, read) => took.ok(),
            () = drip => unreachable!("it never ends"),
        }
    }

    #[tokio::test]
    async fn d14_what_drips_is_cut_in_time_and_a_body_or_a_connection_at_rest_is_not() {
        let preface = whole()[..PREFACE_BYTES].to_vec();
        let with = |bytes: &[u8]| [&preface[..], bytes].concat();
        let every = TIME_MAX / 20;
        let endless = frame(CONTINUATION, 0, b"");
        for (what, begin, drops) in [
            ("nothing at all", Vec::new(), None),
            ("a head of a frame", with(&[0]), None),
            ("headers", with(&[0, 0x40, 0, HEADERS, END_HEADERS, 0, 0, 0, 1]), Some(&b"x"[..])),
            ("headers that go on", with(&frame(HEADERS, 0, b"x")), Some(&endless)),
        ] {
            let took = borne(&begin, drops, every).await;
            assert!(took.is_some_and(|took| took >= TIME_MAX), "{what}: {took:?}");
        }
        let body = with(&[0, 0x40, 0, DATA, 0, 0, 0, 0, 1]);
        let rest = with(&frame(4, 0, &[]));
        for (what, begin, drops) in
            [("a body", &body, Some(&b"x"[..])), ("a connection at rest", &rest, None)]
        {
            assert_eq!(borne(begin, drops, every).await, None, "{what}");
        }
    }
}

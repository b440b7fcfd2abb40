//! What we answer ourselves, and bodies that pass.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use holdfast_wire::egress::Ended;
use hyper::{
    Response, StatusCode,
    body::{Body as _, Frame, Incoming, SizeHint},
    header::{CONTENT_TYPE, HeaderValue},
};

use super::server::Lent;
use crate::sandbox::Sandbox;

/// A body, ours or one that passes.
pub(super) enum Body {
    Own(Option<Bytes>),
    Passing(Box<Passing>),
}

/// A body on its way, counted.
pub(super) struct Passing {
    body: Incoming,
    up: bool,
    tally: Arc<Tally>,
    /// The connection it comes from, for the next request once it is through.
    lent: Option<Lent>,
}

/// Bytes of the bodies of one request. Its end is told when both are through.
pub(super) struct Tally {
    sandbox: Arc<Sandbox>,
    number: u64,
    sent: AtomicU64,
    received: AtomicU64,
}

impl Tally {
    pub(super) fn new(sandbox: Arc<Sandbox>) -> Arc<Self> {
        let number = sandbox.group.next_flow();
        Arc::new(Self { sandbox, number, sent: AtomicU64::new(0), received: AtomicU64::new(0) })
    }

    pub(super) fn number(&self) -> u64 {
        self.number
    }
}

impl Drop for Tally {
    fn drop(&mut self) {
        self.sandbox.group.audit.ended(Ended {
            sandbox: self.sandbox.id.clone(),
            flow: self.number,
            sent_bytes: self.sent.load(Relaxed),
            received_bytes: self.received.load(Relaxed),
            revoked: false,
        });
    }
}

impl Body {
    pub(super) fn empty() -> Self {
        Self::Own(None)
    }

    /// From the guest.
    pub(super) fn up(body: Incoming, tally: Arc<Tally>) -> Self {
        Self::Passing(Box::new(Passing { body, up: true, tally, lent: None }))
    }

    /// To the guest.
    pub(super) fn down(body: Incoming, tally: Arc<Tally>, lent: Option<Lent>) -> Self {
        Self::Passing(Box::new(Passing { body, up: false, tally, lent }))
    }
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match self.get_mut() {
            Self::Own(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Passing(passing) => {
                let frame = ready!(Pin::new(&mut passing.body).poll_frame(cx));
                match &frame {
                    Some(Ok(frame)) => {
                        let bytes = frame.data_ref().map_or(0, Bytes::len);
                        let Tally { sent, received, .. } = &*passing.tally;
                        let counter = if passing.up { sent } else { received };
                        counter.fetch_add(u64::try_from(bytes).unwrap_or(0), Relaxed);
                        if passing.body.is_end_stream() {
                            give_back(&mut passing.lent);
                        }
                    }
                    Some(Err(_)) => passing.lent = None,
                    None => give_back(&mut passing.lent),
                }
                Poll::Ready(frame)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Own(bytes) => bytes.is_none(),
            Self::Passing(passing) => passing.body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Own(bytes) => SizeHint::with_exact(
                u64::try_from(bytes.as_ref().map_or(0, Bytes::len)).unwrap_or(0),
            ),
            Self::Passing(passing) => passing.body.size_hint(),
        }
    }
}

fn give_back(lent: &mut Option<Lent>) {
    if let Some(lent) = lent.take() {
        lent.give_back();
    }
}

impl Drop for Passing {
    fn drop(&mut self) {
        // A body without a byte is never asked for a frame.
        if self.body.is_end_stream() {
            give_back(&mut self.lent);
        }
    }
}

/// A refusal that says so: whoever debugs it should not look for a broken network.
pub(super) fn refuse(status: StatusCode, code: &str, message: &str, hint: &str) -> Response<Body> {
    let error = serde_json::json!({"error": {"code": code, "message": message, "hint": hint}});
    let mut response = Response::new(Body::Own(Some(Bytes::from(error.to_string()))));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

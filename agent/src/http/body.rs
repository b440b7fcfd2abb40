//! Request bodies, bounded in size and in time.

use std::time::Duration;

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, stream};
use holdfast_api::{JSON_BYTES_MAX, decode::decode, error::Code};
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;
use tokio::{
    io::AsyncRead,
    time::{Instant, timeout, timeout_at},
};
use tokio_util::io::StreamReader;

use super::problem::Problem;

/// How long the next bytes of a body may take.
const BYTES_PATIENCE: Duration = Duration::from_secs(30);

/// How long a whole JSON body may take: it is at most a megabyte.
const JSON_PATIENCE: Duration = Duration::from_secs(60);

/// How much of a body that was refused for its size is still read, and how long: a client that is
/// cut off while it sends never sees the answer.
const DRAIN_BYTES_MAX: usize = 16 * 1024 * 1024;
const DRAIN_PATIENCE: Duration = Duration::from_secs(5);

/// The body as one JSON value.
pub(super) async fn json<T: DeserializeOwned>(body: Body) -> Result<T, Problem> {
    Ok(decode(&json_bytes(body).await?)?)
}

/// The body, if it is not larger than JSON may be.
pub(super) async fn json_bytes(mut body: Body) -> Result<Bytes, Problem> {
    let deadline = Instant::now() + JSON_PATIENCE;
    let mut bytes = BytesMut::new();
    loop {
        match timeout_at(deadline, next(&mut body)).await.unwrap_or_else(|_| Err(timed_out()))? {
            Some(data) if bytes.len() + data.len() > JSON_BYTES_MAX => {
                drain(&mut body).await;
                return Err(too_large(JSON_BYTES_MAX as u64));
            }
            Some(data) => bytes.extend_from_slice(&data),
            None => return Ok(bytes.freeze()),
        }
    }
}

/// The body as a reader that refuses what is over `limit` bytes. Its errors are for
/// [`Problem::of_body`].
pub(super) fn reader(body: Body, limit: u64) -> impl AsyncRead + Send + Unpin {
    let pieces = stream::try_unfold((body, 0_u64), move |(mut body, read)| async move {
        let Some(data) = next(&mut body).await.map_err(Problem::into_io)? else {
            return Ok(None);
        };
        let read = read + data.len() as u64;
        if read > limit {
            drain(&mut body).await;
            return Err(too_large(limit).into_io());
        }
        Ok(Some((data, (body, read))))
    });
    StreamReader::new(pieces.boxed())
}

async fn next(body: &mut Body) -> Result<Option<Bytes>, Problem> {
    loop {
        match timeout(BYTES_PATIENCE, body.frame()).await {
            Err(_) => return Err(timed_out()),
            Ok(None) => return Ok(None),
            Ok(Some(Ok(frame))) => match frame.into_data() {
                Ok(data) if data.is_empty() => {}
                Ok(data) => return Ok(Some(data)),
                // Trailers say nothing to us.
                Err(_) => {}
            },
            Ok(Some(Err(error))) => {
                let message = format!("the body broke off: {error}");
                return Err(Problem::new(Code::InvalidRequest, message, "send the body again"));
            }
        }
    }
}

async fn drain(body: &mut Body) {
    let mut left = DRAIN_BYTES_MAX;
    let rest = async {
        while let Ok(Some(data)) = next(body).await {
            left = left.saturating_sub(data.len());
            if left == 0 {
                break;
            }
        }
    };
    // However it ends, the answer follows.
    let _ = timeout(DRAIN_PATIENCE, rest).await;
}

fn too_large(limit: u64) -> Problem {
    let message = format!("the body is larger than {limit} bytes");
    Problem::new(Code::BodyTooLarge, message, "send less at once")
}

fn timed_out() -> Problem {
    Problem::new(Code::BodyTimedOut, "the body stopped coming", "send the request again")
}

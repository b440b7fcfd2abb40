//! JSON answers.

use axum::{
    body::Body,
    http::{HeaderValue, StatusCode, header},
    response::Response,
};
use jiff::Timestamp;
use serde::Serialize;

/// An answer with this status and body.
pub(super) fn json<T: Serialize>(status: u16, body: &T) -> Response {
    match serde_json::to_vec(body) {
        Ok(bytes) => json_bytes(status, bytes.into()),
        // Our bodies have string keys and no floats out of range; what else could be is our bug.
        Err(error) => {
            log::error!(error:%; "answer not encoded");
            empty(500)
        }
    }
}

/// An answer whose body is JSON already.
pub(super) fn json_bytes(status: u16, bytes: bytes::Bytes) -> Response {
    let mut response = Response::new(Body::from(bytes));
    *response.status_mut() = status_of(status);
    let kind = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

pub(super) fn empty(status: u16) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status_of(status);
    response
}

fn status_of(status: u16) -> StatusCode {
    StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}

/// RFC 3339 of milliseconds since 1970.
pub(super) fn rfc3339(ms: u64) -> String {
    let timestamp = i64::try_from(ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
    timestamp.unwrap_or_default().to_string()
}

//! What stands before every call but the open ones: the token, the api-version, the audit log, and
//! the statuses that clients must not replay.

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use axum::{
    extract::{MatchedPath, Request, State},
    http::{HeaderValue, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use holdfast_api::{API_VERSION, error::Code};
use jiff::Timestamp;
use log::{debug, error};
use tokio::sync::OwnedSemaphorePermit;

use super::{
    App,
    problem::{Problem, Refused},
    request::{Query, request_id},
};
use crate::{audit::Entry, auth::Caller, blocking::off_thread};

/// Seconds after which a client may ask again what failed. Small: the published SDK multiplies it
/// by ten, and without it waits for minutes.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

/// The connection that a request came on. Its place among the open ones is held until nothing of it
/// is at work.
#[derive(Clone)]
pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    pub(crate) _place: Arc<OwnedSemaphorePermit>,
}

pub(super) async fn guard(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let method = request.method().clone();
    let Some(caller) = caller(&app, &request) else {
        debug!(path = request.uri().path(); "call without a token this node knows");
        return unauthorized().into_response();
    };
    let call = Call::of(&request, caller);
    let response = match check_version(&request) {
        Ok(()) => next.run(request).await,
        Err(problem) => problem.into_response(),
    };
    let response = unplayable(&method, response);
    if call.mutating {
        let entry = call.answered(&response);
        record(&app, entry).await;
    }
    response
}

fn caller(app: &App, request: &Request) -> Option<Caller> {
    let header = request.headers().get(header::AUTHORIZATION)?;
    app.tokens.caller(header.as_bytes())
}

fn unauthorized() -> Problem {
    let hint = "send the header `Authorization: Bearer <token>`; the first admin token is in the \
                node's state folder";
    Problem::new(Code::Unauthorized, "the token is missing or not known to this node", hint)
}

fn check_version(request: &Request) -> Result<(), Problem> {
    let query = Query::parse(request.uri().query().unwrap_or_default())?;
    match query.get("api-version") {
        None | Some(API_VERSION) => Ok(()),
        Some(other) => {
            let other = super::request::shortened(other);
            let message = format!("api-version {other} is not known to this node");
            let hint = format!("use api-version {API_VERSION}, or leave it out");
            Err(Problem::new(Code::UnsupportedApiVersion, message, hint))
        }
    }
}

/// Clients replay a POST that was answered 500, 503 or 504, and anything with `Retry-After`: what
/// may have begun must not be begun again. Everything else may be, soon.
fn unplayable(method: &Method, mut response: Response) -> Response {
    if !response.status().is_server_error() {
        return response;
    }
    if method == Method::POST {
        *response.status_mut() = StatusCode::BAD_GATEWAY;
    } else {
        response.headers_mut().insert(header::RETRY_AFTER, RETRY_AFTER);
    }
    response
}

/// What the audit log says of a call before it is carried out.
struct Call {
    mutating: bool,
    began: Instant,
    entry: Entry,
}

impl Call {
    fn of(request: &Request, caller: Caller) -> Self {
        let method = request.method();
        let extensions = request.extensions();
        let route = extensions.get::<MatchedPath>().map_or("unknown", MatchedPath::as_str);
        // A stream opened by GET runs a command like a POST does.
        let mutating = !matches!(*method, Method::GET | Method::HEAD) || route.ends_with("/exec");
        let from = extensions.get::<Peer>().map(|peer| peer.address.to_string());
        let entry = Entry {
            time: Timestamp::now().to_string(),
            who: caller.name,
            from: from.unwrap_or_default(),
            what: format!("{method} {route}"),
            target: request.uri().path().to_owned(),
            status: 0,
            error: None,
            request_id: request_id(request.headers()).ok().flatten(),
            duration_ms: 0,
        };
        Self { mutating, began: Instant::now(), entry }
    }

    fn answered(self, response: &Response) -> Entry {
        let refused = response.extensions().get::<Refused>();
        Entry {
            status: response.status().as_u16(),
            error: refused.map(|Refused(code)| code.as_str().to_owned()),
            duration_ms: u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX),
            ..self.entry
        }
    }
}

async fn record(app: &Arc<App>, entry: Entry) {
    let log = Arc::clone(&app.audit);
    let written = off_thread(move || log.append(&entry)).await;
    // The call is done and its answer true: what is left is to stop being ready.
    app.audit_broken.store(written.is_err(), Ordering::Release);
    if let Err(error) = written {
        error!(error:%; "audit log not written");
    }
}

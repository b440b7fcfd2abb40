//! What others need to verify the tokens of groups' identities. Anybody may ask: it is public.

use std::sync::Arc;

use axum::{
    extract::State,
    http::{HeaderValue, header},
    response::Response,
};

use super::{App, answer::json, problem::Problem};
use crate::{blocking::off_thread, credentials::IdentityError, sandbox::now_ms};

/// Who keeps a copy of the keys asks again before another one signs, a day after it is first shown.
const KEPT_FOR: HeaderValue = HeaderValue::from_static("public, max-age=3600");

pub(super) async fn discovery(State(app): State<Arc<App>>) -> Response {
    kept(json(200, &app.registry.vault().issuer().discovery()))
}

pub(super) async fn jwks(State(app): State<Arc<App>>) -> Result<Response, Problem> {
    let issuer = Arc::clone(app.registry.vault().issuer());
    let keys = off_thread(move || issuer.jwks(now_ms())).await?;
    Ok(kept(json(200, &keys)))
}

fn kept(mut response: Response) -> Response {
    response.headers_mut().insert(header::CACHE_CONTROL, KEPT_FOR);
    response
}

impl From<IdentityError> for Problem {
    fn from(error: IdentityError) -> Self {
        Self::internal(&error, error.hint())
    }
}

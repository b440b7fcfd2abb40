//! One request: judged, sent on, answered.

use std::{net::IpAddr, sync::Arc, time::Duration};

use holdfast_netpolicy::Scheme;
use holdfast_wire::egress::{Kind, Verdict};
use hyper::{
    Request, Response, StatusCode, Uri, Version,
    body::{Body as _, Incoming},
    header::{CONNECTION, HOST, HeaderValue, UPGRADE},
};
use hyper_util::rt::TokioIo;
use tokio::time::timeout;

use super::{
    Door,
    answer::{Body, Tally, refuse},
    ask::{Asked, Host, Misasked, On},
    headers,
    judge::{Plan, judge},
    server::{Server, ServerError},
};
use crate::{
    relay::quiet,
    sandbox::{Because, Subject},
};

/// How often a request is judged anew because policy or values changed while a server was dialled.
const JUDGED_MAX: usize = 4;
/// How long a server may take to begin its answer.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(600);

/// Answers one request of a guest.
pub(super) async fn answer(door: Arc<Door>, request: Request<Incoming>) -> Response<Body> {
    let on = On {
        scheme: door.scheme,
        server_name: door.name.as_ref(),
        address: door.address,
        port: door.port,
    };
    let asked = match Asked::read(&request, &on) {
        Ok(asked) => asked,
        Err(misasked) => return refuse_misasked(&door, &request, &misasked),
    };
    match pass(&door, &asked, request).await {
        Ok(response) => response,
        Err(refusal) => refusal,
    }
}

fn refuse_misasked(door: &Door, request: &Request<Incoming>, why: &Misasked) -> Response<Body> {
    let about = Subject {
        host: why.host.clone(),
        method: request.method().to_string(),
        path: request.uri().path().to_owned(),
        ..about(door)
    };
    let because = Because::own(door.flow.sandbox.rules().generation, why.reason);
    door.flow.sandbox.record(Kind::Http, Verdict::Denied, &because, about);
    let hint = "this answer is from the egress proxy of the sandbox, not from the server";
    refuse(why.status, "EgressBadRequest", why.message, hint)
}

/// What every decision on this connection has.
fn about(door: &Door) -> Subject {
    Subject {
        scheme: door.scheme.as_str(),
        address: Some(door.address),
        port: door.port,
        ..Subject::default()
    }
}

fn subject(door: &Door, asked: &Asked, address: Option<IpAddr>) -> Subject {
    let host = match &asked.host {
        Host::Name(name) => name.to_string(),
        Host::Address(address) => address.to_string(),
    };
    Subject {
        host,
        method: asked.method.to_string(),
        path: asked.target.path().to_owned(),
        address: address.or(Some(door.address)),
        ..about(door)
    }
}

fn denied(
    door: &Door,
    asked: &Asked,
    because: &Because,
    address: Option<IpAddr>,
) -> Response<Body> {
    let about = subject(door, asked, address);
    let rule = because.rule.as_deref().unwrap_or("the default");
    let message = format!(
        "the egress policy of this sandbox denies {} {}://{}{}: {} ({rule})",
        about.method, about.scheme, about.host, about.path, because.reason
    );
    door.flow.sandbox.record(Kind::Http, Verdict::Denied, because, about);
    let hint =
        "`holdfast egress explain` says which rule decides; `holdfast egress set` changes it";
    refuse(StatusCode::FORBIDDEN, "EgressDenied", &message, hint)
}

fn failed(door: &Door, asked: &Asked, because: &Because, error: &ServerError) -> Response<Body> {
    let because = because.but(error.reason());
    if let ServerError::Dial(error) = error
        && error.is_denial()
    {
        return denied(door, asked, &because, error.address());
    }
    log::debug!(sandbox:% = door.flow.sandbox.id, error:?; "a request is not answered");
    let about = subject(door, asked, None);
    let message = format!("{} cannot be asked: {error} ({})", about.host, because.reason);
    door.flow.sandbox.record(Kind::Http, Verdict::Failed, &because, about);
    let hint = "this answer is from the egress proxy of the sandbox, not from the server";
    refuse(StatusCode::BAD_GATEWAY, "EgressUpstream", &message, hint)
}

/// Sends the request where the policy of this moment lets it go. `Err`: our own answer.
async fn pass(
    door: &Arc<Door>,
    asked: &Asked,
    request: Request<Incoming>,
) -> Result<Response<Body>, Response<Body>> {
    let h2 = request.version() == Version::HTTP_2;
    let sandbox = &door.flow.sandbox;
    let (mut parts, body) = request.into_parts();
    let upgrade = parts.extensions.remove::<hyper::upgrade::OnUpgrade>();
    let headers =
        headers::of_request(std::mem::take(&mut parts.headers), body.size_hint().exact().is_none());
    let tally = Tally::new(sandbox.clone());
    let mut body = Some(Body::up(body, tally.clone()));
    let fresh = asked.websocket;
    for _ in 0..JUDGED_MAX {
        let judged = judge(&sandbox.rules(), door, asked);
        let plan = judged.map_err(|because| denied(door, asked, &because, None))?;
        let got = door.servers.get(door, &plan, h2, fresh).await;
        let mut server = got.map_err(|error| failed(door, asked, &plan.because, &error))?;
        // Dialling takes time, in which the policy may have changed, or a value it refers to.
        if sandbox.rules().revision != plan.revision {
            continue;
        }
        if asked.websocket {
            let claim = plan.claim(door, asked, server.address);
            let stands = sandbox.judge(&door.flow, |rules| {
                let stands = claim.stands(rules);
                (stands.then_some(claim), stands)
            });
            if !stands {
                continue;
            }
        }
        let Some(body) = body.take() else { break };
        let (address, because) = (server.address, plan.because.clone());
        let request = write(plan, asked, headers.clone(), body, server.is_h2());
        let request = match request {
            Ok(request) => request,
            Err(error) => return Err(unwritable(door, asked, &because, &error)),
        };
        let response = match send(&mut server, request).await {
            Ok(response) => response,
            Err((_, Some(unsent))) if server.used && !fresh => {
                // The server had closed the connection meanwhile, and has seen nothing of it.
                let unsent = unsent.into_body();
                drop(server);
                let sent = Retry { door, asked, because: &because, headers: &headers, h2 };
                return sent.again(unsent, &tally).await;
            }
            Err((error, _)) => return Err(failed(door, asked, &because, &error)),
        };
        return Ok(done(door, asked, (&because, address), server, response, &tally, upgrade));
    }
    let because = Because::own(sandbox.rules().generation, "policy_changing");
    Err(denied(door, asked, &because, None))
}

/// A request of which nothing was sent, on its way once more.
struct Retry<'a> {
    door: &'a Arc<Door>,
    asked: &'a Asked,
    because: &'a Because,
    headers: &'a hyper::HeaderMap,
    h2: bool,
}

impl Retry<'_> {
    async fn again(
        &self,
        body: Body,
        tally: &Arc<Tally>,
    ) -> Result<Response<Body>, Response<Body>> {
        let Self { door, asked, because, headers, h2 } = self;
        let judged = judge(&door.flow.sandbox.rules(), door, asked);
        let plan = judged.map_err(|because| denied(door, asked, &because, None))?;
        let got = door.servers.get(door, &plan, *h2, true).await;
        let mut server = got.map_err(|error| failed(door, asked, because, &error))?;
        if door.flow.sandbox.rules().revision != plan.revision {
            let because = plan.because.but("policy_changing");
            return Err(denied(door, asked, &because, None));
        }
        let (address, because) = (server.address, plan.because.clone());
        let request = write(plan, asked, (*headers).clone(), body, server.is_h2())
            .map_err(|error| unwritable(door, asked, &because, &error))?;
        match send(&mut server, request).await {
            Ok(response) => {
                Ok(done(door, asked, (&because, address), server, response, tally, None))
            }
            Err((error, _)) => Err(failed(door, asked, &because, &error)),
        }
    }
}

fn unwritable(
    door: &Door,
    asked: &Asked,
    because: &Because,
    error: &hyper::http::Error,
) -> Response<Body> {
    log::warn!(error:%; "a request that was read cannot be written");
    denied(door, asked, &because.but("bad_target"), None)
}

async fn send(
    server: &mut Server,
    request: Request<Body>,
) -> Result<Response<Incoming>, (ServerError, Option<Request<Body>>)> {
    match timeout(ANSWER_TIME_MAX, server.send(request)).await {
        Ok(Ok(response)) => Ok(response),
        Ok(Err((error, unsent))) => Err((ServerError::Http(error), unsent)),
        Err(_) => Err((ServerError::Silent, None)),
    }
}

/// Writes the request anew: what is sent is what was judged.
fn write(
    plan: Plan,
    asked: &Asked,
    mut headers: hyper::HeaderMap,
    body: Body,
    h2: bool,
) -> Result<Request<Body>, hyper::http::Error> {
    let host = match &plan.host {
        Host::Name(name) => name.to_string(),
        Host::Address(IpAddr::V6(address)) => format!("[{address}]"),
        Host::Address(address) => address.to_string(),
    };
    let authority = if plan.port == plan.scheme.default_port() {
        host
    } else {
        format!("{host}:{}", plan.port)
    };
    headers::apply(&mut headers, plan.changes);
    let mut request = Request::new(body);
    *request.method_mut() = hyper::Method::from_bytes(asked.method.as_str().as_bytes())?;
    if h2 {
        let scheme = if plan.scheme == Scheme::Https { "https" } else { "http" };
        let uri = Uri::builder().scheme(scheme).authority(authority).path_and_query(plan.target);
        *request.uri_mut() = uri.build()?;
        *request.version_mut() = Version::HTTP_2;
    } else {
        *request.uri_mut() = Uri::builder().path_and_query(plan.target).build()?;
        headers.insert(HOST, HeaderValue::from_str(&authority)?);
        if asked.websocket {
            headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
            headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
        }
    }
    *request.headers_mut() = headers;
    Ok(request)
}

/// The server's answer for the guest, and the decision on record.
fn done(
    door: &Arc<Door>,
    asked: &Asked,
    (because, address): (&Because, IpAddr),
    server: Server,
    response: Response<Incoming>,
    tally: &Arc<Tally>,
    upgrade: Option<hyper::upgrade::OnUpgrade>,
) -> Response<Body> {
    let sandbox = &door.flow.sandbox;
    let switched = response.status() == StatusCode::SWITCHING_PROTOCOLS;
    let mut about = subject(door, asked, Some(address));
    about.flow = tally.number();
    if asked.websocket && switched {
        about.flow = door.flow.number;
        door.flow.tell_end();
    } else if asked.websocket {
        // It stays a connection for requests.
        sandbox.release(&door.flow);
    }
    sandbox.record(Kind::Http, Verdict::Allowed, because, about);
    if switched {
        return match upgrade {
            Some(upgrade) if asked.websocket => tunnel(door, upgrade, response),
            // It answers what nobody asked.
            _ => refuse(StatusCode::BAD_GATEWAY, "EgressUpstream", "the server switched", ""),
        };
    }
    let (mut parts, body) = response.into_parts();
    headers::of_response(&mut parts.headers);
    parts.version = Version::HTTP_11;
    parts.extensions.clear();
    let body = Body::down(body, tally.clone(), door.servers.lend(server));
    Response::from_parts(parts, body)
}

/// Joins the two ends of a WebSocket.
fn tunnel(
    door: &Arc<Door>,
    guest: hyper::upgrade::OnUpgrade,
    mut response: Response<Incoming>,
) -> Response<Body> {
    let server = hyper::upgrade::on(&mut response);
    let idle = Duration::from_secs(u64::from(door.setup.limits.idle_seconds));
    let flow = door.flow.clone();
    door.flow.spawn(async move {
        let Ok((guest, server)) = tokio::try_join!(guest, server) else { return };
        let (mut guest, mut server) = (TokioIo::new(guest), TokioIo::new(server));
        tokio::select! {
            ended = tokio::io::copy_bidirectional(&mut guest, &mut server) => {
                if let Err(error) = ended {
                    log::trace!(error:%; "a WebSocket failed");
                }
            }
            () = quiet(&flow, idle) => {}
        }
    });
    let (mut parts, _) = response.into_parts();
    headers::of_response(&mut parts.headers);
    parts.headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    parts.headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    parts.extensions.clear();
    Response::from_parts(parts, Body::empty())
}

//! Which path and method leads where.

use std::sync::Arc;

use axum::{
    Router,
    http::{Method, Uri},
    middleware,
    response::Response,
    routing::{any, get, post, put},
};
use holdfast_api::{error::Code, path};

use super::{
    App, disk_images, egress, exec, exec_stream, files, groups, guard::guard, identity, metrics,
    node, node_status, problem::Problem, request::shortened, sandboxes, secrets, snapshots,
};

const GROUP: &str = "/subscriptions/{sub}/resourceGroups/{rg}/sandboxGroups/{group}";

/// Calls of the contract under a sandbox that this node does not carry out yet.
const SANDBOX_NOT_YET: [&str; 10] = [
    "enable",
    "commit",
    "stats",
    "volumes/add",
    "ports",
    "ports/add",
    "ports/remove",
    "files/list",
    "files/stat",
    "files/mkdir",
];

/// The same under a group.
const GROUP_NOT_YET: [&str; 2] = ["volumes", "volumes/{name}"];

/// Every path. The open ones answer anybody.
pub(crate) fn router(app: Arc<App>) -> Router {
    let open = Router::new()
        .route(path::CA, get(node::ca))
        .route(path::OPENID, get(identity::discovery))
        .route(path::JWKS, get(identity::jwks))
        .route(path::HEALTHZ, get(node::healthz))
        .route(path::READYZ, get(node::readyz))
        .method_not_allowed_fallback(no_method);
    let guarded = data_plane()
        .merge(arm())
        .merge(own())
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(middleware::from_fn_with_state(Arc::clone(&app), guard));
    // The open ones first: the fallback of the guarded ones serves the rest.
    let counted = middleware::from_fn_with_state(Arc::clone(&app), metrics::count);
    open.merge(guarded).layer(counted).with_state(app)
}

fn data_plane() -> Router<Arc<App>> {
    let at = |rest: &str| format!("{GROUP}/{rest}");
    let mut router = Router::new()
        .route(&at("sandboxes"), put(sandboxes::create).get(sandboxes::list))
        .route(&at("sandboxes/{id}"), get(sandboxes::get).delete(sandboxes::delete))
        .route(&at("sandboxes/{id}/executeShellCommand"), post(exec::execute))
        .route(&at("sandboxes/{id}/stop"), post(sandboxes::stop))
        .route(&at("sandboxes/{id}/resume"), post(sandboxes::resume))
        .route(&at("sandboxes/{id}/lifecycle"), post(sandboxes::lifecycle))
        .route(&at("sandboxes/{id}/snapshot"), post(snapshots::create))
        .route(&at("sandboxes/{id}/egresspolicy"), post(egress::set_policy))
        .route(&at("sandboxes/{id}/egress-decisions"), get(egress::decisions))
        .route(&at("secrets"), get(secrets::list))
        .route(&at("secrets/{name}"), put(secrets::put).get(secrets::get).delete(secrets::delete))
        .route(&at("secrets/{name}/keys"), get(secrets::keys))
        .route(&at("secrets/{name}/peek"), post(secrets::peek))
        .route(&at("snapshots"), get(snapshots::list))
        .route(&at("snapshots/{id}"), get(snapshots::get).delete(snapshots::delete))
        .route(&at("sandboxes/{id}/files"), put(files::write).get(files::read))
        .route(&at("diskimages"), put(disk_images::create).get(disk_images::list))
        .route(&at("diskimages/{id}"), get(disk_images::get).delete(disk_images::delete))
        .route(&at("diskimages/public"), get(disk_images::list_public))
        .route(&at("diskimages/public/{name}"), get(disk_images::get_public));
    for call in SANDBOX_NOT_YET {
        router = router.route(&at(&format!("sandboxes/{{id}}/{call}")), any(not_yet));
    }
    for call in GROUP_NOT_YET {
        router = router.route(&at(call), any(not_yet));
    }
    router
}

fn arm() -> Router<Arc<App>> {
    let scope = "/subscriptions/{sub}/resourceGroups/{rg}";
    let groups = format!("{scope}/{}", path::ARM_PROVIDER);
    Router::new().route(&groups, get(groups::list)).route(
        &format!("{groups}/{{group}}"),
        get(groups::get).put(groups::put).delete(groups::delete).patch(not_yet),
    )
}

fn own() -> Router<Arc<App>> {
    let at = |rest: &str| format!("/v1{GROUP}/{rest}");
    Router::new()
        .route(path::METRICS, get(metrics::scrape))
        .route(path::NODE, get(node::info))
        .route(path::NODE_STATUS, get(node_status::status))
        .route(path::NODE_DOCTOR, get(node_status::doctor))
        .route(path::NODE_BUNDLE, get(node_status::bundle))
        .route(path::IMAGES_GC, post(disk_images::gc))
        .route(path::SNAPSHOTS_GC, post(snapshots::gc))
        .route(&at("sandboxes/{id}/details"), get(sandboxes::details))
        .route(&at("sandboxes/{id}/exec"), get(exec_stream::exec))
        .route(&at("sandboxes/{id}/egress-explain"), get(egress::explanation))
        .route(&at("sandboxes/{id}/suspend"), post(sandboxes::suspend))
        .route(&at("sandboxes/{id}/fork"), post(snapshots::fork))
        .route(&at("snapshots/{id}/details"), get(snapshots::details))
        .route(&at("snapshots/{id}/verify"), post(snapshots::verify))
        .route(&at("remotesnapshots"), get(snapshots::list_remote))
        .route(&at("remotesnapshots/{id}/fetch"), post(snapshots::fetch))
        .route(&at("diskimages/{id}/progress"), get(disk_images::progress))
        .route(&at("images:import"), put(disk_images::import))
}

const HINT: &str = "docs/api.md lists what is served";

async fn not_yet(method: Method, uri: Uri) -> Result<Response, Problem> {
    let message = format!("{method} {} is not carried out by this node yet", uri.path());
    Err(Problem::new(Code::UnsupportedOperation, message, HINT))
}

async fn no_route(uri: Uri) -> Problem {
    let message = format!("there is nothing at {}", shortened(uri.path()));
    Problem::new(Code::RouteNotFound, message, HINT)
}

async fn no_method(method: Method, uri: Uri) -> Problem {
    let message = format!("{} does not take {method}", shortened(uri.path()));
    Problem::new(Code::MethodNotAllowed, message, HINT)
}

//! Who is shown what: bearer tokens, basic authentication, redirects. A small server stands in for
//! the token issuer, since no package has one.

mod support;

use std::sync::{
    Arc,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};
use std::time::SystemTime;

use holdfast_model::Secret;
use holdfast_oci::{ContentStore, Credentials, Error, Image, Reference, Registry, RegistryOptions};
use support::{
    content::Content,
    hasty,
    server::{Reply, Request, Server},
};

/// `me:secret`.
const BASIC: &str = "Basic bWU6c2VjcmV0";

fn registry(server: &Server, credentials: bool) -> Registry {
    let credentials = credentials
        .then(|| Credentials { username: "me".to_owned(), secret: Secret::new("secret") });
    let options = RegistryOptions { credentials, patience: hasty(), ..Default::default() };
    let reference: Reference = format!("{}/app", server.host()).parse().unwrap();
    Registry::new(&reference, options).unwrap()
}

fn resolve(registry: &Registry) -> Result<Image, Error> {
    let folder = tempfile::tempdir().unwrap();
    let store = ContentStore::open(folder.path()).unwrap();
    let platform = "linux/amd64".parse().unwrap();
    registry.resolve(&store, &platform, SystemTime::now()).map(|resolved| resolved.image)
}

fn download(registry: &Registry, image: &Image) -> Result<(), Error> {
    let folder = tempfile::tempdir().unwrap();
    let store = ContentStore::open(folder.path()).unwrap();
    let mut draft = store.draft(image.layers[0].digest)?;
    registry.download(&image.layers[0], &mut draft, &AtomicU64::new(0))
}

fn challenge(request: &Request) -> Reply {
    let host = request.header("host").unwrap();
    Reply::status(401).with(
        "WWW-Authenticate",
        format!(r#"Bearer realm="http://{host}/token",service="reg",scope="repository:app:push""#),
    )
}

/// Serves content to holders of token `generation`, and issues it.
fn guarded(
    content: Content,
    generation: Arc<AtomicUsize>,
    issue: fn(&Request, usize) -> Reply,
) -> Server {
    Server::start(move |request| {
        let current = generation.load(Ordering::Relaxed);
        if request.path.starts_with("/token") {
            return issue(request, current);
        }
        let wanted = format!("Bearer t{current}");
        match request.header("authorization") == Some(wanted.as_str()) {
            true => content.reply(request),
            false => challenge(request),
        }
    })
}

fn issue(request: &Request, generation: usize) -> Reply {
    match request.header("authorization") {
        Some(BASIC) => Reply::body(format!(r#"{{"token":"t{generation}"}}"#)),
        _ => Reply::status(401),
    }
}

fn issue_to_anyone(_: &Request, generation: usize) -> Reply {
    Reply::body(format!(r#"{{"access_token":"t{generation}","expires_in":60}}"#))
}

#[test]
fn a_token_is_fetched_once_for_pulling_alone_and_used_for_everything() {
    let content = Content::of_bytes(10);
    let server = guarded(content.clone(), Arc::default(), issue);
    let image = resolve(&registry(&server, true)).unwrap();
    assert_eq!(image.digest, content.manifest);
    assert_eq!(server.count("GET", "/token"), 1);
    let asked = server.requests().into_iter().find(|r| r.path.starts_with("/token")).unwrap();
    assert_eq!(asked.path, "/token?service=reg&scope=repository%3Aapp%3Apull");
}

#[test]
fn a_token_is_fetched_without_credentials_where_the_registry_gives_one() {
    let content = Content::of_bytes(10);
    let server = guarded(content.clone(), Arc::default(), issue_to_anyone);
    assert_eq!(resolve(&registry(&server, false)).unwrap().digest, content.manifest);
    assert!(server.requests().iter().all(|r| r.header("authorization") != Some(BASIC)));
}

#[test]
fn an_expired_token_is_replaced_in_the_middle_of_a_pull() {
    let generation = Arc::new(AtomicUsize::new(0));
    let server = guarded(Content::of_bytes(1000), Arc::clone(&generation), issue);
    let registry = registry(&server, true);
    let image = resolve(&registry).unwrap();
    generation.store(1, Ordering::Relaxed);
    download(&registry, &image).unwrap();
    assert_eq!(server.count("GET", "/token"), 2);
}

#[test]
fn refused_access_is_said_with_and_without_credentials_and_not_tried_for_ever() {
    let server = guarded(Content::of_bytes(10), Arc::default(), |_, _| Reply::status(401));
    let error = resolve(&registry(&server, true)).unwrap_err();
    assert!(matches!(error, Error::Unauthorized { with_credentials: true, .. }), "{error}");
    let error = resolve(&registry(&server, false)).unwrap_err();
    assert!(matches!(error, Error::Unauthorized { with_credentials: false, .. }), "{error}");
    // A token that the registry does not take is not asked for again and again.
    let server =
        guarded(Content::of_bytes(10), Arc::default(), |_, _| Reply::body(r#"{"token":"wrong"}"#));
    assert!(matches!(resolve(&registry(&server, true)), Err(Error::Unauthorized { .. })));
    assert_eq!(server.count("GET", "/token"), 1);
}

#[test]
fn basic_authentication_is_met_and_only_when_asked_for() {
    let content = Content::of_bytes(10);
    let server = Server::start(move |request| match request.header("authorization") {
        Some(BASIC) => content.reply(request),
        _ => Reply::status(401).with("WWW-Authenticate", "Basic realm=\"x\""),
    });
    resolve(&registry(&server, true)).unwrap();
    assert_eq!(server.requests()[0].header("authorization"), None);
    assert!(matches!(resolve(&registry(&server, false)), Err(Error::Unauthorized { .. })));
}

#[test]
fn a_redirect_to_another_host_shows_it_no_credentials() {
    let content = Content::of_bytes(1000);
    let elsewhere = Server::start({
        let content = content.clone();
        move |request| content.reply(request)
    });
    let host = elsewhere.host();
    let server = Server::start(move |request| match request.header("authorization") {
        Some(BASIC) if request.path.contains("/blobs/") => {
            Reply::status(307).with("Location", format!("http://{host}{}", request.path))
        }
        Some(BASIC) => content.reply(request),
        _ => Reply::status(401).with("WWW-Authenticate", "Basic"),
    });
    let registry = registry(&server, true);
    let image = resolve(&registry).unwrap();
    download(&registry, &image).unwrap();
    assert!(elsewhere.requests().len() >= 2);
    assert!(elsewhere.requests().iter().all(|r| r.header("authorization").is_none()));
}

#[test]
fn another_host_cannot_ask_for_the_registrys_credentials() {
    let content = Content::of_bytes(10);
    let elsewhere = Server::start(|_| Reply::status(401).with("WWW-Authenticate", "Basic"));
    let host = elsewhere.host();
    let server = Server::start(move |request| match request.path.contains("/blobs/") {
        true => Reply::status(302).with("Location", format!("http://{host}/x")),
        false => content.reply(request),
    });
    assert!(matches!(resolve(&registry(&server, true)), Err(Error::Unauthorized { .. })));
    assert_eq!(elsewhere.requests().len(), 1);
    assert_eq!(elsewhere.requests()[0].header("authorization"), None);
}

#[test]
fn redirects_end() {
    let server = Server::start(|request| Reply::status(302).with("Location", request.path.clone()));
    let error = resolve(&registry(&server, false)).unwrap_err();
    assert!(error.to_string().contains("redirects without end"), "{error}");
}

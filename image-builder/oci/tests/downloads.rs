//! Registries in trouble: cuts, wrong bytes, wrong sizes, outages, and what is kept over them.

mod support;

use std::{
    io::Read,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use holdfast_oci::{
    ContentStore, Error, Image, Layer, Platform, Reference, Registry, RegistryOptions, Resolved,
    STALE_MAX,
};
use support::{
    content::{Content, digest_of},
    hasty,
    server::{Reply, Server},
};

struct Fixture {
    _folder: tempfile::TempDir,
    store: ContentStore,
    content: Content,
}

impl Fixture {
    fn new(bytes: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = ContentStore::open(folder.path()).unwrap();
        Self { _folder: folder, store, content: Content::of_bytes(bytes) }
    }

    fn resolve_at(&self, server: &Server, name: &str, now: SystemTime) -> Result<Resolved, Error> {
        let platform: Platform = "linux/amd64".parse().unwrap();
        registry(server, name).resolve(&self.store, &platform, now)
    }

    fn resolve(&self, server: &Server, name: &str) -> Result<Image, Error> {
        self.resolve_at(server, name, SystemTime::now()).map(|resolved| resolved.image)
    }

    fn layer(&self) -> Layer {
        let digest = self.content.layers[0];
        let size = self.content.files[&format!("blobs/{digest}")].len();
        let compression = holdfast_oci::Compression::Plain;
        Layer { digest, size: u64::try_from(size).unwrap(), diff_id: digest, compression }
    }

    /// Downloads the layer; gives what is in its draft after it.
    fn download(&self, server: &Server) -> (Result<(), Error>, Vec<u8>) {
        let layer = self.layer();
        let mut draft = self.store.draft(layer.digest).unwrap();
        let seen = AtomicU64::new(0);
        let outcome = registry(server, "app").download(&layer, &mut draft, &seen);
        let mut bytes = Vec::new();
        draft.reader().unwrap().read_to_end(&mut bytes).unwrap();
        (outcome, bytes)
    }
}

fn registry(server: &Server, name: &str) -> Registry {
    let reference: Reference = format!("{}/{name}", server.host()).parse().unwrap();
    let options = RegistryOptions { patience: hasty(), ..Default::default() };
    Registry::new(&reference, options).unwrap()
}

/// Serves the content, but every answer with a layer ends after `bytes` of it.
fn cutting(content: Content, bytes: usize) -> Server {
    Server::start(move |request| {
        let cut = request.path.contains("/blobs/").then_some(bytes);
        Reply { cut, ..content.reply(request) }
    })
}

#[test]
fn a_layer_cut_again_and_again_is_continued_from_each_cut() {
    let fixture = Fixture::new(1000);
    let server = cutting(fixture.content.clone(), 300);
    let (outcome, bytes) = fixture.download(&server);
    outcome.unwrap();
    assert_eq!(digest_of(&bytes), fixture.layer().digest);
    let ranges: Vec<_> =
        server.requests().iter().map(|r| r.header("range").map(str::to_owned)).collect();
    let from = |at: u32| Some(format!("bytes={at}-"));
    assert_eq!(ranges, [None, from(300), from(600), from(900)]);
}

#[test]
fn a_download_without_progress_is_given_up_and_a_later_one_goes_on() {
    let fixture = Fixture::new(1000);
    let alive = Arc::new(AtomicBool::new(true));
    let server = Server::start({
        let (content, alive) = (fixture.content.clone(), Arc::clone(&alive));
        move |request| {
            let cut = if alive.swap(false, Ordering::Relaxed) { 400 } else { 0 };
            Reply { cut: Some(cut), ..content.reply(request) }
        }
    });
    let (outcome, bytes) = fixture.download(&server);
    assert!(matches!(outcome, Err(Error::Cut { got: 400, size: 1000, .. })), "{outcome:?}");
    assert_eq!(bytes.len(), 400);
    let whole = Server::start({
        let content = fixture.content.clone();
        move |request| content.reply(request)
    });
    let (outcome, bytes) = fixture.download(&whole);
    outcome.unwrap();
    assert_eq!(digest_of(&bytes), fixture.layer().digest);
    assert_eq!(whole.requests()[0].header("range"), Some("bytes=400-"));
}

#[test]
fn a_damaged_draft_of_an_earlier_run_is_fetched_anew() {
    let fixture = Fixture::new(1000);
    let server = Server::start({
        let content = fixture.content.clone();
        move |request| content.reply(request)
    });
    let path = fixture.store.root().join(format!("tmp/{}.part", fixture.layer().digest.hex()));
    for damaged in [vec![0; 500], vec![0; 1000], vec![0; 2000]] {
        fs_err::write(&path, &damaged).unwrap();
        let (outcome, bytes) = fixture.download(&server);
        outcome.unwrap();
        assert_eq!(digest_of(&bytes), fixture.layer().digest, "{} bytes", damaged.len());
    }
}

#[test]
fn a_registry_that_knows_no_ranges_is_read_from_the_start() {
    let fixture = Fixture::new(1000);
    let bytes = fixture.content.files[&format!("blobs/{}", fixture.layer().digest)].clone();
    let first = AtomicBool::new(true);
    let server = Server::start(move |_| {
        let cut = first.swap(false, Ordering::Relaxed).then_some(300);
        Reply { cut, ..Reply::body(bytes.clone()) }
    });
    let (outcome, bytes) = fixture.download(&server);
    outcome.unwrap();
    assert_eq!(digest_of(&bytes), fixture.layer().digest);
}

#[test]
fn wrong_bytes_and_sizes_are_refused_and_nothing_of_them_is_kept() {
    let fixture = Fixture::new(1000);
    let name = format!("blobs/{}", fixture.layer().digest);
    let mut wrong = fixture.content.clone();
    wrong.files.get_mut(&name).unwrap()[500] ^= 1;
    let mut short = fixture.content.clone();
    short.files.get_mut(&name).unwrap().truncate(600);
    let mut long = fixture.content.clone();
    long.files.get_mut(&name).unwrap().push(0);
    for (content, is_digest) in [(wrong, true), (short, false), (long, false)] {
        let server = Server::start(move |request| content.reply(request));
        let (outcome, bytes) = fixture.download(&server);
        let error = outcome.unwrap_err();
        assert_eq!(matches!(error, Error::Digest { .. }), is_digest, "{error}");
        assert_eq!(matches!(error, Error::Size { .. }), !is_digest, "{error}");
        assert!(error.to_string().contains(&fixture.layer().digest.to_string()), "{error}");
        assert!(bytes.is_empty());
    }
}

#[test]
fn a_busy_registry_is_asked_again_after_the_time_it_names() {
    let fixture = Fixture::new(10);
    let failures = AtomicUsize::new(0);
    let content = fixture.content.clone();
    let server = Server::start(move |request| match failures.fetch_add(1, Ordering::Relaxed) {
        0 => Reply::status(429).with("Retry-After", "1"),
        1 => Reply::status(503),
        _ => content.reply(request),
    });
    let start = std::time::Instant::now();
    assert_eq!(fixture.resolve(&server, "app").unwrap().digest, fixture.content.manifest);
    assert!(start.elapsed() >= Duration::from_secs(1));
    let patient = Server::start(|_| Reply::status(429).with("Retry-After", "3600"));
    let error = fixture.resolve(&patient, "app").unwrap_err();
    assert!(matches!(error, Error::Answer { status: 429, .. }), "{error}");
    assert_eq!(patient.requests().len(), 1);
}

#[test]
fn what_is_not_there_is_not_found_and_not_asked_for_twice() {
    let fixture = Fixture::new(10);
    let content = fixture.content.clone();
    let server = Server::start(move |request| content.reply(request));
    let error = fixture.resolve(&server, "app:nope").unwrap_err();
    let host = server.host();
    assert_eq!(
        error.to_string(),
        format!("manifest {host}/app:nope was not found in registry {host}")
    );
    assert_eq!(server.requests().len(), 1);
}

#[test]
fn a_tag_is_revalidated_and_fetched_only_when_it_has_moved() {
    let fixture = Fixture::new(10);
    let other = Content::of_bytes(20);
    let moved = Arc::new(AtomicBool::new(false));
    let server = Server::start({
        let (content, other, moved) = (fixture.content.clone(), other.clone(), Arc::clone(&moved));
        move |request| match moved.load(Ordering::Relaxed) {
            false => content.reply(request),
            true => other.reply(request),
        }
    });
    fixture.resolve(&server, "app").unwrap();
    fixture.resolve(&server, "app").unwrap();
    assert_eq!(server.count("GET", "/manifests/"), 1);
    assert_eq!(server.count("HEAD", "/manifests/latest"), 1);
    moved.store(true, Ordering::Relaxed);
    assert_eq!(fixture.resolve(&server, "app").unwrap().digest, other.manifest);
}

#[test]
fn an_outage_is_bridged_by_the_last_answer_for_a_limited_time() {
    let fixture = Fixture::new(10);
    let down = Arc::new(AtomicUsize::new(0));
    let server = Server::start({
        let (content, down) = (fixture.content.clone(), Arc::clone(&down));
        move |request| match down.load(Ordering::Relaxed) {
            0 => content.reply(request),
            status => Reply::status(u16::try_from(status).unwrap()),
        }
    });
    let now = SystemTime::now();
    assert!(fixture.resolve_at(&server, "app", now).unwrap().stale.is_none());
    for status in [500, 503, 429] {
        down.store(status, Ordering::Relaxed);
        let later = now + Duration::from_secs(60);
        let resolved = fixture.resolve_at(&server, "app", later).unwrap();
        assert_eq!(resolved.image.digest, fixture.content.manifest);
        assert!(resolved.stale.unwrap().age >= Duration::from_secs(59), "status {status}");
    }
    let late = now + STALE_MAX + Duration::from_secs(60);
    assert!(fixture.resolve_at(&server, "app", late).unwrap_err().is_outage());
    // A refusal is an answer: what was allowed once is not allowed for ever.
    for status in [401, 403, 404] {
        down.store(status, Ordering::Relaxed);
        assert!(fixture.resolve_at(&server, "app", now).is_err(), "status {status}");
    }
}

#[test]
fn a_digest_is_asked_for_once_and_then_never_again() {
    let fixture = Fixture::new(10);
    let content = fixture.content.clone();
    let server = Server::start(move |request| content.reply(request));
    let name = format!("app@{}", fixture.content.manifest);
    fixture.resolve(&server, &name).unwrap();
    let asked = server.requests().len();
    fixture.resolve(&server, &name).unwrap();
    assert_eq!(server.requests().len(), asked);
    // The content is here, but another repository's right to it is the registry's to say.
    fixture.resolve(&server, &format!("other/{name}")).unwrap();
    assert_eq!(server.requests().len(), asked + 1);
}

#[test]
fn a_registry_that_serves_another_manifest_for_a_digest_is_refused() {
    let fixture = Fixture::new(10);
    let other = Content::of_bytes(20);
    let bytes = other.files["manifests/latest"].clone();
    let server = Server::start(move |_| Reply::body(bytes.clone()));
    let name = format!("app@{}", fixture.content.manifest);
    assert!(matches!(fixture.resolve(&server, &name), Err(Error::Digest { .. })));
}

#[test]
fn a_manifest_over_the_limit_is_refused_whatever_length_is_announced() {
    let fixture = Fixture::new(10);
    let server = Server::start(|_| Reply::body(vec![b' '; 5 * 1024 * 1024]));
    assert!(matches!(fixture.resolve(&server, "app"), Err(Error::TooLarge { .. })));
}

#[test]
fn nobody_listening_is_an_outage_that_names_the_registry() {
    let fixture = Fixture::new(10);
    let server = Server::start(|_| Reply::status(500));
    let host = server.host();
    let registry = registry(&server, "app");
    drop(server);
    let platform: Platform = "linux/amd64".parse().unwrap();
    let error = registry.resolve(&fixture.store, &platform, SystemTime::now()).unwrap_err();
    assert!(error.is_outage() && error.to_string().contains(&host), "{error}");
}

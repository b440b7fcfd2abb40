//! Ends in the middle: of the conversion, of the registry, of whoever asked. A registry of our own
//! stops at a byte we choose; its content is a real image.

#[path = "../../oci/tests/support/server.rs"]
#[allow(dead_code, unreachable_pub, reason = "shared with the tests of holdfast-oci")]
mod server;
mod support;

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use fs_err as fs;
use holdfast_wire::convert::{FailureKind, Report};
use server::{Reply, Request, Server};
use support::{
    Running, Store,
    image::{Layout, digest_of},
    remote,
};

const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

/// What a registry answers that has the image of a layout.
fn reply(image: &Layout, request: &Request) -> Reply {
    let digest = match request.path.rsplit_once('/') {
        Some((_, "v1")) => image.digest(),
        Some((_, digest)) => match digest.parse() {
            Ok(digest) => digest,
            Err(_) => return Reply::status(404),
        },
        None => return Reply::status(404),
    };
    let Ok(bytes) = fs::read(image.blob(&digest)) else { return Reply::status(404) };
    assert_eq!(digest_of(&bytes), digest);
    let reply = match request.header("range").and_then(|range| range.strip_prefix("bytes=")) {
        None => Reply::body(bytes),
        Some(range) => {
            let first: usize = range.trim_end_matches('-').parse().unwrap();
            let last = format!("bytes {first}-{}/{}", bytes.len() - 1, bytes.len());
            Reply { status: 206, ..Reply::body(&bytes[first..]) }.with("Content-Range", last)
        }
    };
    reply.with("Content-Type", MANIFEST_TYPE).with("Docker-Content-Digest", digest.to_string())
}

/// Serves the image, but of its second layer only the first half until released.
struct Stalling {
    server: Server,
    released: Arc<AtomicBool>,
    image: Arc<Layout>,
}

impl Stalling {
    fn start() -> Self {
        let image = Arc::new(Layout::new());
        let released = Arc::new(AtomicBool::new(false));
        let server = Server::start({
            let (image, released) = (Arc::clone(&image), Arc::clone(&released));
            let second = image.layer(1).to_string();
            move |request| {
                let reply = reply(&image, request);
                if !request.path.ends_with(&second) || released.load(Ordering::Relaxed) {
                    return reply;
                }
                Reply { cut: Some(150_000), hold: Some(Arc::clone(&released)), ..reply }
            }
        });
        Self { server, released, image }
    }

    fn reference(&self) -> String {
        format!("{}/app:v1", self.server.host())
    }

    /// Starts a conversion and waits until it is in the middle of the second layer.
    fn stuck(&self, store: &Store) -> Running {
        let mut running = store.start(remote(&self.reference(), None));
        let first = fs::metadata(self.image.blob(&self.image.layer(0))).unwrap().len();
        loop {
            let Some(Report::Progress(progress)) = running.next() else {
                panic!("it ended before it was stuck");
            };
            if progress.layers_done == 1 && progress.bytes_done >= first + 100_000 {
                return running;
            }
        }
    }

    fn release(&self) {
        self.released.store(true, Ordering::Relaxed);
    }
}

#[test]
fn after_a_kill_in_the_middle_the_next_run_goes_on_and_leaves_no_drafts() {
    let (registry, store) = (Stalling::start(), Store::new());
    registry.stuck(&store).kill();
    assert!(!store.names("tmp").is_empty());
    assert!(store.names("images").is_empty());
    registry.release();
    let digest = store.convert(remote(&registry.reference(), None)).digest();
    assert_eq!(digest, registry.image.digest());
    store.assert_tidy();
    // The first layer was not fetched again, and the second one from where it was cut.
    let first = registry.image.layer(0).to_string();
    assert_eq!(registry.server.count("GET", &first), 1);
    let second = registry.image.layer(1).to_string();
    let requests = registry.server.requests();
    let last = requests.iter().rfind(|request| request.path.ends_with(&second)).unwrap();
    assert_eq!(last.header("range"), Some("bytes=150000-"));
}

#[test]
fn who_waits_for_the_same_layer_takes_over_when_the_first_is_killed() {
    let (registry, store) = (Stalling::start(), Store::new());
    let first = registry.stuck(&store);
    let follower = store.start(remote(&registry.reference(), None));
    first.kill();
    registry.release();
    assert_eq!(follower.outcome().digest(), registry.image.digest());
    store.assert_tidy();
}

#[test]
fn a_registry_that_dies_in_the_middle_is_unavailable_and_what_came_is_kept() {
    let (registry, store) = (Stalling::start(), Store::new());
    let running = registry.stuck(&store);
    let reference = registry.reference();
    let image = Arc::clone(&registry.image);
    drop(registry.server);
    registry.released.store(true, Ordering::Relaxed);
    let outcome = running.outcome();
    outcome.failure(FailureKind::Unavailable, reference.trim_end_matches("/app:v1"));
    assert!(store.names("images").is_empty());
    let part = format!("{}.part", image.layer(1).hex());
    assert_eq!(store.names("tmp").into_iter().collect::<Vec<_>>(), [part]);
}

#[test]
fn when_whoever_asked_is_gone_it_ends_by_itself() {
    let (registry, store) = (Stalling::start(), Store::new());
    // The registry is still stalling: only the missing listener can end it.
    let status = registry.stuck(&store).abandon();
    assert!(!status.success());
    assert!(store.names("images").is_empty());
    registry.release();
    store.convert(remote(&registry.reference(), None)).digest();
    store.assert_tidy();
}

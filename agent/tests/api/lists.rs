//! Lists: pages and label filters.

use std::collections::BTreeMap;

use holdfast_api::page::PAGE_SIZE;
use holdfast_model::{Digest, Resources, SandboxId, SandboxSpec, State, sandbox::ImageSource};
use holdfast_store::{SandboxRecord, Store};
use holdfastd::config::Config;

use crate::server::{Server, group, sandboxes};

/// Over two pages.
const SANDBOXES: usize = 2 * PAGE_SIZE + 5;

/// Sandboxes whose microVM an earlier agent lost: they need none to be listed.
fn put_sandboxes(config: &mut Config) {
    let store = Store::open(&config.paths.state.join("store.redb")).unwrap();
    for number in 0..SANDBOXES {
        let mut random = [0; 20];
        random[..8].copy_from_slice(&number.to_be_bytes().map(|byte| byte % 32));
        random[19] = u8::try_from(number / 32).unwrap();
        let parity = if number.is_multiple_of(2) { "even" } else { "odd" };
        let labels =
            [("parity".to_owned(), parity.to_owned()), ("n".to_owned(), number.to_string())];
        let record = SandboxRecord {
            id: SandboxId::from_random(random),
            group: group(),
            spec: SandboxSpec {
                image: ImageSource::Public("debian".to_owned()),
                resources: Resources::DEFAULT,
                labels: BTreeMap::from(labels),
                environment: BTreeMap::new(),
                entrypoint: None,
                cmd: None,
                lifecycle_json: None,
                egress_json: None,
                skip_egress_proxy: false,
            },
            state: State::Failed,
            failure: Some("the machine was lost".to_owned()),
            image: Digest::from_sha256([0; 32]),
            created_at_ms: 1_767_323_045_000,
            request_id: None,
            uid: None,
            saved: None,
            from_snapshot: None,
            egress_generation: 0,
        };
        store.put_sandbox(&record).unwrap();
    }
}

/// Follows the links to the end; the number of pages, and the label `n` of each sandbox.
async fn walk(server: &Server, path: &str) -> (usize, Vec<usize>) {
    let (mut pages, mut numbers, mut next) = (0, Vec::new(), Some(path.to_owned()));
    while let Some(link) = next {
        let page = server.get(&link).await.json();
        pages += 1;
        let n =
            |sandbox: &serde_json::Value| sandbox["labels"]["n"].as_str().unwrap().parse::<usize>();
        numbers.extend(page["value"].as_array().unwrap().iter().map(|s| n(s).unwrap()));
        next = page.get("nextLink").map(|link| link.as_str().unwrap().to_owned());
        if let Some(link) = &next {
            assert!(link.starts_with(&format!("https://{}/", server.host())), "{link}");
        }
    }
    numbers.sort_unstable();
    (pages, numbers)
}

#[tokio::test]
async fn every_sandbox_is_on_one_page_and_a_filter_holds_over_all_pages() {
    let server = Server::prepared(put_sandboxes).await;
    let (pages, numbers) = walk(&server, &sandboxes()).await;
    assert_eq!((pages, numbers), (3, (0..SANDBOXES).collect()));

    let even = format!("{}?labels=parity=even&api-version=2026-02-01-preview", sandboxes());
    let (pages, numbers) = walk(&server, &even).await;
    assert_eq!((pages, numbers), (2, (0..SANDBOXES).step_by(2).collect()));

    let one = format!("{}?labels=parity=odd,n=7", sandboxes());
    assert_eq!(walk(&server, &one).await, (1, vec![7]));
    let none = format!("{}?labels=parity=even,n=7", sandboxes());
    assert_eq!(walk(&server, &none).await, (1, vec![]));
    let bad = format!("{}?labels=parity", sandboxes());
    server.get(&bad).await.refused(400, "InvalidRequest");
}

#[tokio::test]
async fn a_sandbox_that_an_earlier_agent_lost_says_why_and_can_be_deleted() {
    let server = Server::prepared(put_sandboxes).await;
    let page = server.get(&format!("{}?labels=n=3", sandboxes())).await.json();
    let sandbox = &page["value"][0];
    assert_eq!(sandbox["state"], "Failed");
    assert_eq!(sandbox["stateDetails"]["failure"], "the machine was lost");
    assert_eq!(sandbox["createdAt"], "2026-01-02T03:04:05Z");
    let at = format!("{}/{}", sandboxes(), sandbox["id"].as_str().unwrap());
    let message = server
        .post(&format!("{at}/executeShellCommand"), r#"{"command":"true"}"#)
        .await
        .refused(409, "SandboxNotRunning");
    assert!(message.contains("Failed"), "{message}");
    server.get(&format!("{at}/files?path=/a")).await.refused(409, "SandboxNotRunning");
    server.put(&format!("{at}/files?path=/a"), "x").await.refused(409, "SandboxNotRunning");
    let details = server.get(&format!("/v1{at}/details")).await.json();
    assert_eq!((&details["state"], details.get("vmm")), (&"Failed".into(), None));
    assert_eq!(server.delete(&at).await.status, 204);
    server.get(&at).await.refused(404, "SandboxNotFound");
    server.delete(&at).await.refused(404, "SandboxNotFound");
}

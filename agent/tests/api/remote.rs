//! What the API says of the remote store where there is none, and where it is away.

use holdfast_api::path;
use holdfast_model::Secret;

use crate::server::{Server, group};

const UNKNOWN: &str = "abcdefghijabcdefghij";

#[tokio::test]
async fn a_group_without_a_remote_store_is_told_so() {
    let server = Server::start().await;
    let list = path::remote_snapshots(&group());
    let message = server.get(&list).await.refused(409, "RemoteNotConfigured");
    assert!(message.contains("local/default/default"), "{message}");
    let fetch = path::fetch_snapshot(&group(), UNKNOWN);
    server.post(&fetch, "").await.refused(409, "RemoteNotConfigured");
    let nonsense = path::fetch_snapshot(&group(), "no-such");
    server.post(&nonsense, "").await.refused(404, "SnapshotNotFound");
}

#[tokio::test]
async fn a_store_that_is_away_is_unavailable_and_the_node_serves() {
    let server = Server::prepared(|config| {
        config.remote.url = "s3://bucket/prefix".to_owned();
        // Nobody listens on port 1.
        config.remote.endpoint = "http://127.0.0.1:1".to_owned();
        config.remote.key_id = "id".to_owned();
        config.remote.key = Some(Secret::new("secret-of-the-store".to_owned()));
        config.remote.site_key = Some(Secret::new("5e".repeat(32)));
        config.remote.groups = vec!["default".to_owned()];
    })
    .await;
    let list = path::remote_snapshots(&group());
    server.get(&list).await.refused(502, "RemoteUnavailable");
    let fetch = path::fetch_snapshot(&group(), UNKNOWN);
    server.post(&fetch, "").await.refused(502, "RemoteUnavailable");
    let snapshots = server.get(&path::snapshots(&group())).await.json();
    assert_eq!(snapshots["value"], serde_json::json!([]));
}

//! Sandbox groups on the ARM paths.

use holdfast_api::{model::GroupKey, path};

use crate::server::{Server, group};

fn key(name: &str) -> GroupKey {
    GroupKey::new("sub", "rg", name).unwrap()
}

#[tokio::test]
async fn the_default_group_is_there_from_first_boot_and_stays() {
    let server = Server::start().await;
    let at = path::arm_group(&group());
    let answer = server.get(&at).await.json();
    assert_eq!((&answer["name"], &answer["id"]), (&"default".into(), &at.clone().into()));
    assert_eq!(answer["properties"]["provisioningState"], "Succeeded");
    server.delete(&at).await.refused(409, "SandboxGroupProtected");
    assert_eq!(server.get(&at).await.status, 200);
}

#[tokio::test]
async fn a_group_is_made_changed_listed_and_deleted() {
    let server = Server::start().await;
    let at = path::arm_group(&key("team"));
    server.get(&at).await.refused(404, "SandboxGroupNotFound");
    server.get(&path::sandboxes(&key("team"))).await.refused(404, "SandboxGroupNotFound");
    assert_eq!(server.put(&at, r#"{"location":"here","tags":{"a":"b"}}"#).await.status, 201);
    assert_eq!(server.put(&at, r#"{"location":"there"}"#).await.status, 200);
    let answer = server.get(&at).await.json();
    assert_eq!((&answer["location"], &answer["tags"]), (&"there".into(), &serde_json::json!({})));
    let list = server.get(&path::arm_groups("sub", "rg")).await.json();
    assert_eq!(list["value"].as_array().unwrap().len(), 1);
    assert_eq!(
        server.get(&path::arm_groups("other", "rg")).await.json()["value"],
        serde_json::json!([])
    );
    assert_eq!(server.get(&path::sandboxes(&key("team"))).await.status, 200);
    assert_eq!(server.delete(&at).await.status, 204);
    server.delete(&at).await.refused(404, "SandboxGroupNotFound");
}

#[tokio::test]
async fn a_group_is_not_deleted_with_what_is_in_it() {
    let server = Server::start().await;
    let at = path::arm_group(&key("full"));
    server.put(&at, r#"{"location":""}"#).await;
    let image = r#"{"image":{"base":"localhost:1/none"}}"#;
    assert_eq!(server.put(&path::disk_images(&key("full")), image).await.status, 201);
    let message = server.delete(&at).await.refused(409, "SandboxGroupNotEmpty");
    assert!(message.ends_with("it has 1 disk images"), "{message}");
}

#[tokio::test]
async fn names_that_climb_and_properties_that_would_be_dropped_are_refused() {
    let server = Server::start().await;
    for name in ["..%2f..", "a%20b", ".hidden", "%2e%2e", &"x".repeat(91)] {
        let at = format!("{}/{name}", path::arm_groups("sub", "rg"));
        // A URL library may resolve dots before they are sent: then there is no such path.
        let answer = server.put(&at, r#"{"location":"x"}"#).await;
        assert!([400, 404, 405].contains(&answer.status.as_u16()), "{name}: {answer:?}");
        answer.error();
    }
    let at = path::arm_group(&key("a"));
    let identity = r#"{"location":"x","identity":{"type":"SystemAssigned"}}"#;
    let message = server.put(&at, identity).await.refused(400, "UnsupportedField");
    assert!(message.starts_with("identity "), "{message}");
}

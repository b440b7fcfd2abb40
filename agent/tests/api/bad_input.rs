//! Requests that cannot be carried out: each has a typed error that names what is wrong, and
//! nothing half-made stays.

use holdfast_api::path;

use crate::server::{Server, group, sandboxes};

#[tokio::test]
async fn malformed_json_is_refused_with_its_place() {
    let server = Server::start().await;
    for body in ["", "{", "[]]", "{\"labels\": }", "\u{0}", "nul"] {
        let answer = server.put(&sandboxes(), body).await;
        let message = answer.refused(400, "MalformedJson");
        assert!(message.contains("line 1 column"), "{body}: {message}");
    }
}

#[tokio::test]
async fn a_create_that_asks_for_what_there_is_not_is_refused_and_makes_nothing() {
    let server = Server::start().await;
    let image = r#""sourcesRef":{"diskImage":{"name":"debian","isPublic":true}}"#;
    let cases = [
        ("{}".to_owned(), 400, "InvalidRequest", "sourcesRef"),
        (format!("{{{image},\"colour\":1}}"), 400, "InvalidRequest", "colour"),
        (format!("{{{image},\"ports\":[{{\"port\":80}}]}}"), 400, "UnsupportedField", "ports"),
        (format!("{{{image},\"egressPolicy\":{{}}}}"), 400, "InvalidRequest", "egressPolicy"),
        (
            format!("{{{image},\"resources\":{{\"cpu\":\"9000m\",\"memory\":\"1Gi\"}}}}"),
            400,
            "InvalidResourceTier",
            "9000m",
        ),
        (format!("{{{image}}}"), 404, "DiskImageNotFound", "debian"),
        (
            image_of("\"id\":\"aaaaaaaaaaaaaaaaaaaa\""),
            404,
            "DiskImageNotFound",
            "aaaaaaaaaaaaaaaaaaaa",
        ),
        (image_of("\"id\":\"../../etc\""), 400, "InvalidRequest", "sourcesRef.diskImage.id"),
        (
            image_of("\"name\":\"..\",\"isPublic\":true"),
            400,
            "InvalidRequest",
            "sourcesRef.diskImage.name",
        ),
    ];
    for (body, status, code, named) in cases {
        let message = server.put(&sandboxes(), body).await.refused(status, code);
        assert!(message.contains(named), "{message}");
    }
    assert_eq!(server.get(&sandboxes()).await.json()["value"], serde_json::json!([]));
}

fn image_of(reference: &str) -> String {
    format!("{{\"sourcesRef\":{{\"diskImage\":{{{reference}}}}}}}")
}

#[tokio::test]
async fn ids_that_are_none_are_not_found_and_reach_no_file() {
    let server = Server::start().await;
    for id in ["aaaaaaaaaaaaaaaaaaaa", "UPPER", "x", "..%2f..%2fetc", "%00", "a%20b"] {
        let sandbox = format!("{}/{id}", sandboxes());
        server.get(&sandbox).await.refused(404, "SandboxNotFound");
        server.delete(&sandbox).await.refused(404, "SandboxNotFound");
        let exec = format!("{sandbox}/executeShellCommand");
        server.post(&exec, r#"{"command":"x"}"#).await.refused(404, "SandboxNotFound");
        let image = format!("{}/{id}", path::disk_images(&group()));
        server.get(&image).await.refused(404, "DiskImageNotFound");
        server.delete(&image).await.refused(404, "DiskImageNotFound");
    }
    let public = path::public_disk_images(&group());
    server.get(&format!("{public}/none")).await.refused(404, "DiskImageNotFound");
    server.get(&format!("{public}/..%2fx")).await.refused(400, "InvalidRequest");
}

#[tokio::test]
async fn an_image_that_cannot_be_meant_is_refused_by_its_field() {
    let server = Server::start().await;
    let at = path::disk_images(&group());
    let cases = [
        ("{}", "InvalidRequest", "image.base"),
        (r#"{"image":{"base":"Not A Reference"}}"#, "InvalidRequest", "image.base"),
        (r#"{"image":{"base":"localhost:5000/a@sha256:123"}}"#, "InvalidRequest", "sha256:123"),
        (r#"{"image":{"base":"../../etc/passwd"}}"#, "InvalidRequest", "etc/passwd"),
        (
            r#"{"image":{"base":"a"},"managedIdentityResourceId":"x"}"#,
            "UnsupportedField",
            "managedIdentityResourceId",
        ),
    ];
    for (body, code, named) in cases {
        let message = server.put(&at, body).await.refused(400, code);
        assert!(message.contains(named), "{message}");
    }
    assert_eq!(server.get(&at).await.json()["value"], serde_json::json!([]));
}

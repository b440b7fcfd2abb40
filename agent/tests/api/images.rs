//! Disk images as far as the API's side goes: what a conversion makes of them is tested with it.

use std::time::Duration;

use holdfast_api::path;
use reqwest::Method;
use serde_json::Value;

use crate::server::{Answer, Server, group};

/// The image, once it is no longer Creating.
async fn settled(server: &Server, id: &str) -> Value {
    let at = path::disk_image(&group(), id);
    for _ in 0..200 {
        let image = server.get(&at).await.json();
        if image["status"]["state"] != "Creating" {
            return image;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("still Creating")
}

async fn make(server: &Server, request_id: &str) -> String {
    let body = r#"{"image":{"base":"localhost:1/none"},"labels":{"name":"n"}}"#;
    let request = server
        .request(Method::PUT, &path::disk_images(&group()))
        .header("x-ms-client-request-id", request_id);
    let answer = Answer::of(request.body(body).send().await.unwrap()).await;
    assert_eq!(answer.status, 201, "{answer:?}");
    let image = answer.json();
    assert_eq!(
        (&image["name"], &image["image"]["base"]),
        (&"n".into(), &"localhost:1/none".into())
    );
    image["id"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_retried_create_finds_its_disk_image_again_and_another_makes_another() {
    let server = Server::start().await;
    let first = make(&server, "one").await;
    assert_eq!(make(&server, "one").await, first);
    assert_ne!(make(&server, "two").await, first);
    let list = server.get(&path::disk_images(&group())).await.json();
    assert_eq!(list["value"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn an_image_that_could_not_be_made_says_why_and_can_be_deleted() {
    let server = Server::start().await;
    let id = make(&server, "one").await;
    let image = settled(&server, &id).await;
    assert_eq!(image["status"]["state"], "Failed");
    let message = image["status"]["message"].as_str().unwrap();
    assert!(message.contains("(hint: "), "{message}");
    let progress = server.get(&path::progress(&group(), &id)).await.json();
    assert_eq!(progress["state"], "Failed");
    let sandbox = format!(r#"{{"sourcesRef":{{"diskImage":{{"id":"{id}"}}}}}}"#);
    server.put(&path::sandboxes(&group()), sandbox).await.refused(409, "DiskImageNotReady");
    let at = path::disk_image(&group(), &id);
    assert_eq!(server.delete(&at).await.status, 204);
    server.get(&at).await.refused(404, "DiskImageNotFound");
}

#[tokio::test]
async fn an_archive_over_the_limit_is_refused_and_leaves_nothing() {
    let server = Server::prepared(|config| config.limits.archive_mib_max = 1).await;
    let at = format!("{}?name=local", path::import(&group()));
    let body = vec![0; 3 * 1024 * 1024];
    server.put(&at, body).await.refused(413, "BodyTooLarge");
    server.put(&path::import(&group()), "").await.refused(400, "InvalidRequest");
    let list = server.get(&path::disk_images(&group())).await.json();
    assert_eq!(list["value"], serde_json::json!([]));
    let spool = server.state().join("spool");
    assert_eq!(fs_err::read_dir(spool).unwrap().count(), 0);
}

#[tokio::test]
async fn public_images_are_listed_and_found_by_name() {
    let digest = format!("sha256:{}", "ab".repeat(32));
    let list = format!(r#"[{{"name":"debian","digest":"{digest}","description":"D"}}]"#);
    let server = Server::prepared(|config| {
        fs_err::write(config.paths.baked_images.join("public.json"), list).unwrap();
    })
    .await;
    let at = path::public_disk_images(&group());
    let listed = server.get(&at).await.json();
    assert_eq!(listed["value"][0]["name"], "debian");
    let image = server.get(&format!("{at}/debian")).await.json();
    assert_eq!(image, listed["value"][0]);
    assert_eq!((&image["status"]["state"], &image["description"]), (&"Ready".into(), &"D".into()));
    assert_eq!(image["tags"]["digest"], digest);
}

#[tokio::test]
async fn a_collection_of_an_empty_store_removes_nothing() {
    let server = Server::start().await;
    let report = server.post(path::IMAGES_GC, "").await;
    assert_eq!((report.status.as_u16(), &report.json()["imagesRemoved"]), (200, &0.into()));
}

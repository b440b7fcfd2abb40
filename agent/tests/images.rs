//! Disk images made by the real conversion process, from archives and from a real registry.
//! Needs root, docker-registry and skopeo.

#[path = "images/archive.rs"]
mod archive;
#[path = "images/node.rs"]
mod node;
#[path = "images/registry.rs"]
mod registry;

use std::net::TcpListener;

use archive::Archive;
use holdfast_model::{
    Digest, Resources, SandboxId, SandboxSpec, Secret, State, sandbox::ImageSource,
};
use holdfast_store::{DiskImageRecord, DiskImageState, SandboxRecord};
use holdfastd::images::{Credentials, GcError, ImageError};
use node::{Node, new_image};

fn sandbox_of(record: &DiskImageRecord, image: Digest) -> SandboxRecord {
    SandboxRecord {
        id: SandboxId::from_random([1; 20]),
        group: record.group.clone(),
        spec: SandboxSpec {
            image: ImageSource::Disk(record.id.clone()),
            resources: Resources::DEFAULT,
            labels: Default::default(),
            environment: Default::default(),
            entrypoint: None,
            cmd: None,
            lifecycle_json: None,
            egress_json: None,
            skip_egress_proxy: false,
        },
        state: State::Failed,
        failure: Some("not started".to_owned()),
        image,
        created_at_ms: 0,
        request_id: None,
        uid: None,
        saved: None,
        from_snapshot: None,
        egress_generation: 0,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_imported_archive_becomes_an_image_whose_parts_are_here() {
    let node = Node::start().await;
    let archive = Archive::new("import");
    let record = node.images.import(new_image("mine"), archive.file(), None).await.unwrap();
    assert_eq!(record.state, DiskImageState::Creating);
    let record = node.settled(&record.id).await;
    assert_eq!(record.state, DiskImageState::Ready, "{:?}", record.message);
    assert_eq!(record.digest, Some(archive.manifest));
    let located = node.images.locate(archive.manifest).await.unwrap().unwrap();
    assert_eq!(located.record.settings.cmd, ["hello"]);
    assert_eq!(located.record.segments.len(), 2);
    assert_eq!(node.images.progress(&record.id), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_archive_fails_with_a_reason_and_a_remedy_and_leaves_nothing() {
    let node = Node::start().await;
    let record = node.images.import(new_image("cut"), Archive::new("cut").cut(), None);
    let record = node.settled(&record.await.unwrap().id).await;
    assert_eq!(record.state, DiskImageState::Failed);
    assert!(!record.message.unwrap().is_empty() && !record.hint.unwrap().is_empty());
    assert_eq!(record.digest, None);
    node.images.gc().await.unwrap();
    assert_eq!(node.files_in_store(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn two_disk_images_of_one_reference_are_pulled_from_the_registry_once() {
    let registry = registry::Registry::start();
    let archive = Archive::new("pulled");
    let reference = registry.push(&archive, "team/app:1");
    let node = Node::start().await;
    let first = node.images.create(new_image(&reference), None).await.unwrap();
    let second = node.images.create(new_image(&reference), None).await.unwrap();
    for record in [first, second] {
        let record = node.settled(&record.id).await;
        assert_eq!(record.state, DiskImageState::Ready, "{:?}", record.message);
    }
    let layer = archive.layer.hex();
    let pulls = registry
        .log()
        .lines()
        .filter(|line| line.contains(&layer) && line.contains("GET"))
        .filter(|line| line.contains("response completed"))
        .count();
    assert_eq!(pulls, 1, "{}", registry.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_the_registry_does_not_have_fails_by_name() {
    let registry = registry::Registry::start();
    let node = Node::start().await;
    let reference = format!("{}/no/such:1", registry.host());
    let record = node.images.create(new_image(&reference), None).await.unwrap();
    let record = node.settled(&record.id).await;
    assert_eq!(record.state, DiskImageState::Failed);
    assert!(record.message.as_ref().unwrap().contains("no/such"), "{:?}", record.message);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_is_no_reference_is_refused_at_once() {
    let node = Node::start().await;
    let error = node.images.create(new_image("r.io/../etc"), None).await.unwrap_err();
    assert!(matches!(error, ImageError::Reference(_)), "{error}");
    assert_eq!(node.store.all_disk_images().unwrap(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn deleting_an_image_that_is_being_made_ends_its_conversion() {
    // Takes connections and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let node = Node::start().await;
    let reference = format!("{}/a/b:1", silent.local_addr().unwrap());
    let credentials = Credentials { username: "me".to_owned(), secret: Secret::new("hunter2") };
    let record = node.images.create(new_image(&reference), Some(credentials)).await.unwrap();
    node.until(|| node.conversions() == 1).await;
    assert!(node.images.progress(&record.id).is_some());
    assert!(matches!(node.images.gc().await, Err(GcError::Busy)));
    assert!(!node.environment_and_arguments_of_conversions().contains("hunter2"));
    node.images.delete(&record.id).await.unwrap();
    node.until(|| node.conversions() == 0).await;
    node.until_gc().await;
    let error = node.images.delete(&record.id).await.unwrap_err();
    assert!(matches!(error, ImageError::NotFound { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_ends_conversions_and_says_so_in_their_records() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let node = Node::start().await;
    let reference = format!("{}/a/b:1", silent.local_addr().unwrap());
    let record = node.images.create(new_image(&reference), None).await.unwrap();
    node.until(|| node.conversions() == 1).await;
    node.images.stop().await;
    let record = node.store.disk_image(&record.id).unwrap().unwrap();
    assert_eq!(record.state, DiskImageState::Failed);
    assert!(record.message.unwrap().contains("the agent was stopped"));
    assert_eq!(node.conversions(), 0);
    let error = node.images.create(new_image(&reference), None).await.unwrap_err();
    assert!(matches!(error, ImageError::Stopping), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn collection_keeps_what_a_disk_image_or_a_sandbox_needs_and_takes_the_rest() {
    let node = Node::start().await;
    let (kept, used, dropped) =
        (Archive::new("kept"), Archive::new("used"), Archive::new("dropped"));
    let mut records = Vec::new();
    for archive in [&kept, &used, &dropped] {
        let record = node.images.import(new_image("x"), archive.file(), None).await.unwrap();
        records.push(node.settled(&record.id).await);
    }
    let sandbox = sandbox_of(&records[1], used.manifest);
    node.store.put_sandbox(&sandbox).unwrap();
    let refused = node.images.delete(&records[1].id).await.unwrap_err();
    assert!(matches!(refused, ImageError::InUse { .. }), "{refused}");
    // Its record may go by other ways than a delete: the sandbox alone must be enough.
    node.store.remove_disk_image(&records[1].id).unwrap();
    node.images.delete(&records[2].id).await.unwrap();

    let report = node.images.gc().await.unwrap();
    assert_eq!((report.images, report.layers), (1, 1));
    assert!(report.blobs >= 2 && report.bytes > 0, "{report:?}");
    for (archive, here) in [(&kept, true), (&used, true), (&dropped, false)] {
        let located = node.images.locate(archive.manifest).await.unwrap();
        assert_eq!(located.is_some(), here, "{}", archive.name);
    }
    assert_eq!(node.images.gc().await.unwrap().images, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_agent_was_making_has_failed_after_the_next_start() {
    let node = Node::start().await;
    let archive = Archive::new("x");
    let record = node.images.import(new_image("x"), archive.file(), None).await.unwrap();
    let mut record = node.settled(&record.id).await;
    let node = node
        .restarted_after(|store| {
            // As it lies in the store while the conversion runs.
            (record.state, record.digest) = (DiskImageState::Creating, None);
            store.put_disk_image(&record).unwrap();
        })
        .await;
    let record = node.store.all_disk_images().unwrap().remove(0);
    assert_eq!(record.state, DiskImageState::Failed);
    assert!(record.message.unwrap().contains("the agent was restarted"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retried_create_makes_no_second_image() {
    let node = Node::start().await;
    let archive = Archive::new("x");
    let mut new = new_image("x");
    new.request_id = Some("r1".to_owned());
    let first = node.images.import(new.clone(), archive.file(), None).await.unwrap();
    let again = node.images.import(new, archive.file(), None).await.unwrap();
    assert_eq!(first.id, again.id);
    assert_eq!(node.store.all_disk_images().unwrap().len(), 1);
    node.settled(&first.id).await;
}

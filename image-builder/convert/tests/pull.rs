//! Images of a real registry.

mod support;

use fs_err as fs;
use holdfast_wire::convert::FailureKind;
use support::{
    Store,
    image::{Layout, damage, diff_ids},
    registry::DockerRegistry,
    remote,
};

#[test]
fn an_image_is_pulled_by_tag_and_digest_and_only_once() {
    let (image, registry, store) = (Layout::new(), DockerRegistry::open(), Store::new());
    let reference = registry.push(&image.image(), "library/app:v1");
    let digest = store.convert(remote(&reference, None)).digest();
    assert_eq!(digest, image.digest());
    assert_eq!(store.record(&digest).layers, diff_ids(&image.image()));
    store.assert_tidy();
    // Packed layers are not kept; manifest and config are.
    assert_eq!(store.names("blobs/sha256").len(), 2);
    let (blobs, manifests) =
        (registry.count("GET", "/blobs/"), registry.count("GET", "/manifests/"));
    assert_eq!(store.convert(remote(&reference, None)).digest(), digest);
    assert_eq!(registry.count("GET", "/blobs/"), blobs);
    assert_eq!(registry.count("GET", "/manifests/"), manifests);
    let by_digest = reference.replace(":v1", &format!("@{digest}"));
    assert_eq!(store.convert(remote(&by_digest, None)).digest(), digest);
    assert_eq!(Store::new().convert(remote(&by_digest, None)).digest(), digest);
}

#[test]
fn progress_counts_every_layer_and_byte() {
    let (image, registry, store) =
        (Layout::with_data(30_000_000), DockerRegistry::open(), Store::new());
    let reference = registry.push(&image.image(), "app:v1");
    let outcome = store.convert(remote(&reference, None));
    for progress in &outcome.progress {
        assert!(progress.bytes_done <= progress.bytes && progress.layers_done <= progress.layers);
        assert!(progress.layers == 0 || progress.bytes > 30_000_000, "{progress:?}");
    }
    outcome.digest();
}

#[test]
fn a_guarded_registry_lets_in_who_has_the_password_and_tells_others_so() {
    let (image, registry, store) = (Layout::new(), DockerRegistry::guarded(), Store::new());
    let reference = registry.push(&image.image(), "secret/app:v1");
    let failure = store.convert(remote(&reference, None));
    failure.failure(FailureKind::Unauthorized, "without credentials");
    let wrong = store.convert(remote(&reference, Some(("me", "guess"))));
    let failure = wrong.failure(FailureKind::Unauthorized, "secret/app:v1");
    assert!(!failure.message.contains("guess") && failure.message.contains("given credentials"));
    let digest = store.convert(remote(&reference, Some(("me", "secret")))).digest();
    assert_eq!(digest, image.digest());
    // That the image is here now opens it to nobody else.
    let by_digest = reference.replace(":v1", &format!("@{digest}"));
    for name in [&reference, &by_digest] {
        store.convert(remote(name, None)).failure(FailureKind::Unauthorized, "secret/app");
    }
    store.assert_tidy();
}

#[test]
fn unknown_images_tags_and_registries_are_named() {
    let (image, registry, store) = (Layout::new(), DockerRegistry::open(), Store::new());
    let reference = registry.push(&image.image(), "app:v1");
    let nope = reference.replace(":v1", ":nope");
    store.convert(remote(&nope, None)).failure(FailureKind::NotFound, "app:nope");
    let nope = reference.replace("app", "other");
    store.convert(remote(&nope, None)).failure(FailureKind::NotFound, "other:v1");
    let outcome = store.convert(remote("127.0.0.1:1/app", None));
    outcome.failure(FailureKind::Unavailable, "127.0.0.1:1");
    store.convert(remote("r.io/../app", None)).failure(FailureKind::BadImage, "r.io/../app");
    store.assert_tidy();
}

#[test]
fn of_an_index_in_a_registry_the_image_of_the_platform_is_taken() {
    let (image, registry, store) =
        (Layout::new().with_index(), DockerRegistry::open(), Store::new());
    let from = format!("oci:{}:multi", image.path().display());
    let reference = registry.push(&from, "app:multi");
    let digest = store.convert(remote(&reference, None)).digest();
    assert_eq!(store.record(&digest).architecture, "amd64");
    let arm = store.start_for("linux/arm64", remote(&reference, None)).outcome().digest();
    assert_eq!(store.record(&arm).architecture, "arm64");
    let riscv = store.start_for("linux/riscv64", remote(&reference, None)).outcome();
    riscv.failure(FailureKind::BadImage, "linux/riscv64");
}

#[test]
fn docker_manifests_and_zstd_layers_are_pulled() {
    let (image, registry) = (Layout::new(), DockerRegistry::open());
    let zstd = ["--dest-compress", "--dest-compress-format", "zstd"];
    let forms = [
        image.copy(&["--format", "v2s2"], "dir", "docker").display().to_string(),
        image.copy(&zstd, "dir", "zstd").display().to_string(),
    ];
    for (number, form) in forms.iter().enumerate() {
        let reference = registry.push(&format!("dir:{form}"), &format!("app:{number}"));
        let store = Store::new();
        let digest = store.convert(remote(&reference, None)).digest();
        assert_eq!(store.record(&digest).layers, diff_ids(&image.image()), "{form}");
        store.assert_tidy();
    }
}

#[test]
fn a_layer_that_the_registry_has_damaged_or_cut_short_is_refused_by_digest() {
    let (image, registry, store) = (Layout::new(), DockerRegistry::open(), Store::new());
    let reference = registry.push(&image.image(), "app:v1");
    let layer = registry.blob(&image.layer(1));
    let whole = fs::read(&layer).unwrap();
    let name = image.layer(1).to_string();
    damage(&layer);
    store.convert(remote(&reference, None)).failure(FailureKind::BadImage, &name);
    fs::write(&layer, &whole[..whole.len() / 2]).unwrap();
    store.convert(remote(&reference, None)).failure(FailureKind::BadImage, &name);
    store.assert_tidy();
    assert!(store.names("images").is_empty());
    fs::write(&layer, &whole).unwrap();
    assert_eq!(store.convert(remote(&reference, None)).digest(), image.digest());
}

#[test]
fn a_dead_registry_does_not_stop_an_image_that_is_here() {
    let (image, mut registry, store) = (Layout::new(), DockerRegistry::open(), Store::new());
    let reference = registry.push(&image.image(), "app:v1");
    let digest = store.convert(remote(&reference, None)).digest();
    registry.crash();
    assert_eq!(store.convert(remote(&reference, None)).digest(), digest);
    let other = reference.replace(":v1", ":v2");
    store.convert(remote(&other, None)).failure(FailureKind::Unavailable, "app:v2");
}

#[test]
fn conversions_of_one_image_at_once_fetch_each_layer_once() {
    let (image, registry, store) =
        (Layout::with_data(8_000_000), DockerRegistry::open(), Store::new());
    let reference = registry.push(&image.image(), "app:v1");
    let running: Vec<_> = (0..4).map(|_| store.start(remote(&reference, None))).collect();
    for running in running {
        assert_eq!(running.outcome().digest(), image.digest());
    }
    for number in 0..3 {
        let layer = image.layer(number).to_string();
        assert_eq!(registry.count("GET", &layer), 1, "layer {number}");
    }
    store.assert_tidy();
}

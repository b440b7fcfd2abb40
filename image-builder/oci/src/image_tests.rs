//! Tests of finding an image: forms, choices, and everything that must be refused.

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::manifest::{DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST};

/// Content held in memory.
#[derive(Default)]
struct Memory(BTreeMap<Digest, Vec<u8>>);

impl Memory {
    fn put(&mut self, value: &Value) -> Value {
        let bytes = serde_json::to_vec(value).unwrap();
        let digest = digest_of(&bytes);
        let size = bytes.len();
        self.0.insert(digest, bytes);
        json!({ "digest": digest, "size": size })
    }

    fn manifest(&mut self, architecture: &str, manifest_type: &str, layer_type: &str) -> Value {
        let config = json!({
            "os": "linux", "architecture": architecture,
            "rootfs": { "type": "layers", "diff_ids": [digest_of(b"layer")] },
        });
        let config = self.put(&config);
        let layer = json!({ "mediaType": layer_type, "digest": digest_of(b"packed"), "size": 6,
            "urls": ["https://elsewhere.example/layer"] });
        let mut entry = self.put(&json!({
            "schemaVersion": 2, "mediaType": manifest_type, "config": config, "layers": [layer],
        }));
        entry["mediaType"] = manifest_type.into();
        entry["platform"] = json!({ "os": "linux", "architecture": architecture });
        entry
    }

    fn index(&mut self, index_type: &str, entries: &[Value]) -> Value {
        self.put(&json!({ "schemaVersion": 2, "mediaType": index_type, "manifests": entries }))
    }

    fn find(&mut self, top: &Value, platform: &str) -> Result<Image, Error> {
        Image::find(self, digest(top), &platform.parse().unwrap())
    }
}

impl Documents for Memory {
    fn document(&mut self, _: Kind, digest: Digest) -> Result<Vec<u8>, Error> {
        let missing = || Error::NotFound { what: digest.to_string(), place: self.place() };
        self.0.get(&digest).cloned().ok_or_else(missing)
    }

    fn place(&self) -> String {
        "memory".to_owned()
    }
}

fn digest(entry: &Value) -> Digest {
    entry["digest"].as_str().unwrap().parse().unwrap()
}

const OCI_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

#[test]
fn an_index_gives_the_image_of_the_wanted_platform() {
    let mut memory = Memory::default();
    let arm = memory.manifest("arm64", OCI_MANIFEST, OCI_GZIP);
    let amd = memory.manifest("amd64", OCI_MANIFEST, OCI_GZIP);
    let signature = json!({ "mediaType": "application/x-signature", "digest": digest_of(b"s"),
        "size": 1, "platform": { "os": "linux", "architecture": "amd64" } });
    let top = memory.index(OCI_INDEX, &[signature, arm.clone(), amd.clone()]);
    assert_eq!(memory.find(&top, "linux/amd64").unwrap().digest, digest(&amd));
    assert_eq!(memory.find(&top, "linux/arm64").unwrap().digest, digest(&arm));
    let error = memory.find(&top, "linux/riscv64").unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("no image for linux/riscv64, only for linux/arm64, linux/amd64")
    );
}

#[test]
fn docker_lists_and_manifests_are_read_like_those_of_oci() {
    let mut memory = Memory::default();
    let layer = "application/vnd.docker.image.rootfs.diff.tar.gzip";
    let entry = memory.manifest("amd64", DOCKER_MANIFEST, layer);
    let top = memory.index(DOCKER_LIST, std::slice::from_ref(&entry));
    let image = memory.find(&top, "linux/amd64").unwrap();
    assert_eq!(image.digest, digest(&entry));
    assert_eq!(image.layers[0].compression, Compression::Gzip);
    assert_eq!(image.layers[0].diff_id, digest_of(b"layer"));
}

#[test]
fn a_config_of_another_architecture_is_refused_whatever_the_index_says() {
    let mut memory = Memory::default();
    let mut entry = memory.manifest("arm64", OCI_MANIFEST, OCI_GZIP);
    entry["platform"]["architecture"] = "amd64".into();
    let top = memory.index(OCI_INDEX, &[entry]);
    assert!(matches!(memory.find(&top, "linux/amd64"), Err(Error::NoPlatform { .. })));
}

#[test]
fn a_document_that_is_both_manifest_and_index_is_refused() {
    let mut memory = Memory::default();
    let entry = memory.manifest("amd64", OCI_MANIFEST, OCI_GZIP);
    let mut both: Value = serde_json::from_slice(&memory.0[&digest(&entry)]).unwrap();
    both["manifests"] = json!([entry]);
    let top = memory.put(&both);
    assert!(matches!(memory.find(&top, "linux/amd64"), Err(Error::Malformed { .. })));
}

#[test]
fn content_other_than_its_digest_or_size_says_is_refused() {
    let mut memory = Memory::default();
    let entry = memory.manifest("amd64", OCI_MANIFEST, OCI_GZIP);
    let mut wrong = entry.clone();
    wrong["size"] = 7.into();
    let top = memory.index(OCI_INDEX, &[wrong]);
    assert!(matches!(memory.find(&top, "linux/amd64"), Err(Error::Size { .. })));
    memory.0.get_mut(&digest(&entry)).unwrap().push(b' ');
    let error = memory.find(&entry, "linux/amd64").unwrap_err();
    assert!(matches!(error, Error::Digest { .. }));
    assert!(error.to_string().contains(&digest(&entry).to_string()));
}

#[test]
fn an_index_that_leads_to_ever_more_indexes_is_given_up() {
    let mut memory = Memory::default();
    let mut entry = memory.manifest("amd64", OCI_MANIFEST, OCI_GZIP);
    for _ in 0..=INDEX_DEPTH_MAX {
        entry = memory.index(OCI_INDEX, &[entry]);
    }
    let error = memory.find(&entry, "linux/amd64").unwrap_err();
    assert!(error.to_string().contains("too many indexes"));
}

#[test]
fn unknown_layer_types_and_too_many_layers_are_refused() {
    let mut memory = Memory::default();
    let entry = memory.manifest("amd64", OCI_MANIFEST, "application/x-helm-chart");
    assert!(matches!(memory.find(&entry, "linux/amd64"), Err(Error::Malformed { .. })));
    let layer = json!({ "mediaType": OCI_GZIP, "digest": digest_of(b"l"), "size": 1 });
    let config = memory.put(&json!({}));
    let entry = memory.put(&json!({
        "schemaVersion": 2, "config": config, "layers": vec![layer; manifest::LAYERS_MAX + 1],
    }));
    assert!(matches!(memory.find(&entry, "linux/amd64"), Err(Error::TooLarge { .. })));
}

#[test]
fn every_packing_of_layers_is_known_by_its_type() {
    let cases = [
        ("application/vnd.oci.image.layer.v1.tar", Some(Compression::Plain)),
        ("application/vnd.oci.image.layer.v1.tar+gzip", Some(Compression::Gzip)),
        ("application/vnd.oci.image.layer.v1.tar+zstd", Some(Compression::Zstd)),
        ("application/vnd.docker.image.rootfs.diff.tar.gzip", Some(Compression::Gzip)),
        ("application/vnd.docker.image.rootfs.diff.tar.zstd", Some(Compression::Zstd)),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", Some(Compression::Gzip)),
        ("application/vnd.oci.image.layer.v1.tar+encrypted", None),
        ("text/plain", None),
    ];
    for (text, compression) in cases {
        assert_eq!(Compression::of(text), compression, "{text}");
    }
}

proptest! {
    #[test]
    fn any_bytes_are_a_document_or_an_error(bytes: Vec<u8>) {
        let _ = Document::parse(&bytes, "test");
        let _ = Config::parse(&bytes, "test");
    }

    #[test]
    fn a_manifest_damaged_anywhere_never_panics(at in 0usize..400, byte: u8) {
        let mut memory = Memory::default();
        let entry = memory.manifest("amd64", OCI_MANIFEST, OCI_GZIP);
        let mut bytes = memory.0[&digest(&entry)].clone();
        if let Some(place) = bytes.get_mut(at) {
            *place = byte;
        }
        let _ = Document::parse(&bytes, "test");
    }
}

#[test]
fn what_the_specs_own_types_write_is_read_as_it_was_meant() {
    use oci_spec::image::{
        Arch, Descriptor, ImageConfigurationBuilder, ImageIndexBuilder, ImageManifestBuilder,
        MediaType, Os, PlatformBuilder, RootFsBuilder,
    };
    let mut memory = Memory::default();
    let describe = |media_type, entry: &Value| {
        let size = entry["size"].as_u64().unwrap();
        let digest: oci_spec::image::Digest = entry["digest"].as_str().unwrap().parse().unwrap();
        Descriptor::new(media_type, size, digest)
    };
    let diff_ids = vec![digest_of(b"layer").to_string()];
    let root = RootFsBuilder::default().typ("layers").diff_ids(diff_ids).build().unwrap();
    let config = ImageConfigurationBuilder::default()
        .architecture(Arch::Amd64)
        .os(Os::Linux)
        .rootfs(root)
        .build()
        .unwrap();
    let config = memory.put(&serde_json::to_value(config).unwrap());
    let mut layer = describe(MediaType::ImageLayerZstd, &memory.put(&json!("packed")));
    layer.set_urls(Some(vec!["https://elsewhere.example/layer".to_owned()]));
    let manifest = ImageManifestBuilder::default()
        .schema_version(2u32)
        .media_type(MediaType::ImageManifest)
        .config(describe(MediaType::ImageConfig, &config))
        .layers(vec![layer.clone()])
        .build()
        .unwrap();
    let entry = memory.put(&serde_json::to_value(manifest).unwrap());
    let mut described = describe(MediaType::ImageManifest, &entry);
    let platform = PlatformBuilder::default().architecture(Arch::Amd64).os(Os::Linux);
    described.set_platform(Some(platform.build().unwrap()));
    let index = ImageIndexBuilder::default()
        .schema_version(2u32)
        .media_type(MediaType::ImageIndex)
        .manifests(vec![described])
        .build()
        .unwrap();
    let index = memory.put(&serde_json::to_value(index).unwrap());

    let image = memory.find(&index, "linux/amd64").unwrap();
    assert_eq!(image.digest, digest(&entry));
    let read = &image.layers[0];
    assert_eq!(read.digest.to_string(), layer.digest().to_string());
    assert_eq!((read.size, read.compression), (layer.size(), Compression::Zstd));
    assert_eq!(read.diff_id, digest_of(b"layer"));
}

//! Converts the image of an OCI layout folder, as `holdfast-convert` does, without its process.

use std::path::Path;

use fs_err as fs;
use holdfast_model::Digest;
use holdfast_rootfs::{
    Compression, ImageRecord, LayerDescriptor, Limits, Settings, assemble, convert_layer, hold,
};
use serde_json::Value;

/// The one image of the layout, or the last.
pub(crate) fn convert(layout: &Path, store: &Path) -> ImageRecord {
    let index = json(&layout.join("index.json"));
    let manifest_digest = digest(&index["manifests"].as_array().unwrap().last().unwrap()["digest"]);
    let manifest = json(&blob(layout, &manifest_digest));
    let config = json(&blob(layout, &digest(&manifest["config"]["digest"])));
    let _hold = hold(store).unwrap();
    let mut layers = Vec::new();
    let diff_ids = config["rootfs"]["diff_ids"].as_array().unwrap();
    for (layer, diff_id) in manifest["layers"].as_array().unwrap().iter().zip(diff_ids) {
        let descriptor = LayerDescriptor {
            digest: digest(&layer["digest"]),
            size: layer["size"].as_u64().unwrap(),
            diff_id: digest(diff_id),
            compression: Compression::Detect,
        };
        let file = fs::File::open(blob(layout, &descriptor.digest)).unwrap();
        let info = convert_layer(store, file, &descriptor, &Limits::default(), &mut |_| {});
        layers.push(info.unwrap().diff_id);
    }
    let architecture = config["architecture"].as_str().unwrap();
    assemble(store, &manifest_digest, &layers, Settings::default(), architecture).unwrap()
}

fn blob(layout: &Path, digest: &Digest) -> std::path::PathBuf {
    layout.join("blobs/sha256").join(digest.hex())
}

fn digest(value: &Value) -> Digest {
    value.as_str().unwrap().parse().unwrap()
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

//! One image as a registry has it: `/v2/app/…` with manifests by tag and digest, and blobs.

use std::collections::BTreeMap;

use holdfast_model::Digest;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::server::{Reply, Request};

pub const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

pub fn digest_of(bytes: &[u8]) -> Digest {
    Digest::from_sha256(Sha256::digest(bytes).into())
}

#[derive(Debug, Clone)]
pub struct Content {
    /// By the end of the path: `manifests/latest`, `blobs/sha256:…`.
    pub files: BTreeMap<String, Vec<u8>>,
    pub manifest: Digest,
    pub layers: Vec<Digest>,
}

impl Content {
    /// An image of plain tar layers, tagged `latest`.
    pub fn of_layers(layers: &[Vec<u8>]) -> Self {
        let mut files = BTreeMap::new();
        let mut blob = |bytes: &[u8]| {
            let digest = digest_of(bytes);
            files.insert(format!("blobs/{digest}"), bytes.to_vec());
            digest
        };
        let digests: Vec<_> = layers.iter().map(|layer| blob(layer)).collect();
        let config = serde_json::to_vec(&json!({
            "os": "linux", "architecture": "amd64", "config": { "Cmd": ["/bin/sh"] },
            "rootfs": { "type": "layers", "diff_ids": digests },
        }));
        let config = config.unwrap();
        let descriptor = |media_type: &str, digest: Digest, size: usize| {
            json!({ "mediaType": media_type, "digest": digest, "size": size,
                "urls": ["http://127.0.0.1:1/must-not-be-fetched"] })
        };
        let config_type = "application/vnd.oci.image.config.v1+json";
        let layer_type = "application/vnd.oci.image.layer.v1.tar";
        let sized = digests.iter().zip(layers);
        let manifest = serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": descriptor(config_type, blob(&config), config.len()),
            "layers": sized.map(|(digest, layer)| descriptor(layer_type, *digest, layer.len()))
                .collect::<Vec<_>>(),
        }));
        let manifest = manifest.unwrap();
        let digest = digest_of(&manifest);
        files.insert("manifests/latest".to_owned(), manifest.clone());
        files.insert(format!("manifests/{digest}"), manifest);
        Self { files, manifest: digest, layers: digests }
    }

    /// An image of one layer of so many bytes, which is no archive: enough for a download.
    pub fn of_bytes(count: usize) -> Self {
        let layer = (0..count).map(|at| u8::try_from(at * 7 % 251).unwrap()).collect();
        Self::of_layers(&[layer])
    }

    /// What a registry without faults answers.
    pub fn reply(&self, request: &Request) -> Reply {
        let found = self.files.iter().find(|(name, _)| request.path.ends_with(name.as_str()));
        let Some((name, bytes)) = found else { return Reply::status(404) };
        let digest = digest_of(bytes);
        let range = request.header("range").and_then(|range| range.strip_prefix("bytes="));
        let first: Option<usize> = range.and_then(|range| range.trim_end_matches('-').parse().ok());
        let reply = match first {
            None => Reply::body(bytes.clone()),
            Some(first) if first >= bytes.len() => return Reply::status(416),
            Some(first) => {
                let (last, all) = (bytes.len() - 1, bytes.len());
                Reply { status: 206, ..Reply::body(&bytes[first..]) }
                    .with("Content-Range", format!("bytes {first}-{last}/{all}"))
            }
        };
        let reply = reply.with("Docker-Content-Digest", digest.to_string());
        if name.starts_with("manifests/") {
            reply.with("Content-Type", MANIFEST_TYPE)
        } else {
            reply
        }
    }
}

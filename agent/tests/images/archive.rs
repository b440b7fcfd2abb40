//! A small image as an OCI archive. Its content follows from its name.

use std::io::{Seek, Write};

use fs_err as fs;
use holdfast_model::Digest;
use serde_json::json;
use sha2::{Digest as _, Sha256};

pub(crate) struct Archive {
    pub(crate) name: String,
    pub(crate) manifest: Digest,
    pub(crate) layer: Digest,
    tar: Vec<u8>,
}

fn digest(bytes: &[u8]) -> Digest {
    Digest::from_sha256(Sha256::digest(bytes).into())
}

fn add(tar: &mut tar::Builder<Vec<u8>>, path: &str, content: &[u8]) {
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(u64::try_from(content.len()).unwrap());
    tar.append_data(&mut header, path, content).unwrap();
}

impl Archive {
    pub(crate) fn new(name: &str) -> Self {
        let mut layer = tar::Builder::new(Vec::new());
        add(&mut layer, "etc/name", name.repeat(10_000).as_bytes());
        let layer = layer.into_inner().unwrap();
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": { "Cmd": ["hello"] },
            "rootfs": { "type": "layers", "diff_ids": [digest(&layer)] },
        });
        let config = serde_json::to_vec(&config).unwrap();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": digest(&config), "size": config.len(),
            },
            "layers": [{
                "mediaType": "application/vnd.oci.image.layer.v1.tar",
                "digest": digest(&layer), "size": layer.len(),
            }],
        });
        let manifest = serde_json::to_vec(&manifest).unwrap();
        let index = json!({
            "schemaVersion": 2,
            "manifests": [{
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "digest": digest(&manifest), "size": manifest.len(),
                "platform": { "architecture": "amd64", "os": "linux" },
            }],
        });
        let mut tar = tar::Builder::new(Vec::new());
        add(&mut tar, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
        add(&mut tar, "index.json", &serde_json::to_vec(&index).unwrap());
        for blob in [&layer, &config, &manifest] {
            add(&mut tar, &format!("blobs/sha256/{}", digest(blob).hex()), blob);
        }
        Self {
            name: name.to_owned(),
            manifest: digest(&manifest),
            layer: digest(&layer),
            tar: tar.into_inner().unwrap(),
        }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.tar
    }

    /// The archive as an open file that has no name any more.
    pub(crate) fn file(&self) -> fs::File {
        spooled(&self.tar)
    }

    /// Only its first half.
    pub(crate) fn cut(&self) -> fs::File {
        spooled(&self.tar[..self.tar.len() / 2])
    }
}

fn spooled(bytes: &[u8]) -> fs::File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    fs::File::from_parts(file, "archive")
}

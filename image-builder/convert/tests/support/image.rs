//! A small real image: busybox and some data, made by umoci.

use std::path::Path;

use fs_err as fs;
use holdfast_model::Digest;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::{at, tool};

/// A layout folder with one image, tagged `v1`.
pub struct Layout {
    folder: tempfile::TempDir,
}

pub fn digest_of(bytes: &[u8]) -> Digest {
    Digest::from_sha256(Sha256::digest(bytes).into())
}

/// Bytes that do not compress and are the same in every run.
pub fn noise(count: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = move || {
        // xorshift64: good enough to be noise to a compressor.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[0]
    };
    (0..count).map(|_| next()).collect()
}

impl Layout {
    /// Three layers: busybox and links to it, data, and a whiteout of some of that.
    pub fn new() -> Self {
        Self::with_data(300_000)
    }

    pub fn with_data(bytes: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (root, layout) = (folder.path().join("root"), at(folder.path(), "layout:v1"));
        fs::create_dir_all(root.join("1/bin")).unwrap();
        fs::copy("/bin/busybox", root.join("1/bin/busybox")).unwrap();
        std::os::unix::fs::symlink("busybox", root.join("1/bin/sh")).unwrap();
        fs::hard_link(root.join("1/bin/busybox"), root.join("1/bin/cat")).unwrap();
        fs::create_dir_all(root.join("2/data")).unwrap();
        fs::write(root.join("2/data/noise"), noise(bytes, 7)).unwrap();
        fs::write(root.join("2/data/gone"), b"covered by the next layer").unwrap();
        fs::create_dir_all(root.join("3/data")).unwrap();
        fs::write(root.join("3/data/.wh.gone"), b"").unwrap();
        fs::write(root.join("3/data/last"), b"last").unwrap();
        tool("umoci", &["init", "--layout", &at(folder.path(), "layout")]);
        tool("umoci", &["new", "--image", &layout]);
        for layer in ["1", "2", "3"] {
            let tar = at(folder.path(), "layer.tar");
            let form = ["--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner"];
            let mut arguments = form.to_vec();
            let from = at(&root, layer);
            arguments.extend(["-C", &from, "-cf", &tar, "."]);
            tool("tar", &arguments);
            tool("umoci", &["raw", "add-layer", "--image", &layout, &tar]);
        }
        let config = ["--config.cmd=/bin/sh", "--config.user=7:8", "--config.env=A=b"];
        tool("umoci", &[&["config", "--image", layout.as_str()], &config[..]].concat());
        tool("umoci", &["gc", "--layout", &at(folder.path(), "layout")]);
        Self { folder }
    }

    pub fn path(&self) -> std::path::PathBuf {
        self.folder.path().join("layout")
    }

    /// For skopeo.
    pub fn image(&self) -> String {
        format!("oci:{}:v1", self.path().display())
    }

    pub fn index(&self) -> Value {
        serde_json::from_slice(&fs::read(self.path().join("index.json")).unwrap()).unwrap()
    }

    pub fn digest(&self) -> Digest {
        self.index()["manifests"][0]["digest"].as_str().unwrap().parse().unwrap()
    }

    pub fn manifest(&self) -> Value {
        serde_json::from_slice(&fs::read(self.blob(&self.digest())).unwrap()).unwrap()
    }

    pub fn layer(&self, number: usize) -> Digest {
        self.manifest()["layers"][number]["digest"].as_str().unwrap().parse().unwrap()
    }

    pub fn blob(&self, digest: &Digest) -> std::path::PathBuf {
        self.path().join("blobs/sha256").join(digest.hex())
    }

    /// Another form of the image, made by skopeo in the same folder.
    pub fn copy(&self, options: &[&str], kind: &str, name: &str) -> std::path::PathBuf {
        let path = self.folder.path().join(name.split(':').next().unwrap());
        let target = format!("{kind}:{}", at(self.folder.path(), name));
        let image = self.image();
        let mut arguments = vec!["copy", "--quiet"];
        arguments.extend(options);
        arguments.extend([image.as_str(), target.as_str()]);
        tool("skopeo", &arguments);
        path
    }

    /// Puts the image and one like it for arm64 behind an index, tagged `multi`.
    pub fn with_index(self) -> Self {
        let (mine, layout) = (self.index()["manifests"][0].clone(), self.path());
        let image = format!("{}:v1", layout.display());
        tool("umoci", &["config", "--image", &image, "--tag", "arm", "--architecture", "arm64"]);
        let index = self.index();
        let tagged = |entry: &&Value| {
            entry["annotations"]["org.opencontainers.image.ref.name"] == json!("arm")
        };
        let other = index["manifests"].as_array().unwrap().iter().find(tagged).unwrap().clone();
        let entry = |entry: &Value, architecture: &str| {
            json!({ "mediaType": entry["mediaType"], "digest": entry["digest"],
                "size": entry["size"], "platform": { "os": "linux", "architecture": architecture } })
        };
        let kind = "application/vnd.oci.image.index.v1+json";
        let entries = [entry(&other, "arm64"), entry(&mine, "amd64")];
        let inner = json!({ "schemaVersion": 2, "mediaType": kind, "manifests": entries });
        let bytes = serde_json::to_vec(&inner).unwrap();
        let digest = digest_of(&bytes);
        fs::write(self.blob(&digest), &bytes).unwrap();
        let outer = json!({ "schemaVersion": 2, "manifests": [{
            "mediaType": kind, "digest": digest, "size": bytes.len(),
            "annotations": { "org.opencontainers.image.ref.name": "multi" },
        }]});
        fs::write(layout.join("index.json"), serde_json::to_vec(&outer).unwrap()).unwrap();
        self
    }
}

/// The diff_ids of an image's config, as skopeo reads them.
pub fn diff_ids(image: &str) -> Vec<Digest> {
    let config: Value =
        serde_json::from_str(&tool("skopeo", &["inspect", "--config", image])).unwrap();
    let ids = config["rootfs"]["diff_ids"].as_array().unwrap();
    ids.iter().map(|id| id.as_str().unwrap().parse().unwrap()).collect()
}

/// Changes one byte in the middle of a file.
pub fn damage(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xff;
    fs::write(path, bytes).unwrap();
}

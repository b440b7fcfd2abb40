//! Images that came with the node and that every group has.

use std::{io, path::Path};

use fs_err as fs;
use holdfast_model::Digest;
use serde::Deserialize;

/// One public image: its files are in the baked store.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct PublicImage {
    pub name: String,
    pub digest: Digest,
    #[serde(default)]
    pub description: String,
}

/// Reads `public.json` of the baked store. A node without one has no public images.
pub(super) fn load(baked: &Path) -> io::Result<Vec<PublicImage>> {
    let text = match fs::read(baked.join("public.json")) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut images: Vec<PublicImage> = serde_json::from_slice(&text)?;
    images.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(images)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_without_the_list_has_no_public_images() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(load(folder.path()).unwrap(), []);
    }

    #[test]
    fn public_images_are_listed_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let digest = format!("sha256:{}", "ab".repeat(32));
        let text = format!(
            r#"[{{"name":"ubuntu","digest":"{digest}","description":"U"}},{{"name":"debian","digest":"{digest}"}}]"#
        );
        fs::write(folder.path().join("public.json"), text).unwrap();
        let names: Vec<_> = load(folder.path()).unwrap().into_iter().map(|i| i.name).collect();
        assert_eq!(names, ["debian", "ubuntu"]);
    }

    #[test]
    fn a_list_with_a_bad_digest_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("public.json"), r#"[{"name":"x","digest":"../x"}]"#).unwrap();
        assert!(load(folder.path()).is_err());
    }
}

//! Public disk images baked into the node, so that it is of use without any registry.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, ensure};

use crate::{
    cache::{Cache, file_digest},
    command::run,
    debian::{SUITE, Sources, bootstrap},
};

const NAME: &str = "debian";
const DESCRIPTION: &str = "Debian 13 (trixie), minimal, with Python 3";
/// What the image holds beside a minimal Debian.
const PACKAGES: [&str; 2] = ["ca-certificates", "python3"];
/// Counted up when a step changes, so that caches are made anew.
const RECIPE: &str = "1";

/// An image store with the public images, made by the converter that the node has.
pub(crate) fn ensure(cache: &Cache, sources: &Sources, convert: &Path) -> Result<PathBuf> {
    let layout = ensure_layout(cache, sources)?;
    let inputs = [RECIPE, &layout.to_string_lossy(), &file_digest(convert)?];
    let entry = cache.ensure("images", &inputs, |draft| {
        let store = draft.join("store");
        let digest = run(Command::new(convert)
            .args(["--name", NAME, "--public", NAME, "--description", DESCRIPTION])
            .arg("--layout")
            .arg(&layout)
            .arg("--store")
            .arg(&store))?;
        ensure!(digest.starts_with("sha256:"), "the converter names no image: {digest:?}");
        drop_compressed(&store)
    })?;
    Ok(entry.join("store"))
}

/// Layers as they were pulled are of no use to a store that nothing is pushed from: only their
/// converted form is read. Manifests and configs stay.
fn drop_compressed(store: &Path) -> Result<()> {
    const DOCUMENT_BYTES_MAX: u64 = 1 << 20;
    for blob in fs_err::read_dir(store.join("blobs/sha256"))? {
        let blob = blob?;
        if blob.metadata()?.len() > DOCUMENT_BYTES_MAX {
            fs_err::remove_file(blob.path())?;
        }
    }
    Ok(())
}

/// The image `debian` as an OCI layout folder.
fn ensure_layout(cache: &Cache, sources: &Sources) -> Result<PathBuf> {
    let inputs = [&[RECIPE, SUITE], &PACKAGES[..]].concat();
    let folder = cache.ensure("public", &inputs, |draft| {
        let tar = draft.join("layer.tar");
        bootstrap(sources, "minbase", &PACKAGES, &tar)?;
        let layout = draft.join("layout");
        let image = format!("{}:{NAME}", layout.display());
        let umoci = |args: &[&str]| run(Command::new("umoci").args(args));
        umoci(&["init", "--layout", &layout.to_string_lossy()])?;
        umoci(&["new", "--image", &image])?;
        umoci(&["raw", "add-layer", "--image", &image, &tar.to_string_lossy()])?;
        let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        let cmd = "/bin/bash";
        umoci(&["config", "--image", &image, "--config.cmd", cmd, "--config.env", path])?;
        fs_err::remove_file(&tar)?;
        Ok(())
    })?;
    Ok(folder.join("layout"))
}

//! Public disk images baked into the node, so that it is of use without any registry.

use std::{path::PathBuf, process::Command};

use anyhow::Result;

use crate::{
    cache::Cache,
    command::run,
    debian::{SUITE, Sources, bootstrap},
};

/// What the image `debian` holds beside a minimal Debian.
const PACKAGES: [&str; 2] = ["ca-certificates", "python3"];

/// An OCI layout folder with the image `debian`.
pub(crate) fn ensure_layout(cache: &Cache, sources: &Sources) -> Result<PathBuf> {
    let inputs = [&["1", SUITE], &PACKAGES[..]].concat();
    let folder = cache.ensure("public", &inputs, |draft| {
        let tar = draft.join("layer.tar");
        bootstrap(sources, "minbase", &PACKAGES, &tar)?;
        let layout = draft.join("layout");
        let image = format!("{}:debian", layout.display());
        let umoci = |args: &[&str]| run(Command::new("umoci").args(args));
        umoci(&["init", "--layout", &layout.to_string_lossy()])?;
        umoci(&["new", "--image", &image])?;
        umoci(&["raw", "add-layer", "--image", &image, &tar.to_string_lossy()])?;
        umoci(&[
            "config",
            "--image",
            &image,
            "--config.cmd",
            "/bin/bash",
            "--config.env",
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        ])?;
        fs_err::remove_file(&tar)?;
        Ok(())
    })?;
    Ok(folder.join("layout"))
}

//! A tree with the release's own image tools, so that they run whatever the machine has.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;
use tempfile::TempDir;

use crate::{
    cache::Cache,
    command::run,
    debian::{Sources, bootstrap},
};

const PACKAGES: [&str; 10] = [
    "dosfstools",
    "e2fsprogs",
    "erofs-utils",
    "kmod",
    "mtools",
    "systemd-boot-efi",
    "systemd-repart",
    "systemd-ukify",
    "xfsprogs",
    "xz-utils",
];

/// The tree. Its programs see the tree as `/`, and files only below it.
#[derive(Debug)]
pub(crate) struct Tools {
    tree: PathBuf,
}

impl Tools {
    pub(crate) fn ensure(cache: &Cache, sources: &Sources) -> Result<Self> {
        let tree = cache
            .ensure("tools", &PACKAGES, |draft| bootstrap(sources, "apt", &PACKAGES, draft))?;
        Ok(Self { tree })
    }

    /// A folder that the tools can see. Removed when it is dropped.
    pub(crate) fn workspace(&self) -> Result<Workspace> {
        let parent = self.tree.join("work");
        // One build at a time holds the cache: what lies here was left by a killed one.
        if parent.exists() {
            fs_err::remove_dir_all(&parent)?;
        }
        fs_err::create_dir_all(&parent)?;
        let folder = TempDir::with_prefix_in("image-", parent)?;
        Ok(Workspace { folder, tree: self.tree.clone() })
    }

    /// Runs `program` of the tree in process and mount namespaces of its own, with a /proc.
    pub(crate) fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]);
        command.arg(format!("--root={}", self.tree.display()));
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C");
        run(command.arg(program).args(args))
    }
}

#[derive(Debug)]
pub(crate) struct Workspace {
    folder: TempDir,
    tree: PathBuf,
}

impl Workspace {
    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The name the tools know `name` in this folder by.
    pub(crate) fn seen(&self, name: &str) -> String {
        let path = self.folder.path().join(name);
        let inside = path.strip_prefix(&self.tree).unwrap_or(&path);
        format!("/{}", inside.display())
    }
}

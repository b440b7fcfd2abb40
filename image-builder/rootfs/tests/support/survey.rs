//! Everything that can be told of a folder tree from outside, to be compared with another's.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use fs_err as fs;
use rustix::fs::{lgetxattr, llistxattr};
use sha2::{Digest, Sha256};

/// By path, what is there as one line.
pub(crate) type Survey = BTreeMap<String, String>;

pub(crate) fn survey(root: &Path) -> Survey {
    let mut survey = Survey::new();
    let mut names_of: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        survey.insert(shown(root, &folder), facts(&folder));
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let metadata = fs::symlink_metadata(&path).unwrap();
            if metadata.is_dir() {
                folders.push(path);
            } else {
                names_of.entry(metadata.ino()).or_default().push(shown(root, &path));
                survey.insert(shown(root, &path), facts(&path));
            }
        }
    }
    for mut names in names_of.into_values().filter(|names| names.len() > 1) {
        names.sort();
        for name in &names {
            let also = format!(" also {names:?}");
            survey.entry(name.clone()).and_modify(|facts| facts.push_str(&also));
        }
    }
    survey
}

/// Lines that only one of them has, `-` before the first's and `+` before the second's.
pub(crate) fn differences(first: &Survey, second: &Survey) -> Vec<String> {
    let only = |sign: char, one: &Survey, other: &Survey| {
        let differ = |(path, facts): (&String, &String)| {
            (other.get(path) != Some(facts)).then(|| format!("{path} {sign} {facts}"))
        };
        one.iter().filter_map(differ).collect::<Vec<_>>()
    };
    let mut lines = only('-', first, second);
    lines.extend(only('+', second, first));
    lines.sort();
    lines
}

fn shown(root: &Path, path: &Path) -> String {
    let below = path.strip_prefix(root).unwrap().as_os_str().as_bytes();
    format!("/{}", below.escape_ascii())
}

fn facts(path: &Path) -> String {
    let metadata = fs::symlink_metadata(path).unwrap();
    let kind = metadata.file_type();
    let what = if kind.is_file() {
        let mut hash = Sha256::new();
        std::io::copy(&mut fs::File::open(path).unwrap(), &mut hash).unwrap();
        format!("file of {} bytes {:x}", metadata.size(), hash.finalize())
    } else if kind.is_symlink() {
        format!("symlink to {}", fs::read_link(path).unwrap().as_os_str().as_bytes().escape_ascii())
    } else if kind.is_dir() {
        "folder".to_owned()
    } else if kind.is_fifo() {
        "fifo".to_owned()
    } else if kind.is_block_device() {
        format!("block device {:x}", metadata.rdev())
    } else {
        format!("character device {:x}", metadata.rdev())
    };
    format!(
        "{what}, mode {:o}, owner {}:{}, {} links, at {}.{:09}{}",
        metadata.mode(),
        metadata.uid(),
        metadata.gid(),
        metadata.nlink(),
        metadata.mtime(),
        metadata.mtime_nsec(),
        xattrs(path)
    )
}

fn xattrs(path: &Path) -> String {
    let mut list = vec![0; 64 << 10];
    let length = llistxattr(path, &mut list).unwrap();
    let mut names: Vec<&[u8]> = list[..length].split(|byte| *byte == 0).collect();
    names.retain(|name| !name.is_empty());
    names.sort();
    let value = |name: &[u8]| {
        let mut value = vec![0; 64 << 10];
        let length = lgetxattr(path, OsStr::from_bytes(name), &mut value).unwrap();
        value.truncate(length);
        value
    };
    let shown = |name: &&[u8]| format!(", {}={}", name.escape_ascii(), value(name).escape_ascii());
    names.iter().map(shown).collect()
}

/// Unmounted on drop.
pub(crate) struct Mounted {
    folder: PathBuf,
}

impl Mounted {
    /// An image, read-only.
    pub(crate) fn new(disk: &Path, folder: PathBuf) -> Self {
        fs::create_dir(&folder).unwrap();
        let disk = disk.as_os_str();
        super::run(
            "mount",
            ["-t", "erofs", "-o", "ro,loop"]
                .map(OsStr::new)
                .into_iter()
                .chain([disk, folder.as_os_str()]),
        );
        Self { folder }
    }

    /// What is mounted there already.
    pub(crate) fn at(folder: PathBuf) -> Self {
        Self { folder }
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        super::run("umount", [self.folder.as_os_str()]);
    }
}

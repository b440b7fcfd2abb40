//! Every rule for reading layers, each with a test: archives made by hand go through
//! [`convert_layer`] and are laid over each other, and what comes out is looked at name by name.

#[path = "../../tests/support/archive.rs"]
mod archive;

mod assembled;
mod framing;
mod kinds;
mod links;
mod overlay;
mod random;
mod received;
mod sparse;

use std::{collections::BTreeMap, os::unix::fs::FileExt, path::Path};

use fs_err as fs;
use holdfast_model::Digest;
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

use crate::{
    Compression, LayerDescriptor, LayerError, LayerInfo, Limits, convert_layer,
    error::AssembleError,
    store,
    tree::{BLOCK_BYTES, FileData, HOLE, Kind, Layout, ROOT, Tree},
};

/// In memory where it can be: syncing to a disk is not what these tests are about.
fn fresh_store() -> TempDir {
    TempDir::new_in("/dev/shm").or_else(|_| TempDir::new()).unwrap()
}

fn sha256(bytes: &[u8]) -> Digest {
    Digest::from_sha256(Sha256::digest(bytes).into())
}

/// What an honest manifest says of a layer that is `received`, and `tar` inside.
fn describe(received: &[u8], tar: &[u8]) -> LayerDescriptor {
    LayerDescriptor {
        digest: sha256(received),
        size: received.len() as u64,
        diff_id: sha256(tar),
        compression: Compression::Detect,
    }
}

fn convert_within(store: &Path, tar: &[u8], limits: &Limits) -> Result<LayerInfo, LayerError> {
    convert_layer(store, tar, &describe(tar, tar), limits, &mut |_| {})
}

/// Why an archive is refused, sources included.
fn refusal(tar: &[u8]) -> String {
    refusal_within(tar, &Limits::default())
}

fn refusal_within(tar: &[u8], limits: &Limits) -> String {
    let store = fresh_store();
    let error = convert_within(store.path(), tar, limits).expect_err("the archive was taken");
    assert_eq!(files_in(&store.path().join("layers")), Vec::<String>::new(), "something was kept");
    assert_eq!(files_in(&store.path().join("tmp")), Vec::<String>::new(), "a draft was left");
    chain(&error)
}

fn chain(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(Some(error), |error| error.source());
    sources.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn files_in(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
    names.map(|name| name.into_string().unwrap()).collect()
}

/// Layers laid over each other, in a store of their own.
struct Merged {
    store: TempDir,
    layers: Vec<Digest>,
    tree: Tree,
}

fn merged(tars: &[Vec<u8>]) -> Merged {
    try_merged(tars).unwrap_or_else(|error| panic!("{}", chain(&error)))
}

fn try_merged(tars: &[Vec<u8>]) -> Result<Merged, AssembleError> {
    let store = fresh_store();
    let mut layers = Vec::new();
    for tar in tars {
        let converted = convert_within(store.path(), tar, &Limits::default());
        layers.push(converted.unwrap_or_else(|error| panic!("{}", chain(&error))).diff_id);
    }
    let (tree, _) = crate::assemble::merge(store.path(), &layers)?;
    Ok(Merged { store, layers, tree })
}

impl Merged {
    /// Every path with what is there, e.g. `file 644 0:0 "text"`. Names of one file end in `#` and
    /// a number that is the same for all of them.
    fn list(&self) -> BTreeMap<String, String> {
        let mut list = BTreeMap::new();
        let mut names_of: BTreeMap<u32, Vec<String>> = BTreeMap::new();
        let mut folders = vec![(String::new(), ROOT)];
        while let Some((path, folder)) = folders.pop() {
            for (name, &id) in self.tree.folder(folder).unwrap() {
                let path = format!("{path}/{}", name.escape_ascii());
                list.insert(path.clone(), self.describe(id));
                match self.tree.folder(id) {
                    Some(_) => folders.push((path, id)),
                    None => names_of.entry(id).or_default().push(path),
                }
            }
        }
        let shared = names_of.into_values().filter(|names| names.len() > 1);
        for (group, names) in shared.enumerate() {
            for name in names {
                list.entry(name).and_modify(|text| text.push_str(&format!(" #{group}")));
            }
        }
        list
    }

    /// As [`Self::list`], for comparing.
    fn lines(&self) -> Vec<String> {
        self.list().into_iter().map(|(path, what)| format!("{path} {what}")).collect()
    }

    fn at(&self, path: &str) -> String {
        self.list().get(path).cloned().unwrap_or_else(|| panic!("no {path} in {:?}", self.lines()))
    }

    fn describe(&self, id: u32) -> String {
        let inode = self.tree.inode(id);
        let meta = &inode.meta;
        let (kind, detail) = match &inode.kind {
            Kind::Folder(_) => ("folder", String::new()),
            Kind::File(data) => ("file", format!(" \"{}\"", self.content(data).escape_ascii())),
            Kind::Symlink(target) => ("symlink", format!(" -> {}", target.escape_ascii())),
            Kind::Character(device) => ("char", format!(" {}:{}", device.major, device.minor)),
            Kind::Block(device) => ("block", format!(" {}:{}", device.major, device.minor)),
            Kind::Fifo => ("fifo", String::new()),
        };
        format!("{kind} {:o} {}:{}{detail}", meta.mode, meta.uid, meta.gid)
    }

    /// A file's bytes, as the disk would give them.
    fn content(&self, data: &FileData) -> Vec<u8> {
        let length = usize::try_from(data.bytes).unwrap();
        let mut bytes = vec![0; length];
        let path = store::data_path(self.store.path(), &self.layers[usize::from(data.segment)]);
        let blob = fs::File::open(path).unwrap();
        let read = |into: &mut [u8], block: u32| {
            blob.file().read_exact_at(into, u64::from(block) * BLOCK_BYTES).unwrap();
        };
        match &data.layout {
            Layout::Plain(_) if length == 0 => {}
            Layout::Plain(start) => read(&mut bytes, *start),
            Layout::Chunked { chunk_log, chunks } => {
                let chunk_bytes = usize::try_from(BLOCK_BYTES << chunk_log).unwrap();
                for (into, &chunk) in bytes.chunks_mut(chunk_bytes).zip(chunks) {
                    if chunk != HOLE {
                        read(into, chunk);
                    }
                }
            }
        }
        bytes
    }
}

//! The two image stores of a node: the writable one, which belongs to the conversion's user, and
//! the read-only one that came with the host image.

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use fs_err as fs;
use holdfast_model::Digest;
use holdfast_oci::ContentStore;
use holdfast_rootfs::{ImageRecord, load_record};
use rustix::{
    fs::{Mode, OFlags, ResolveFlags, openat2},
    process::{Gid, Uid, geteuid},
    thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid},
};

/// User and group of conversions, and owner of the writable store.
pub(super) const OWNER: u32 = 199_999;

/// Parts of one image's disk: 127 layers is what other tools allow, and the metadata.
const SEGMENTS_MAX: usize = 128;

/// An image that is on this node.
#[derive(Debug)]
pub struct Located {
    pub record: ImageRecord,
    root: OwnedFd,
}

impl Located {
    /// Opens a part of the image. The record was written by a process that faces the network: no
    /// name in it leads out of the store.
    pub(crate) fn open(&self, path: &str) -> io::Result<fs::File> {
        let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        // Without NONBLOCK a fifo of that name would hang the open.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = openat2(&self.root, path, flags, Mode::empty(), beneath)?;
        let file = fs::File::from_parts(file.into(), path);
        if file.metadata()?.is_file() { Ok(file) } else { Err(io::ErrorKind::InvalidData.into()) }
    }
}

/// Finds the image in one store. Blocks.
pub(super) fn locate(
    store: &Path,
    digest: &Digest,
) -> Result<Option<Located>, holdfast_rootfs::StoreError> {
    let Some(record) = load_record(store, digest)? else { return Ok(None) };
    let io = |source| holdfast_rootfs::StoreError::Io { path: store.to_owned(), source };
    if record.segments.is_empty() || record.segments.len() > SEGMENTS_MAX {
        return Err(io(io::Error::other("the image's record has no parts, or too many")));
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(store, flags, Mode::empty()).map_err(|errno| io(errno.into()))?;
    Ok(Some(Located { record, root }))
}

/// Makes the folders of the writable store where they are missing and gives them to their owner.
/// What killed conversions left goes. Blocks.
pub(super) fn prepare(store: &Path) -> io::Result<()> {
    fs::create_dir_all(store)?;
    give_to_owner(store)?;
    let path = store.to_owned();
    as_owner(move || {
        let content = ContentStore::open(&path).map_err(io::Error::other)?;
        drop(content.collecting().map_err(io::Error::other)?);
        drop(holdfast_rootfs::hold(&path).map_err(io::Error::other)?);
        sweep_drafts(&path.join("tmp"))
    })?
}

/// Every draft is somebody's work that ended: no conversion outlives its agent.
fn sweep_drafts(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn give_to_owner(folder: &Path) -> io::Result<()> {
    if geteuid().is_root() {
        rustix::fs::chown(folder, Some(Uid::from_raw(OWNER)), Some(Gid::from_raw(OWNER)))?;
    }
    Ok(())
}

/// Does the work on a thread that has the rights of the store's owner and no others: the owner
/// may have put symbolic links into the store, and root would follow them. An agent that is not
/// root is the owner itself. Blocks.
pub(super) fn as_owner<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let thread = std::thread::Builder::new().name("image-store".to_owned()).spawn(move || {
        if geteuid().is_root() {
            let (uid, gid) = (Uid::from_raw(OWNER), Gid::from_raw(OWNER));
            // Linux keeps these per thread; this one never does anything else and ends with it.
            set_thread_groups(&[])?;
            set_thread_res_gid(gid, gid, gid)?;
            set_thread_res_uid(uid, uid, uid)?;
        }
        Ok(work())
    })?;
    match thread.join() {
        Ok(outcome) => outcome,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Paths of the stores, the read-only one first: it cannot change.
#[derive(Debug, Clone)]
pub(super) struct Stores {
    pub(super) baked: PathBuf,
    pub(super) writable: PathBuf,
}

impl Stores {
    /// Finds the image. Blocks.
    pub(super) fn locate(
        &self,
        digest: Digest,
    ) -> Result<Option<Located>, holdfast_rootfs::StoreError> {
        if let Some(found) = locate(&self.baked, &digest)? {
            return Ok(Some(found));
        }
        let writable = self.writable.clone();
        as_owner(move || locate(&writable, &digest)).map_err(|source| {
            holdfast_rootfs::StoreError::Io { path: self.writable.clone(), source }
        })?
    }
}

#[cfg(test)]
mod tests {
    use holdfast_rootfs::{Segment, Settings};

    use super::*;

    fn store_with(segments: &[&str]) -> (tempfile::TempDir, Digest) {
        let folder = tempfile::tempdir().unwrap();
        let digest = Digest::from_sha256([7; 32]);
        let segment = |path: &&str| Segment { path: (*path).to_owned(), bytes: 4096 };
        let record = ImageRecord {
            digest,
            architecture: "amd64".to_owned(),
            segments: segments.iter().map(segment).collect(),
            layers: Vec::new(),
            settings: Settings::default(),
            bytes: 0,
        };
        fs::create_dir_all(folder.path().join("images")).unwrap();
        let path = folder.path().join("images").join(format!("{}.json", digest.hex()));
        fs::write(path, serde_json::to_vec(&record).unwrap()).unwrap();
        (folder, digest)
    }

    #[test]
    fn a_part_is_opened_only_inside_the_store_and_only_if_it_is_a_file() {
        let (folder, digest) = store_with(&["images/whole"]);
        fs::write(folder.path().join("images/whole"), b"x").unwrap();
        fs::os::unix::fs::symlink("whole", folder.path().join("images/link")).unwrap();
        let located = locate(folder.path(), &digest).unwrap().unwrap();
        assert!(located.open("images/whole").is_ok());
        for path in ["/etc/passwd", "../../../../etc/passwd", "images/link", "images", "images/no"]
        {
            assert!(located.open(path).is_err(), "{path}");
        }
    }

    #[test]
    fn a_record_with_too_many_parts_is_refused() {
        let (folder, digest) = store_with(&["images/x"; SEGMENTS_MAX + 1]);
        assert!(locate(folder.path(), &digest).is_err());
    }

    #[test]
    fn preparing_takes_the_drafts_of_killed_conversions() {
        let folder = tempfile::tempdir().unwrap();
        // The owner must be able to come here.
        fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .unwrap();
        let store = folder.path().join("images");
        prepare(&store).unwrap();
        fs::write(store.join("tmp/draft-1"), b"half").unwrap();
        prepare(&store).unwrap();
        assert_eq!(fs::read_dir(store.join("tmp")).unwrap().count(), 0);
    }
}

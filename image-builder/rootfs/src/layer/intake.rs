//! Archive entries into a layer's tree and blob, each by the rules for its type.

use std::io::Read;

use super::{
    archive::{Entry, EntryKind, next_entry, skip_file_padding},
    blob::{Blob, BlobError, FileWriter},
    sparse::SparseMap,
    stream::{Stream, StreamError},
};
use crate::{
    error::{ArchiveError, EntryError, EntryName, StoreError},
    limits::{Limits, NAME_BYTES_MAX, PATH_BYTES_MAX, XATTR_VALUE_BYTES_MAX, XATTRS_BYTES_MAX},
    tree::{Budget, Device, FileData, Inode, Kind, LayerTree, Meta, Place, Refusal, Xattr, place},
};

/// Namespaces of attributes that Linux has. Others, from other systems, have no meaning here.
const XATTR_NAMESPACES: [&[u8]; 5] =
    [b"user.", b"trusted.", b"security.", b"system.posix_acl_access", b"system.posix_acl_default"];

/// The label of the machine the layer was made on: its policy, not the image's.
const SELINUX_LABEL: &[u8] = b"security.selinux";

/// Linux' for every symlink, whatever an archive says.
const SYMLINK_MODE: u16 = 0o777;

/// Why an archive was not taken in, and at which entry.
#[derive(Debug)]
pub(crate) enum IntakeError {
    Stream { after: EntryName, source: StreamError },
    Entry { entry: EntryName, source: EntryError },
    Store(StoreError),
}

/// Why one entry was not.
enum Failed {
    Stream(StreamError),
    Entry(EntryError),
    Store(StoreError),
}

/// Reads the archive to its last entry.
pub(crate) fn take_in<R: Read>(
    stream: &mut Stream<R>,
    blob: &mut Blob,
    limits: &Limits,
) -> Result<LayerTree, IntakeError> {
    let mut intake = Intake { tree: LayerTree::new(), budget: Budget::new(limits), limits, blob };
    let mut path = Vec::new();
    loop {
        let after = |source| IntakeError::Stream { after: EntryName::new(&path), source };
        let Some(mut entry) = next_entry(stream).map_err(after)? else {
            return Ok(intake.tree.finish());
        };
        path = std::mem::take(&mut entry.path);
        intake.entry(&path, entry, stream).map_err(|failed| match failed {
            Failed::Stream(source) => IntakeError::Stream { after: EntryName::new(&path), source },
            Failed::Entry(source) => IntakeError::Entry { entry: EntryName::new(&path), source },
            Failed::Store(source) => IntakeError::Store(source),
        })?;
    }
}

struct Intake<'a> {
    tree: LayerTree,
    budget: Budget<'a>,
    limits: &'a Limits,
    blob: &'a mut Blob,
}

impl Intake<'_> {
    fn entry<R: Read>(
        &mut self,
        path: &[u8],
        mut entry: Entry,
        stream: &mut Stream<R>,
    ) -> Result<(), Failed> {
        // A whiteout's own type, owner and data mean nothing.
        let (parents, name) = match place(path, self.limits.depth)? {
            Place::Name { parents, name } => (parents, name),
            Place::Root if entry.kind == EntryKind::Folder => {
                self.tree.put_root(meta(&mut entry)?);
                return Ok(());
            }
            Place::Root => return Err(EntryError::RootNotFolder.into()),
            Place::Whiteout { parents, name } => {
                self.tree.white_out(&parents, name, &mut self.budget)?;
                return skip_data(&entry, stream);
            }
            Place::Opaque { folder } => {
                self.tree.make_opaque(&folder, &mut self.budget)?;
                return skip_data(&entry, stream);
            }
            Place::Bookkeeping => return skip_data(&entry, stream),
        };
        let kind = std::mem::replace(&mut entry.kind, EntryKind::Folder);
        let kind = match kind {
            EntryKind::HardLink(target) => {
                let target = link_target(target)?;
                self.tree.link(&parents, name, &target, &mut self.budget)?;
                return Ok(());
            }
            EntryKind::File { stored, sparse } => Kind::File(self.file(stored, sparse, stream)?),
            EntryKind::Symlink(target) => Kind::Symlink(link_target(target)?.into()),
            EntryKind::Character(0, 0) => return Err(EntryError::OverlayWhiteout.into()),
            EntryKind::Character(major, minor) => Kind::Character(device(major, minor)?),
            EntryKind::Block(major, minor) => Kind::Block(device(major, minor)?),
            EntryKind::Folder => Kind::empty_folder(),
            EntryKind::Fifo => Kind::Fifo,
            EntryKind::Unknown(flag) => return Err(EntryError::Type(flag.into()).into()),
        };
        if matches!(kind, Kind::Symlink(_)) {
            entry.mode = SYMLINK_MODE;
        }
        let inode = Inode { meta: meta(&mut entry)?, kind };
        Ok(self.tree.put(&parents, name, inode, &mut self.budget)?)
    }

    fn file<R: Read>(
        &mut self,
        stored: u64,
        sparse: Option<SparseMap>,
        stream: &mut Stream<R>,
    ) -> Result<FileData, Failed> {
        let mut writer = FileWriter::new(self.blob, stored, sparse);
        stream.pass::<Failed>(stored, |piece| Ok(writer.write(piece)?))?;
        skip_file_padding(stream, stored)?;
        Ok(writer.finish()?)
    }
}

fn skip_data<R: Read>(entry: &Entry, stream: &mut Stream<R>) -> Result<(), Failed> {
    if let EntryKind::File { stored, .. } = entry.kind {
        stream.skip(stored)?;
        skip_file_padding(stream, stored)?;
    }
    Ok(())
}

fn meta(entry: &mut Entry) -> Result<Meta, EntryError> {
    // The last id means "none" to the kernel.
    let id = |id| u32::try_from(id).ok().filter(|&id| id != u32::MAX).ok_or(EntryError::Id);
    Ok(Meta {
        mode: entry.mode,
        uid: id(entry.uid)?,
        gid: id(entry.gid)?,
        mtime: entry.mtime,
        xattrs: xattrs(std::mem::take(&mut entry.xattrs))?,
    })
}

/// Sorted, the last of a name kept, what Linux does not know left out.
fn xattrs(all: Vec<Xattr>) -> Result<Box<[Xattr]>, EntryError> {
    let mut kept: Vec<Xattr> = Vec::with_capacity(all.len());
    for xattr in all {
        let known = |space: &&[u8]| xattr.name.starts_with(space);
        let Some(space) = XATTR_NAMESPACES.iter().copied().find(known) else { continue };
        if *xattr.name == *SELINUX_LABEL {
            continue;
        }
        let named = || EntryName::new(&xattr.name);
        if xattr.name.starts_with(b"trusted.overlay.") || xattr.name.starts_with(b"user.overlay.") {
            return Err(EntryError::OverlayAttribute(named()));
        }
        // An ACL's namespace is its whole name; elsewhere something must follow.
        let whole = space.ends_with(b".") != (xattr.name.len() == space.len());
        let fits = xattr.name.len() <= NAME_BYTES_MAX && xattr.value.len() <= XATTR_VALUE_BYTES_MAX;
        if !(whole && fits) {
            return Err(EntryError::Attribute(named()));
        }
        match kept.binary_search_by(|other| other.name.cmp(&xattr.name)) {
            Ok(at) => kept[at] = xattr,
            Err(at) => kept.insert(at, xattr),
        }
    }
    // On disk each takes a header of 4 bytes and up to 3 to fill.
    let bytes: usize = kept.iter().map(|xattr| xattr.name.len() + xattr.value.len() + 8).sum();
    if bytes > XATTRS_BYTES_MAX {
        return Err(EntryError::AttributesTooLarge { max: XATTRS_BYTES_MAX });
    }
    Ok(kept.into())
}

fn link_target(target: Vec<u8>) -> Result<Vec<u8>, EntryError> {
    match target.len() {
        1..=PATH_BYTES_MAX if target.contains(&0) => Err(EntryError::Nul),
        1..=PATH_BYTES_MAX => Ok(target),
        _ => Err(EntryError::LinkTarget { max: PATH_BYTES_MAX }),
    }
}

/// Linux keeps 12 bits of a major and 20 of a minor number.
fn device(major: u64, minor: u64) -> Result<Device, EntryError> {
    let within = |number: u64, bits: u32| u32::try_from(number).ok().filter(|n| n >> bits == 0);
    within(major, 12)
        .zip(within(minor, 20))
        .map(|(major, minor)| Device { major, minor })
        .ok_or(EntryError::Device)
}

impl From<StreamError> for Failed {
    fn from(error: StreamError) -> Self {
        Self::Stream(error)
    }
}

impl From<ArchiveError> for Failed {
    fn from(error: ArchiveError) -> Self {
        Self::Stream(StreamError::Archive(error))
    }
}

impl From<EntryError> for Failed {
    fn from(error: EntryError) -> Self {
        Self::Entry(error)
    }
}

impl From<Refusal> for Failed {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Entry(error) => error.into(),
            Refusal::Archive(error) => error.into(),
        }
    }
}

impl From<BlobError> for Failed {
    fn from(error: BlobError) -> Self {
        match error {
            BlobError::Entry(error) => Self::Entry(error),
            BlobError::Store(error) => Self::Store(error),
        }
    }
}

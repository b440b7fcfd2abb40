//! One inode with its attributes and block map, as bytes.

use super::{Image, plan::Slot};
use crate::tree::{Device, FileData, HOLE, Inode, Kind, Layout, Time, Xattr};

/// How an inode's data is found.
#[derive(Clone, Copy)]
enum DataLayout {
    Plain = 0,
    Inline = 2,
    Chunked = 4,
}

/// Header of the attributes: no name filter, none shared.
const XATTRS_HEADER_BYTES: usize = 12;

const XATTR_HEADER_BYTES: usize = 4;

/// Numbers for the namespaces of attributes. An ACL's is its whole name.
const XATTR_NAMESPACES: [(u8, &[u8]); 5] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
];

/// Whether the 32-byte form cannot say this inode.
pub(super) fn needs_extended(inode: &Inode, links: u32, epoch: Time) -> bool {
    let large = match &inode.kind {
        Kind::File(data) => data.bytes > u64::from(u32::MAX),
        _ => false,
    };
    let id = |id| u16::try_from(id).is_err();
    let meta = &inode.meta;
    large || id(meta.uid) || id(meta.gid) || id(links) || meta.mtime != epoch
}

/// Size on disk; 0 without any.
pub(super) fn xattrs_bytes(xattrs: &[Xattr]) -> usize {
    let each = |xattr: &Xattr| {
        let (_, name) = split_name(&xattr.name);
        (XATTR_HEADER_BYTES + name.len() + xattr.value.len()).next_multiple_of(4)
    };
    if xattrs.is_empty() { 0 } else { XATTRS_HEADER_BYTES + xattrs.iter().map(each).sum::<usize>() }
}

/// The inode, its attributes, its block map: all but what is inline.
pub(super) fn encode(image: &Image<'_>, slot: &Slot) -> Vec<u8> {
    let inode = image.tree.inode(slot.inode);
    let meta = &inode.meta;
    let (layout, bytes, word) = data(image, slot, inode);
    let format = u16::from(slot.extended) | (layout as u16) << 1;
    let mode = file_type(&inode.kind) | meta.mode;
    // 1 stands for the header alone, each 4 bytes after it for one more.
    let xattrs = xattrs_bytes(&meta.xattrs);
    let xattr_count = if xattrs == 0 { 0 } else { 1 + (xattrs - XATTRS_HEADER_BYTES) / 4 };
    let xattr_count = u16::try_from(xattr_count).expect("limits keep attributes shorter");
    // For programs whose inode numbers have 32 bits; 0 would mean none.
    let short_number = u32::try_from(slot.number()).unwrap_or(u32::MAX);
    let mut out = Vec::with_capacity(64 + xattrs);
    out.extend(format.to_le_bytes());
    out.extend(xattr_count.to_le_bytes());
    out.extend(mode.to_le_bytes());
    if slot.extended {
        out.extend([0; 2]);
        out.extend(bytes.to_le_bytes());
        out.extend(word.to_le_bytes());
        out.extend(short_number.to_le_bytes());
        out.extend(meta.uid.to_le_bytes());
        out.extend(meta.gid.to_le_bytes());
        out.extend(meta.mtime.seconds.to_le_bytes());
        out.extend(meta.mtime.nanos.to_le_bytes());
        out.extend(slot.links.to_le_bytes());
        out.extend([0; 16]);
    } else {
        let short = |number: u32| u16::try_from(number).expect("else it were extended");
        let bytes = u32::try_from(bytes).expect("else it were extended");
        out.extend(short(slot.links).to_le_bytes());
        out.extend(bytes.to_le_bytes());
        out.extend([0; 4]);
        out.extend(word.to_le_bytes());
        out.extend(short_number.to_le_bytes());
        out.extend(short(meta.uid).to_le_bytes());
        out.extend(short(meta.gid).to_le_bytes());
        out.extend([0; 4]);
    }
    put_xattrs(&mut out, &meta.xattrs);
    if let Kind::File(FileData { segment, layout: Layout::Chunked { chunks, .. }, .. }) =
        &inode.kind
    {
        let base = image.bases[usize::from(*segment)];
        for &chunk in chunks {
            out.extend(if chunk == HOLE { HOLE } else { base + chunk }.to_le_bytes());
        }
    }
    out
}

/// Layout, size and the word that says where, or which device, or how large chunks are.
fn data(image: &Image<'_>, slot: &Slot, inode: &Inode) -> (DataLayout, u64, u32) {
    match &inode.kind {
        Kind::File(FileData { bytes: 0, .. }) | Kind::Fifo => (DataLayout::Plain, 0, 0),
        Kind::File(FileData { bytes, segment, layout }) => match layout {
            Layout::Plain(start) => {
                (DataLayout::Plain, *bytes, image.bases[usize::from(*segment)] + start)
            }
            Layout::Chunked { chunk_log, .. } => {
                (DataLayout::Chunked, *bytes, u32::from(*chunk_log))
            }
        },
        Kind::Folder(_) | Kind::Symlink(_) => {
            let layout = if slot.inline { DataLayout::Inline } else { DataLayout::Plain };
            (layout, slot.bytes, slot.first_block)
        }
        Kind::Character(device) | Kind::Block(device) => {
            (DataLayout::Plain, 0, device_number(*device))
        }
    }
}

fn file_type(kind: &Kind) -> u16 {
    match kind {
        Kind::Fifo => 0o010_000,
        Kind::Character(_) => 0o020_000,
        Kind::Folder(_) => 0o040_000,
        Kind::Block(_) => 0o060_000,
        Kind::File(_) => 0o100_000,
        Kind::Symlink(_) => 0o120_000,
    }
}

/// Linux' 32-bit form: 8 low bits of the minor number, 12 of the major, then the rest.
fn device_number(Device { major, minor }: Device) -> u32 {
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}

fn put_xattrs(out: &mut Vec<u8>, xattrs: &[Xattr]) {
    if xattrs.is_empty() {
        return;
    }
    out.extend([0; XATTRS_HEADER_BYTES]);
    for Xattr { name, value } in xattrs {
        let (namespace, name) = split_name(name);
        out.push(u8::try_from(name.len()).expect("limits keep names short"));
        out.push(namespace);
        out.extend(u16::try_from(value.len()).expect("limits keep values short").to_le_bytes());
        out.extend_from_slice(name);
        out.extend_from_slice(value);
        out.resize(out.len().next_multiple_of(4), 0);
    }
}

fn split_name(name: &[u8]) -> (u8, &[u8]) {
    let known = |&(number, space): &(u8, &'static [u8])| Some((number, name.strip_prefix(space)?));
    XATTR_NAMESPACES.iter().find_map(known).unwrap_or((0, name))
}

//! The empty room: a mount namespace that holds nothing but an empty, read-only folder.
//!
//! The nursery makes it around itself, so that every shim begins there. A VMM's own mount namespace
//! is a copy of this one's single mount: were it made from the host's, its cost would grow with
//! whatever is mounted there.

use std::os::fd::OwnedFd;

use rustix::{
    fs::CWD,
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
        OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
        mount_change, move_mount, open_tree, unmount,
    },
    process::{chroot, fchdir, pivot_root},
    thread::UnshareFlags,
};

use super::orders::{Failure, failed};
use crate::sys::unshare;

/// Makes the room around this process.
pub(super) fn build() -> Result<(), Failure> {
    unshare(UnshareFlags::NEWNS).map_err(failed("make a mount namespace"))?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(failed("part its mounts from the host's"))?;
    let empty = empty_folder().map_err(failed("make an empty folder"))?;
    enter(&empty).map_err(failed("make the empty folder its root"))
}

/// A file system of its own, not mounted anywhere yet.
fn empty_folder() -> Result<OwnedFd, Errno> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in [("mode", "0555"), ("size", "4096"), ("nr_inodes", "1")] {
        fsconfig_set_string(&context, key, value)?;
    }
    fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// Makes `empty` the root, and unmounts all that was below the old one.
fn enter(empty: &OwnedFd) -> Result<(), Errno> {
    match pivot(empty) {
        // The root is an initramfs, which cannot be pivoted away: a mount of it can.
        Err(Errno::INVAL) => {
            let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
            let root = open_tree(CWD, "/", flags)?;
            attach(&root)?;
            fchdir(&root)?;
            chroot(".")?;
            let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
            let empty = open_tree(empty, ".", flags)?;
            attach(&empty)?;
            replace_root(&empty)
        }
        outcome => outcome,
    }
}

fn pivot(empty: &OwnedFd) -> Result<(), Errno> {
    attach(empty)?;
    replace_root(empty)
}

/// Mounts on top of the root. Paths still lead below it.
fn attach(mount: &OwnedFd) -> Result<(), Errno> {
    move_mount(mount, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

fn replace_root(new: &OwnedFd) -> Result<(), Errno> {
    fchdir(new)?;
    // The old root is put on top of the new one, in its only folder, and goes with what it holds.
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    fchdir(new)
}

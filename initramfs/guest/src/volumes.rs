//! Volumes of the image (OCI image config, `Volumes`): folders that programs write a lot to. Each
//! is a folder of the disk's own file system, which the overlay slows down, and on which no second
//! overlay can be laid: a database and a container engine need one.
//!
//! A volume that has content in the image stays part of the overlay: as writable, only not as fast.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use holdfast_wire::guest::Failure;
use rustix::{
    fs::{AtFlags, CWD, Gid, Mode, Uid},
    mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree},
};

use crate::failure::{from_errno, from_io, invalid};

/// More than any image has; each is a mount.
const VOLUMES_MAX: usize = 128;

/// A folder of the disk, held while the sandbox's root is entered.
#[derive(Debug)]
pub(crate) struct Volume {
    path: PathBuf,
    tree: OwnedFd,
    /// Made by this boot: it has no owner of its own yet.
    is_new: bool,
}

/// Makes the folders below `folder`, one for each path, named by its place in the list.
pub(crate) fn prepare(folder: &Path, paths: &[String]) -> Result<Vec<Volume>, Failure> {
    if paths.len() > VOLUMES_MAX {
        let message = format!("the image has {} volumes: at most {VOLUMES_MAX}", paths.len());
        return Err(invalid(message));
    }
    if paths.is_empty() {
        return Ok(Vec::new());
    }
    fs_err::create_dir_all(folder).map_err(|error| from_io("cannot make volumes", &error))?;
    let volume = |(number, path): (usize, &String)| {
        let place = folder.join(number.to_string());
        let is_new = match fs_err::create_dir(&place) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(error) => return Err(from_io(format!("cannot make volume {path:?}"), &error)),
        };
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = open_tree(CWD, &place, flags)
            .map_err(|error| from_errno(format!("cannot open volume {path:?}"), error))?;
        Ok(Volume { path: checked(path)?, tree, is_new })
    };
    paths.iter().enumerate().map(volume).collect()
}

/// Puts the folders in their places. To be called with the sandbox's root as the thread's own.
pub(crate) fn mount(volumes: Vec<Volume>) -> Result<(), Failure> {
    volumes.into_iter().try_for_each(|volume| {
        let path = volume.path.display().to_string();
        place(volume).map_err(|error| from_io(format!("cannot mount volume {path:?}"), &error))
    })
}

fn place(volume: Volume) -> io::Result<()> {
    let Volume { path, tree, is_new } = volume;
    fs_err::create_dir_all(&path)?;
    if fs_err::read_dir(&path)?.next().is_some() {
        return Ok(());
    }
    if is_new {
        let stat = rustix::fs::stat(&path)?;
        let (owner, group) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        let empty = AtFlags::EMPTY_PATH;
        rustix::fs::chownat(tree.as_fd(), "", Some(owner), Some(group), empty)?;
        // Relative to the folder: what open_tree gives is a place, not an open file.
        let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
        rustix::fs::chmodat(tree.as_fd(), ".", mode, AtFlags::empty())?;
    }
    move_mount(tree.as_fd(), "", CWD, &path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(())
}

/// An absolute path to a folder below the root.
fn checked(path: &str) -> Result<PathBuf, Failure> {
    let mut parts = Path::new(path).components();
    let is_absolute = parts.next() == Some(Component::RootDir);
    let mut rest = parts.peekable();
    let is_below = rest.peek().is_some() && rest.all(|part| matches!(part, Component::Normal(_)));
    if is_absolute && is_below && !path.contains('\0') {
        Ok(path.into())
    } else {
        Err(invalid(format!("the image's volume {path:?} is not a folder below /")))
    }
}

#[cfg(test)]
mod tests {
    use holdfast_wire::guest::FailureKind;

    use super::*;

    #[test]
    fn only_a_folder_below_the_root_can_be_a_volume() {
        assert_eq!(checked("/var/lib/docker").unwrap(), Path::new("/var/lib/docker"));
        for path in ["", "/", "//", "data", "/a/../..", "/.."] {
            assert_eq!(checked(path).unwrap_err().kind, FailureKind::Invalid, "{path}");
        }
    }
}

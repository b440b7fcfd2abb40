//! The calls ReadFile and WriteFile. The thread is inside the sandbox, so that paths mean what a
//! program there means by them, links and mounts included; as root, so that permissions are not
//! in the way.

use std::{
    io::{self, Read, Write},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use holdfast_wire::{
    frame::{self, CHUNK_BYTES_MAX},
    guest::{Failure, Input, Output},
};
use rustix::{
    fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Stat, Uid},
    io::Errno,
};

use crate::{
    connection::Connection,
    failure::{from_errno, from_io, invalid, not_found},
    workload::{Inside, Workload},
};

/// Longest path, the kernel's own limit.
const PATH_BYTES_MAX: usize = 4095;

/// Permissions of a new file for which none are asked.
const DEFAULT_MODE: u32 = 0o644;

/// Tries at a free name for the file written beside.
const NAME_TRIES_MAX: u32 = 64;

/// Sends a file's content. `Ok(false)`: the host has gone.
pub(crate) fn read(
    workload: &Workload,
    path: &str,
    connection: &mut Connection,
) -> Result<bool, Failure> {
    let _inside = workload.enter()?;
    let path = absolute(path, workload)?;
    let what = format!("cannot read {}", path.display());
    let (file, stat) = open_regular(&path).map_err(|error| match error {
        Trouble::Kernel(error) => from_errno(&what, error),
        Trouble::Kind => invalid(format!("{what}: it is not a regular file")),
    })?;
    let size = u64::try_from(stat.st_size).unwrap_or_default();
    let mode = stat.st_mode & 0o7777;
    if connection.send(&Output::File { size, mode }).is_err() {
        return Ok(false);
    }
    loop {
        let mut bytes = vec![0; CHUNK_BYTES_MAX];
        let count = rustix::io::retry_on_intr(|| rustix::io::read(&file, &mut bytes))
            .map_err(|error| from_errno(&what, error))?;
        if count == 0 {
            return Ok(true);
        }
        bytes.truncate(count);
        if connection.send(&Output::Data(bytes)).is_err() {
            return Ok(false);
        }
    }
}

/// Takes a file's content and puts it in place as a whole. `Ok(false)`: the host has gone, and the
/// file is as it was.
pub(crate) fn write(
    workload: &Workload,
    path: &str,
    mode: Option<u32>,
    create_dirs: bool,
    connection: &mut Connection,
) -> Result<bool, Failure> {
    let _inside = workload.enter()?;
    let path = absolute(path, workload)?;
    let what = format!("cannot write {}", path.display());
    let target = Target::find(&path, create_dirs, &what)?;
    let mut draft = Draft::beside(&target.path).map_err(|error| from_io(&what, &error))?;
    loop {
        match frame::read_frame(connection) {
            Ok(Some(Input::Data(bytes))) => {
                draft.write_all(&bytes).map_err(|error| from_io(&what, &error))?;
            }
            Ok(Some(Input::End)) => break,
            Ok(Some(Input::Signal(_) | Input::Kill | Input::Collect)) => {
                return Err(invalid("a file's content cannot be sent a signal"));
            }
            Ok(None) | Err(frame::FrameError::Cut | frame::FrameError::Io(_)) => return Ok(false),
            Err(error) => return Err(invalid(format!("{what}: {error}"))),
        }
    }
    target.place(draft, mode).map_err(|error| from_errno(&what, error))?;
    Ok(true)
}

/// Content of a small file of the sandbox; a missing one is empty.
pub(crate) fn read_small(path: &str, bytes_max: usize, _: &Inside) -> Result<Vec<u8>, Failure> {
    read_bounded(path, bytes_max)
}

/// As [`read_small`], in a root that was entered another way.
pub(crate) fn read_bounded(path: &str, bytes_max: usize) -> Result<Vec<u8>, Failure> {
    let (file, _) = match open_regular(Path::new(path)) {
        Ok(opened) => opened,
        Err(Trouble::Kernel(Errno::NOENT | Errno::NOTDIR)) => return Ok(Vec::new()),
        Err(Trouble::Kernel(error)) => {
            return Err(from_errno(format_args!("cannot read {path}"), error));
        }
        Err(Trouble::Kind) => return Err(invalid(format!("{path} is not a regular file"))),
    };
    let mut bytes = Vec::new();
    let limit = u64::try_from(bytes_max).unwrap_or(u64::MAX);
    fs_err::File::from_parts(file.into(), path)
        .take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| from_io(format_args!("cannot read {path}"), &error))?;
    if bytes.len() > bytes_max {
        return Err(invalid(format!("{path} is over {bytes_max} bytes long")));
    }
    Ok(bytes)
}

enum Trouble {
    Kernel(Errno),
    /// A folder, device, pipe or socket.
    Kind,
}

/// Opens without being held up by a pipe that nobody writes.
fn open_regular(path: &Path) -> Result<(OwnedFd, Stat), Trouble> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(Trouble::Kernel)?;
    let stat = rustix::fs::fstat(&file).map_err(Trouble::Kernel)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok((file, stat)),
        _ => Err(Trouble::Kind),
    }
}

/// A relative path is relative to the sandbox's working directory.
fn absolute(path: &str, workload: &Workload) -> Result<PathBuf, Failure> {
    if path.is_empty() || path.contains('\0') || path.len() > PATH_BYTES_MAX {
        return Err(invalid(format!("{path:?} is not a path")));
    }
    Ok(Path::new(&workload.settings.cwd).join(path))
}

/// The file a write goes to: behind every link, so that the link stays.
struct Target {
    path: PathBuf,
    /// What is there now.
    existing: Option<Stat>,
}

impl Target {
    fn find(path: &Path, create_dirs: bool, what: &str) -> Result<Self, Failure> {
        let refuse = || invalid(format!("{what}: it does not name a file"));
        // `a/` and `a/..` name folders, whatever is there.
        let ends_in_name = !path.as_os_str().as_encoded_bytes().ends_with(b"/");
        let name = path.file_name().filter(|_| ends_in_name).ok_or_else(refuse)?;
        let parent = path.parent().ok_or_else(refuse)?;
        if create_dirs {
            fs_err::create_dir_all(parent).map_err(|error| from_io(what, &error))?;
        }
        let resolved = match fs_err::canonicalize(path) {
            Ok(resolved) => resolved,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let parent = fs_err::canonicalize(parent).map_err(|error| match error.kind() {
                    io::ErrorKind::NotFound => not_found(format!("{what}: its folder is missing")),
                    _ => from_io(what, &error),
                })?;
                parent.join(name)
            }
            Err(error) => return Err(from_io(what, &error)),
        };
        let existing = match rustix::fs::statat(CWD, &resolved, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Some(stat),
            Err(Errno::NOENT) => None,
            Err(error) => return Err(from_errno(what, error)),
        };
        let kind = existing.map(|stat| FileType::from_raw_mode(stat.st_mode));
        match kind {
            // A link that leads nowhere is replaced.
            None | Some(FileType::RegularFile | FileType::Symlink) => {
                Ok(Self { path: resolved, existing })
            }
            Some(_) => Err(invalid(format!("{what}: it is not a regular file"))),
        }
    }

    /// A file that is replaced keeps its owner, and its permissions unless others are asked for.
    fn place(&self, draft: Draft, mode: Option<u32>) -> Result<(), Errno> {
        let kept = self
            .existing
            .filter(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile);
        if let Some(stat) = kept {
            let (owner, group) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
            rustix::fs::fchown(&draft.file, Some(owner), Some(group))?;
        }
        // After the owner: a change of owner takes the set-id bits away.
        let mode = mode.or(kept.map(|stat| stat.st_mode)).unwrap_or(DEFAULT_MODE);
        rustix::fs::fchmod(&draft.file, Mode::from_raw_mode(mode & 0o7777))?;
        draft.rename(&self.path)
    }
}

/// A file being written, removed unless it is renamed into place.
struct Draft {
    file: OwnedFd,
    path: Option<PathBuf>,
}

impl Draft {
    fn beside(target: &Path) -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        for _ in 0..NAME_TRIES_MAX {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = target.with_file_name(format!(".holdfast-{number}.draft"));
            match rustix::fs::open(&path, flags, Mode::from_raw_mode(0o600)) {
                Ok(file) => return Ok(Self { file, path: Some(path) }),
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    fn rename(mut self, target: &Path) -> Result<(), Errno> {
        if let Some(path) = &self.path {
            rustix::fs::rename(path, target)?;
        }
        self.path = None;
        Ok(())
    }
}

impl Write for Draft {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(&self.file, bytes)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // The sandbox may have removed or moved it itself.
            let _ = rustix::fs::unlink(path);
        }
    }
}

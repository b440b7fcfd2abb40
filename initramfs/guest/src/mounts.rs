//! The file systems of PID 1's own namespace: kernel ones, the image, the disk, and both joined.

use std::{io, path::Path};

use rustix::{
    fs::{AtFlags, CWD, Gid, Mode, Uid, mkdirat},
    io::Errno,
    mount::{MountFlags, mount},
};

/// The image: metadata and layer blobs as one read-only erofs.
pub const IMAGE_DEVICE: &str = "/dev/vda";
/// The sandbox's writable disk, ext4.
pub const DISK_DEVICE: &str = "/dev/vdb";

pub const IMAGE: &str = "/image";
pub const DISK: &str = "/disk";
/// What the image declares as volumes, on the disk itself.
pub const VOLUMES: &str = "/disk/volumes";
/// Image and disk joined: the workload's root. (`/root` belongs to the kernel's own initramfs.)
pub const SANDBOX: &str = "/sandbox";
pub const CGROUPS: &str = "/cgroup";

/// Pinned, so that what a disk holds means the same to every kernel: the defaults are build
/// options. A rename of a folder of the image is a copy, as on any overlay without redirects.
const OVERLAY_OPTIONS: &str = "redirect_dir=off,metacopy=off,index=off,xino=off";

#[derive(Debug, thiserror::Error)]
#[error("cannot mount {what}")]
pub struct MountError {
    what: String,
    #[source]
    source: io::Error,
}

impl MountError {
    fn new(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self { what: what.into(), source: source.into() }
    }

    /// The whole chain in one line, for the host.
    pub fn describe(&self) -> String {
        format!("{self}: {}", self.source)
    }
}

/// What PID 1 itself needs: devices, processes, cgroups.
pub fn mount_kernel_file_systems() -> Result<(), MountError> {
    let safe = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    // Without nsdelegate root of the sandbox could lift the limits of its own cgroup.
    let options = Some(c"nsdelegate");
    place("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID | MountFlags::NOEXEC, None)?;
    place("proc", "/proc", "proc", safe, None)?;
    place("cgroup2", CGROUPS, "cgroup2", safe, options)
}

/// Mounts image and disk and joins them at [`SANDBOX`].
pub fn mount_sandbox() -> Result<(), MountError> {
    let read_only = MountFlags::RDONLY | MountFlags::NOATIME;
    place(IMAGE_DEVICE, IMAGE, "erofs", read_only, None)?;
    place(DISK_DEVICE, DISK, "ext4", MountFlags::NOATIME, None)?;
    join(Path::new(IMAGE), Path::new(DISK), Path::new(SANDBOX))
}

/// Lays `disk` over `image` at `target`.
pub fn join(image: &Path, disk: &Path, target: &Path) -> Result<(), MountError> {
    let (upper, work) = (disk.join("upper"), disk.join("work"));
    prepare_upper(image, &upper).map_err(|error| MountError::new("the disk's upper", error))?;
    make_folder(&work).map_err(|error| MountError::new("the disk's work folder", error))?;
    make_folder(target).map_err(|error| MountError::new("the sandbox's root", error))?;
    let options = format!(
        "lowerdir={},upperdir={},workdir={},{OVERLAY_OPTIONS}",
        image.display(),
        upper.display(),
        work.display()
    );
    let options = std::ffi::CString::new(options)
        .map_err(|error| MountError::new("the sandbox's root", io::Error::from(error)))?;
    mount("overlay", target, "overlay", MountFlags::empty(), Some(options.as_c_str()))
        .map_err(|error| MountError::new("the sandbox's root", error))
}

/// The upper folder is what the joined root's own mode and owner come from: taken from the image.
fn prepare_upper(image: &Path, upper: &Path) -> Result<(), Errno> {
    match mkdirat(CWD, upper, Mode::from_raw_mode(0o755)) {
        Ok(()) => {}
        Err(Errno::EXIST) => return Ok(()),
        Err(error) => return Err(error),
    }
    let stat = rustix::fs::stat(image)?;
    rustix::fs::chmod(upper, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    let (owner, group) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    rustix::fs::chownat(CWD, upper, Some(owner), Some(group), AtFlags::empty())
}

fn make_folder(path: &Path) -> Result<(), Errno> {
    match mkdirat(CWD, path, Mode::from_raw_mode(0o755)) {
        Err(error) if error != Errno::EXIST => Err(error),
        _ => Ok(()),
    }
}

fn place(
    source: &str,
    target: &str,
    kind: &str,
    flags: MountFlags,
    options: Option<&std::ffi::CStr>,
) -> Result<(), MountError> {
    let what = || format!("{source} at {target}");
    make_folder(Path::new(target)).map_err(|error| MountError::new(what(), error))?;
    mount(source, target, kind, flags, options).map_err(|error| MountError::new(what(), error))
}

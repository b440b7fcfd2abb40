//! Mounts: the kernel's own file systems first, the root last, and the step into it.

use std::{
    convert::Infallible,
    ffi::CStr,
    io,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
};

use rustix::{
    io::Errno,
    mount::{MountFlags, mount, mount_move},
};

/// Where the root is mounted before it becomes `/`.
const NEW_ROOT: &str = "/sysroot";
const PLAIN: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);
const KERNEL_FILESYSTEMS: [(&str, &str, MountFlags, &CStr); 4] = [
    ("devtmpfs", "/dev", MountFlags::NOSUID, c"mode=0755"),
    ("proc", "/proc", PLAIN, c""),
    ("sysfs", "/sys", PLAIN, c""),
    ("tmpfs", "/run", MountFlags::NOSUID.union(MountFlags::NODEV), c"mode=0755"),
];

#[derive(Debug, thiserror::Error)]
pub(crate) enum RootError {
    #[error("cannot mount {what} on {on}")]
    Mount {
        what: String,
        on: &'static str,
        #[source]
        source: Errno,
    },
    #[error("cannot make or remove a folder of the initramfs")]
    Folder(#[from] io::Error),
    #[error("cannot step into the root")]
    Step(#[source] Errno),
    #[error("cannot run {}", path.display())]
    Init {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

pub(crate) fn mount_kernel_filesystems() -> Result<(), RootError> {
    for (kind, on, flags, options) in KERNEL_FILESYSTEMS {
        fs_err::create_dir_all(on)?;
        match mount(kind, on, kind, flags, Some(options)) {
            // The kernel may have mounted devtmpfs itself.
            Ok(()) | Err(Errno::BUSY) => {}
            Err(source) => return Err(RootError::Mount { what: kind.to_owned(), on, source }),
        }
    }
    Ok(())
}

/// Mounts `device`, leaves the initramfs for it and becomes `init`.
pub(crate) fn enter(device: &Path, init: &Path) -> Result<Infallible, RootError> {
    fs_err::create_dir_all(NEW_ROOT)?;
    mount(device, NEW_ROOT, "erofs", MountFlags::RDONLY, None).map_err(|source| {
        RootError::Mount { what: device.display().to_string(), on: NEW_ROOT, source }
    })?;
    for (kind, on, ..) in KERNEL_FILESYSTEMS {
        let target = format!("{NEW_ROOT}{on}");
        mount_move(on, target).map_err(|source| RootError::Mount {
            what: kind.to_owned(),
            on,
            source,
        })?;
    }
    // The initramfs stays in memory for ever below the root: leave as little there as can be.
    fs_err::remove_dir_all("/modules")?;
    fs_err::remove_file("/init")?;
    rustix::process::chdir(NEW_ROOT).map_err(RootError::Step)?;
    mount_move(".", "/").map_err(RootError::Step)?;
    rustix::process::chroot(".").map_err(RootError::Step)?;
    rustix::process::chdir("/").map_err(RootError::Step)?;
    let source = Command::new(init).exec();
    Err(RootError::Init { path: init.to_owned(), source })
}

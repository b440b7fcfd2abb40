//! What of the kernel's scheduler is set up here.

use rustix::{
    fs::{Dir, Mode, OFlags, openat},
    io::{Errno, write},
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen},
};

/// Of each CPU, in debugfs: the time kept for ordinary tasks beside real-time ones.
const SERVERS: &str = "sched/fair_server";

/// Turns off the server that keeps time for ordinary tasks beside real-time ones: whenever any task
/// has run, its timer wakes the guest once or twice in the second after that. The limit of
/// real-time tasks (`sched_rt_runtime_us`), which was there before it, keeps them from taking all.
///
/// It is set by debugfs and nowhere else. That is not mounted anywhere.
pub(crate) fn let_idle_cpus_sleep() -> Result<(), Errno> {
    let context = fsopen("debugfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    let root = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    let folder = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let servers = openat(&root, SERVERS, folder, Mode::empty())?;
    for entry in Dir::read_from(&servers)? {
        let name = entry?.file_name().to_owned();
        if name.to_bytes().starts_with(b"cpu") {
            let server = openat(&servers, name, folder, Mode::empty())?;
            let flags = OFlags::WRONLY | OFlags::CLOEXEC;
            write(openat(&server, c"runtime", flags, Mode::empty())?, b"0")?;
        }
    }
    Ok(())
}

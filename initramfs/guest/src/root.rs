//! Makes a thread's mount namespace the sandbox's: its root, and in it the kernel file systems,
//! devices and files that programs expect of a machine.
//!
//! Everything after [`enter_root`] happens with the sandbox's root as the thread's own, so that no
//! link in the image leads out of it.

use std::{fmt::Write as _, io, net::Ipv4Addr, path::Path};

use rustix::{
    fs::{CWD, FileType, Mode, makedev, mknodat, symlinkat},
    io::Errno,
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount},
    thread::UnshareFlags,
};

use crate::{files, workload::Inside};

const DEVICES: &[(&str, u32, u32)] = &[
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
    ("fuse", 10, 229),
    ("net/tun", 10, 200),
];

const LINKS: &[(&str, &str)] = &[
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// For an image without one: resolvers fall back to this address anyway; said openly it is found
/// by whoever looks for the reason.
const RESOLV_CONF: &str = "nameserver 127.0.0.1\n";

/// A larger `/etc/hosts` is left with the name that was.
const HOSTS_BYTES_MAX: usize = 64 * 1024;

/// What Linux lets a machine be called, and a line's end.
const HOST_NAME_BYTES_MAX: usize = 65;

/// Moves the calling thread into a mount namespace of its own whose root is `root`, a mount.
/// `hidden` are mounts of the old root that the sandbox must not keep.
pub(crate) fn enter_root(root: &Path, hidden: &[&str]) -> Result<(), Errno> {
    crate::sys::unshare(UnshareFlags::FS | UnshareFlags::NEWNS)?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    rustix::process::chdir(root)?;
    for mount in hidden {
        unmount(*mount, UnmountFlags::DETACH)?;
    }
    // pivot_root refuses the kernel's first root; laid over it, the sandbox's hides it just as well.
    rustix::mount::mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    rustix::process::chdir("/")?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    Ok(())
}

/// `/sys`, `/dev` and what belongs into it; `/proc` is left to the pid namespace's first process.
pub(crate) fn populate(host_name: &str) -> io::Result<()> {
    let safe = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    for folder in ["/proc", "/sys", "/dev", "/etc"] {
        fs_err::create_dir_all(folder)?;
    }
    mount("sysfs", "/sys", "sysfs", safe, None)?;
    let options = Some(c"mode=755,size=65536k");
    mount("tmpfs", "/dev", "tmpfs", MountFlags::NOSUID, options)?;
    for folder in ["/dev/pts", "/dev/shm", "/dev/mqueue", "/dev/net"] {
        fs_err::create_dir(folder)?;
    }
    let options = Some(c"newinstance,ptmxmode=0666,mode=0620,gid=5");
    mount("devpts", "/dev/pts", "devpts", MountFlags::NOSUID | MountFlags::NOEXEC, options)?;
    mount("tmpfs", "/dev/shm", "tmpfs", safe, Some(c"mode=1777"))?;
    match mount("mqueue", "/dev/mqueue", "mqueue", safe, None) {
        // A kernel without POSIX message queues.
        Err(Errno::NODEV) => {}
        outcome => outcome?,
    }
    make_devices()?;
    write_identity(host_name);
    Ok(())
}

fn make_devices() -> io::Result<()> {
    // The umask would take the group's and others' right to write.
    let umask = rustix::process::umask(Mode::empty());
    let outcome = DEVICES.iter().try_for_each(|&(name, major, minor)| {
        let mode = Mode::from_raw_mode(0o666);
        let path = format!("/dev/{name}");
        mknodat(CWD, path, FileType::CharacterDevice, mode, makedev(major, minor))
    });
    rustix::process::umask(umask);
    outcome?;
    for (name, target) in LINKS {
        symlinkat(*target, CWD, format!("/dev/{name}"))?;
    }
    Ok(())
}

/// The files by which a machine knows its name and its resolver. The name is the sandbox's; the
/// others are the image's business if it has them.
fn write_identity(host_name: &str) {
    write_machine_id();
    let mut hosts = String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost\n");
    if !host_name.is_empty() {
        let old = read_file("/etc/hostname", HOST_NAME_BYTES_MAX);
        write_file("/etc/hostname", &format!("{host_name}\n"));
        // Writing to a String does not fail.
        let _ = write!(hosts, "{}", own_line(host_name));
        // Of a sandbox that was made from another's disk: the line that was written for that.
        if let Some(old) = old.filter(|old| old.trim_end() != host_name)
            && let Some(known) = read_file("/etc/hosts", HOSTS_BYTES_MAX)
            && known.contains(&own_line(old.trim_end()))
        {
            write_file(
                "/etc/hosts",
                &known.replace(&own_line(old.trim_end()), &own_line(host_name)),
            );
        }
    }
    write_if_empty("/etc/hosts", &hosts);
    write_if_empty("/etc/resolv.conf", RESOLV_CONF);
}

/// Has programs ask this name server, whatever the image says: no other can be reached.
pub(crate) fn name_server(address: Ipv4Addr) {
    const PATH: &str = "/etc/resolv.conf";
    // Images of whole machines have a link to what a service there would have written.
    if fs_err::symlink_metadata(PATH).is_ok_and(|metadata| metadata.is_symlink()) {
        let _ = fs_err::remove_file(PATH);
    }
    write_file(PATH, &format!("nameserver {address}\n"));
}

/// The line of `/etc/hosts` by which a machine finds itself.
fn own_line(host_name: &str) -> String {
    format!("127.0.1.1\t{host_name}\n")
}

/// A file, if it is one of at most so many bytes.
fn read_file(path: &str, bytes_max: usize) -> Option<String> {
    let metadata = fs_err::metadata(path).ok()?;
    let fits = metadata.is_file() && usize::try_from(metadata.len()).is_ok_and(|n| n <= bytes_max);
    fits.then(|| fs_err::read_to_string(path).ok()).flatten()
}

/// Gives a clone names of its own. The thread is inside the sandbox.
pub(crate) fn rename(old: &str, new: &str, inside: &Inside) {
    write_machine_id();
    write_file("/etc/hostname", &format!("{new}\n"));
    // What the workload wrote beside it stays.
    let hosts = files::read_small("/etc/hosts", HOSTS_BYTES_MAX, inside).unwrap_or_default();
    if let Ok(hosts) = String::from_utf8(hosts)
        && !old.is_empty()
        && hosts.contains(old)
    {
        write_file("/etc/hosts", &hosts.replace(old, new));
    }
}

/// A name that no other machine has (machine-id(5)): an image's own is that of all its sandboxes.
fn write_machine_id() {
    let mut id = [0; 16];
    // Of the kernel, which has random bytes from its first moment on.
    if rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty()) == Ok(id.len()) {
        write_file("/etc/machine-id", &format!("{:032x}\n", u128::from_be_bytes(id)));
    }
}

fn write_if_empty(path: &str, content: &str) {
    let filled = fs_err::metadata(path).is_ok_and(|metadata| metadata.len() > 0);
    if !filled {
        write_file(path, content);
    }
}

/// An image may have a dangling link or a folder there: the sandbox starts without the file. What is
/// no file is not opened at all: a pipe without a reader would hold the start up for ever.
fn write_file(path: &str, content: &str) {
    let is_other = fs_err::metadata(path).is_ok_and(|metadata| !metadata.is_file());
    if !is_other {
        let _ = fs_err::write(path, content);
    }
}

//! Calls for which no safe wrapper exists: what a child does between fork and exec, taps, and sockets of slots.

use std::{
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    process::Command,
};

use rustix::{
    fs::{Mode, OFlags, open},
    io::{Errno, FdFlags, fcntl_setfd},
    process::{Gid, Resource, Rlimit, Uid, setrlimit},
    thread::{
        UnshareFlags, set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
        unshare_unsafe,
    },
};

use crate::{Confinement, Identity};

/// First descriptor that is not one of the standard three.
const FIRST_FD: u32 = 3;

/// Adds the steps of [`crate::confine`] that must happen in the child.
pub(crate) fn confine_child(command: &mut Command, confinement: Confinement) {
    let steps = move || child_steps(&confinement);
    // SAFETY: between fork and exec of a threaded process only async-signal-safe work is allowed.
    // `child_steps` makes system calls alone: it allocates nothing, takes no lock and frees nothing
    // (`confinement` lives in the parent's `Command` and is only borrowed here). Its descriptors
    // are owned by `confinement`, so they are open for as long as the command can be spawned.
    unsafe { command.pre_exec(steps) };
}

fn child_steps(confinement: &Confinement) -> io::Result<()> {
    // First, so that everything after it is charged to the cgroup. `0` means the writer itself.
    if let Some(door) = &confinement.door {
        rustix::io::write(door, b"0")?;
    }
    // A core dump would hold the guest's memory.
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    close_on_exec_from(FIRST_FD)?;
    for given in &confinement.handover.given {
        fcntl_setfd(given, FdFlags::empty())?;
    }
    for (given, number) in &confinement.handover.placed {
        place(given, *number)?;
    }
    if let Some(Identity { uid, gid }) = confinement.identity {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        // These set the calling thread's: the child has one.
        set_thread_groups(&[])?;
        set_thread_res_gid(gid, gid, gid)?;
        set_thread_res_uid(uid, uid, uid)?;
    }
    set_no_new_privs(true)?;
    Ok(())
}

/// Duplicates a descriptor to a number below all of those handed over.
fn place(given: &OwnedFd, number: RawFd) -> io::Result<()> {
    // SAFETY: in the child after fork, what was open at `number` is the parent's copy alone, and no
    // Rust value of the child is used or dropped any more before exec. `given` is open.
    let outcome = unsafe { libc::dup2(given.as_raw_fd(), number) };
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Marks every descriptor from `first` on to be closed by exec. Not closed at once: the standard
/// library still needs the one by which it reports a failed exec.
fn close_on_exec_from(first: u32) -> io::Result<()> {
    let last = u32::MAX;
    let flags = libc::CLOSE_RANGE_CLOEXEC;
    // SAFETY: the call takes three integers and touches no memory of this process; with this flag
    // it closes nothing now, so no descriptor that Rust owns becomes invalid.
    let outcome = unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Leaves namespaces of the process for new ones, in this thread alone.
pub(crate) fn unshare(flags: UnshareFlags) -> Result<(), Errno> {
    debug_assert!(!flags.contains(UnshareFlags::FILES));
    // SAFETY: what makes this unsafe is a thread whose table of descriptors is not that of the
    // others any more; the flag for it is not among those given (see the callers).
    unsafe { unshare_unsafe(flags) }
}

/// Makes a tap of this thread's network namespace: Ethernet frames behind a virtio header.
pub(crate) fn open_tap(name: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let tap = open("/dev/net/tun", flags, Mode::empty())?;
    let mut request = link_request(name)?;
    request.ifr_ifru.ifru_flags = short(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR)?;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which `request` is, alive during the call;
    // the descriptor is open.
    let outcome = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(tap) }
}

/// The network namespace in which a tap lies.
pub(crate) fn network_of_tap(tap: impl AsFd) -> io::Result<OwnedFd> {
    /// `_IO('T', 227)` of `linux/if_tun.h`.
    const TUNGETDEVNETNS: libc::Ioctl = 0x54e3;
    new_descriptor(tap.as_fd(), TUNGETDEVNETNS)
}

/// The network namespace in which a socket was made.
pub(crate) fn network_of_socket(socket: impl AsFd) -> io::Result<OwnedFd> {
    new_descriptor(socket.as_fd(), libc::SIOCGSKNS)
}

/// Asks by a call of ioctl(2) that takes nothing and gives a descriptor.
fn new_descriptor(of: BorrowedFd<'_>, request: libc::Ioctl) -> io::Result<OwnedFd> {
    // SAFETY: both requests above take no argument, so the kernel touches no memory of ours; on a
    // descriptor of another kind they are refused. `of` is borrowed, so open.
    let fd = unsafe { libc::ioctl(of.as_raw_fd(), request) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Lets a socket have addresses that are not this machine's.
pub(crate) fn set_transparent(socket: &OwnedFd) -> Result<(), Errno> {
    set_ip_option(socket, libc::IP_TRANSPARENT)
}

/// Has every datagram come with the address it was sent to, before any rule moved it.
pub(crate) fn tell_original_destination(socket: &OwnedFd) -> Result<(), Errno> {
    set_ip_option(socket, libc::IP_RECVORIGDSTADDR)
}

fn set_ip_option(socket: &OwnedFd, option: libc::c_int) -> Result<(), Errno> {
    let on: libc::c_int = 1;
    let length = libc::socklen_t::try_from(size_of_val(&on)).map_err(|_| Errno::INVAL)?;
    // SAFETY: the kernel reads `length` bytes at the address, which is that of a whole `c_int` that
    // lives over the call; the descriptor is borrowed, so open.
    let outcome = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_IP, option, (&raw const on).cast(), length)
    };
    if outcome < 0 {
        return Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    Ok(())
}

fn link_request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: a structure of integers and arrays of them, for which zeros are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One place stays for the zero that ends it.
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte.cast_signed();
    }
    Ok(request)
}

fn short(flags: libc::c_int) -> io::Result<libc::c_short> {
    flags.try_into().map_err(io::Error::other)
}

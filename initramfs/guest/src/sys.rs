//! What neither std nor rustix offers safely: making processes with `clone3`, vsock addresses,
//! signals by number, and setting interfaces up.
//!
//! PID 1 has threads, so a child made here may call only what is safe after a fork: no allocation,
//! no lock. The child functions keep to system calls on memory prepared beforehand.
#![allow(unsafe_code)]

use std::{
    ffi::{CStr, CString, c_char, c_int},
    io, mem,
    net::Ipv4Addr,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

use rustix::{
    io::Errno,
    process::Pid,
    thread::{ThreadNameSpaceType, UnshareFlags, move_into_thread_name_spaces},
};

/// A process made here. Whoever holds it waits for it.
#[derive(Debug)]
pub struct Child {
    /// As PID 1 sees it.
    pub pid: Pid,
    pub pidfd: OwnedFd,
}

/// What becomes of a child once it is on its own. All of it is prepared before the clone.
pub(crate) struct Image<'a> {
    pub program: &'a CStr,
    pub argv: &'a [CString],
    pub env: &'a [CString],
    pub stdin: BorrowedFd<'a>,
    pub stdout: BorrowedFd<'a>,
    pub stderr: BorrowedFd<'a>,
    /// Process whose cgroup namespace the child joins.
    pub holder: BorrowedFd<'a>,
    pub uid: u32,
    pub gid: u32,
    pub groups: &'a [u32],
}

/// What the child writes on its report pipe: first its pid as the sandbox sees it, and, if it
/// could not become the program, the error.
pub(crate) const REPORT_BYTES: usize = size_of::<i32>();

/// Starts `image` in `cgroup` and the caller's pid namespace for children. The child reports on
/// `report`, which closes when the program runs.
pub(crate) fn spawn(
    image: &Image<'_>,
    cgroup: BorrowedFd<'_>,
    report: BorrowedFd<'_>,
) -> io::Result<Child> {
    let arguments = Arguments { argv: pointers(image.argv), env: pointers(image.env) };
    // SAFETY: the child runs `become_image`, which never returns and makes system calls only; all
    // it reads was allocated above, before the clone, and is in its copy of the memory.
    match unsafe { clone_into(0, cgroup) }? {
        Some(child) => Ok(child),
        None => become_image(image, &arguments, report.as_raw_fd()),
    }
}

/// Starts the process that holds the workload's namespaces: process 1 of a new pid namespace, in
/// `cgroup`. It writes an error number (0: all is well) on `report`.
pub(crate) fn spawn_holder(cgroup: BorrowedFd<'_>, report: BorrowedFd<'_>) -> io::Result<Child> {
    // SAFETY: the child runs `hold`, which never returns and makes system calls only, on constants.
    match unsafe { clone_into(libc::CLONE_NEWPID, cgroup) }? {
        Some(child) => Ok(child),
        None => hold(report.as_raw_fd()),
    }
}

/// What `execve` wants beside the program.
struct Arguments {
    argv: Vec<*const c_char>,
    env: Vec<*const c_char>,
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect()
}

/// `clone3` as a fork into a cgroup. `None` is the child.
///
/// # Safety
/// Other threads' locks are frozen in the child: it must neither allocate nor return to code that
/// does, and must end in `execve` or `_exit`.
unsafe fn clone_into(flags: c_int, cgroup: BorrowedFd<'_>) -> io::Result<Option<Child>> {
    const INTO_CGROUP: u64 = 0x2_0000_0000;
    let mut pidfd: RawFd = -1;
    let flags = i64::from(flags | libc::CLONE_PIDFD).unsigned_abs() | INTO_CGROUP;
    let args = libc::clone_args {
        flags,
        pidfd: (&raw mut pidfd).addr() as u64,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: u64::from(libc::SIGCHLD.unsigned_abs()),
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: u64::from(cgroup.as_raw_fd().unsigned_abs()),
    };
    // SAFETY: `args` is a whole clone_args that lives over the call; without CLONE_VM and a stack
    // the child has a copy of this memory and goes on here; the kernel writes the pidfd to the
    // parent's `pidfd` only, which outlives the call.
    let pid =
        unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<libc::clone_args>()) };
    match i32::try_from(pid) {
        Ok(0) => Ok(None),
        Ok(number @ 1..) => {
            // SAFETY: the clone succeeded with CLONE_PIDFD, so the kernel stored a new descriptor
            // that nobody else knows of.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            let pid = Pid::from_raw(number).ok_or(io::ErrorKind::InvalidData)?;
            Ok(Some(Child { pid, pidfd }))
        }
        _ => Err(io::Error::last_os_error()),
    }
}

// `extern "C"`: a panic here aborts the child instead of unwinding into the parent's code.
extern "C" fn become_image(image: &Image<'_>, arguments: &Arguments, mut report: RawFd) -> ! {
    let error = match try_image(image, arguments, &mut report) {
        Ok(never) => match never {},
        Err(error) => error,
    };
    let number = error.raw_os_error();
    // SAFETY: writes 4 bytes of a local to the report pipe; `_exit` runs no handlers of the parent.
    unsafe {
        libc::write(report, (&raw const number).cast(), REPORT_BYTES);
        libc::_exit(127)
    }
}

enum Never {}

/// Where a child keeps the report pipe; descriptors above are closed.
const REPORT: RawFd = 3;

fn try_image(image: &Image<'_>, arguments: &Arguments, report: &mut RawFd) -> Result<Never, Errno> {
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: writes 4 bytes of a local.
    check(unsafe { libc::write(*report, (&raw const pid).cast(), REPORT_BYTES) })?;
    // The clone went into the sandbox's cgroup; only now does its namespace make that the root.
    move_into_thread_name_spaces(image.holder, ThreadNameSpaceType::CONTROL_GROUP)?;
    let stdio = [image.stdin.as_raw_fd(), image.stdout.as_raw_fd(), image.stderr.as_raw_fd()];
    for (to, from) in (0..).zip(stdio) {
        // SAFETY: dup2 on descriptors of this process. PID 1 keeps 0 to 2 open, so that `from` is
        // above them and no source is overwritten before it is copied.
        check(unsafe { libc::dup2(from, to) })?;
    }
    if *report != REPORT {
        // SAFETY: as above; whatever was on 3 is the parent's, or a source copied already.
        check(unsafe { libc::dup3(*report, REPORT, libc::O_CLOEXEC) })?;
        *report = REPORT;
    }
    // SAFETY: closes copies of the parent's descriptors; the child uses none above the report.
    // Without this, connections closed by PID 1 would stay open while the program is being loaded.
    check(unsafe { libc::close_range(4, libc::c_uint::MAX, 0) })?;
    rustix::process::setsid()?;
    reset_signals();
    // SAFETY: the three calls pass numbers and a slice with its length. The raw system calls
    // change this thread only, which is the child's only one; the C library's wrappers would wait
    // for threads that were not copied.
    unsafe {
        check(libc::syscall(libc::SYS_setgroups, image.groups.len(), image.groups.as_ptr()))?;
        check(libc::syscall(libc::SYS_setresgid, image.gid, image.gid, image.gid))?;
        check(libc::syscall(libc::SYS_setresuid, image.uid, image.uid, image.uid))?;
    }
    // SAFETY: `program` is NUL-terminated; both arrays were made by `pointers`: NUL-terminated
    // strings that outlive the call, with a null pointer at the end.
    unsafe {
        libc::execve(image.program.as_ptr(), arguments.argv.as_ptr(), arguments.env.as_ptr())
    };
    Err(last_errno())
}

/// std ignores SIGPIPE; a program expects the default. Handlers go with `execve`.
fn reset_signals() {
    // SAFETY: sets a default disposition and an empty mask, both from locals, in a process with
    // one thread.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let mut none: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
    }
}

// `extern "C"`: see `become_image`.
extern "C" fn hold(report: RawFd) -> ! {
    let number = match holder_mounts() {
        Ok(()) => 0_i32,
        Err(error) => error.raw_os_error(),
    };
    // SAFETY: writes 4 bytes of a local, then closes every descriptor of this process, the copies
    // of PID 1's connections among them; nothing below uses one.
    unsafe {
        libc::write(report, (&raw const number).cast(), REPORT_BYTES);
        libc::close_range(0, libc::c_uint::MAX, 0);
    }
    if number != 0 {
        // SAFETY: ends this process without running the parent's exit handlers.
        unsafe { libc::_exit(1) }
    }
    // SAFETY: with SIGCHLD ignored the kernel reaps every orphan of the namespace by itself, so
    // this process has nothing to do and cannot fail; the name is a NUL-terminated constant.
    unsafe {
        libc::signal(libc::SIGCHLD, libc::SIG_IGN);
        libc::prctl(libc::PR_SET_NAME, c"sandbox-init".as_ptr());
        loop {
            libc::pause();
        }
    }
}

/// What can only be mounted from within the new namespaces.
fn holder_mounts() -> Result<(), Errno> {
    use rustix::mount::{MountFlags, mount};
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    // Its cgroup is the workload's by the clone: that becomes the root of what the sandbox sees.
    // SAFETY: the flag touches neither descriptors nor memory that Rust relies on.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWCGROUP)? };
    mount(c"proc", c"/proc", c"proc", flags, None)?;
    mount(c"cgroup2", c"/sys/fs/cgroup", c"cgroup2", flags, None)
}

/// Sends a signal, given by number, to the process group of a child that was made by [`spawn`].
pub(crate) fn signal_group(leader: Pid, signal: i32) -> io::Result<()> {
    kill(-leader.as_raw_nonzero().get(), signal)
}

/// Sends a signal, given by number, to a process.
pub(crate) fn signal_process(pid: Pid, signal: i32) -> io::Result<()> {
    kill(pid.as_raw_nonzero().get(), signal)
}

fn kill(target: i32, signal: i32) -> io::Result<()> {
    // SAFETY: passes two numbers; the kernel refuses what is not a process or signal.
    check(unsafe { libc::kill(target, signal) }).map_err(io::Error::from)
}

/// Gives the calling thread its own of what `flags` names: namespaces, or root and umask.
pub(crate) fn unshare(flags: UnshareFlags) -> Result<(), Errno> {
    // An own descriptor table would let two threads mean different files by one number.
    debug_assert!(!flags.contains(UnshareFlags::FILES));
    // SAFETY: without FILES, which is taken out here, descriptors mean the same to all threads.
    unsafe { rustix::thread::unshare_unsafe(flags.difference(UnshareFlags::FILES)) }
}

/// Turns an interface on.
pub(crate) fn interface_up(name: &str) -> io::Result<()> {
    let mut request = interface_request(name)?;
    let up = libc::c_short::try_from(libc::IFF_UP | libc::IFF_RUNNING)
        .map_err(|_| io::ErrorKind::InvalidData)?;
    request.ifr_ifru.ifru_flags = up;
    interface_ioctl(libc::SIOCSIFFLAGS, &request)
}

/// Gives an interface its IPv4 address, in place of another, in a network of so many bits.
pub(crate) fn set_address(name: &str, address: Ipv4Addr, prefix_bits: u8) -> io::Result<()> {
    let mut request = interface_request(name)?;
    request.ifr_ifru.ifru_addr = socket_address(address);
    interface_ioctl(libc::SIOCSIFADDR, &request)?;
    let host_bits = 32_u32.saturating_sub(prefix_bits.into());
    let mask = u32::MAX.checked_shl(host_bits).unwrap_or(0);
    request.ifr_ifru.ifru_netmask = socket_address(mask.into());
    interface_ioctl(libc::SIOCSIFNETMASK, &request)
}

/// Has everything go by this gateway that has no other way.
pub(crate) fn add_default_route(gateway: Ipv4Addr) -> io::Result<()> {
    // SAFETY: an rtentry is plain data for which all zeroes is valid, a null device name included.
    let mut route: libc::rtentry = unsafe { mem::zeroed() };
    route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = socket_address(gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    let socket = inet_socket()?;
    // SAFETY: SIOCADDRT reads one rtentry, which lives over the call; its only pointer is null.
    let outcome = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT, &raw const route) };
    match check(outcome) {
        // As it was before a restore.
        Err(Errno::EXIST) => Ok(()),
        outcome => outcome.map_err(io::Error::from),
    }
}

fn inet_socket() -> Result<OwnedFd, Errno> {
    rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)
}

fn interface_request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: an ifreq is plain data for which all zeroes is valid.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    // One place stays for the zero that ends it.
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = c_char::from_ne_bytes([from]);
    }
    Ok(request)
}

fn interface_ioctl(call: libc::Ioctl, request: &libc::ifreq) -> io::Result<()> {
    let socket = inet_socket()?;
    // SAFETY: the calls above read one ifreq, which is borrowed over the call.
    let outcome = unsafe { libc::ioctl(socket.as_raw_fd(), call, &raw const *request) };
    check(outcome).map_err(io::Error::from)
}

/// As those calls have it: family, a port that means nothing, address.
fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: a sockaddr is plain data for which all zeroes is valid.
    let mut bytes: libc::sockaddr = unsafe { mem::zeroed() };
    bytes.sa_family = libc::sa_family_t::try_from(libc::AF_INET).unwrap_or_default();
    for (to, from) in bytes.sa_data[2..].iter_mut().zip(address.octets()) {
        *to = c_char::from_ne_bytes([from]);
    }
    bytes
}

/// Has the kernel make its random numbers of what was mixed in last (random(4), RNDRESEEDCRNG).
pub(crate) fn reseed(random: BorrowedFd<'_>) -> Result<(), Errno> {
    const RNDRESEEDCRNG: rustix::ioctl::Opcode = rustix::ioctl::opcode::none(b'R', 7);
    // SAFETY: the call takes no argument, so the kernel reads and writes no memory of ours.
    let reseed = unsafe { rustix::ioctl::NoArg::<RNDRESEEDCRNG>::new() };
    // SAFETY: as above; on what is no random device the kernel refuses it.
    unsafe { rustix::ioctl::ioctl(random, reseed) }
}

/// Has the file system of this folder write all it has and take no more (ioctl_fs FIFREEZE).
pub(crate) fn freeze(folder: BorrowedFd<'_>) -> Result<(), Errno> {
    const FIFREEZE: rustix::ioctl::Opcode = rustix::ioctl::opcode::read_write::<c_int>(b'X', 119);
    // SAFETY: the number has an int in it for historical reasons; the kernel does not look at the
    // argument, and so reads and writes no memory of ours.
    let freeze = unsafe { rustix::ioctl::NoArg::<FIFREEZE>::new() };
    // SAFETY: as above; a file system that cannot do it refuses.
    unsafe { rustix::ioctl::ioctl(folder, freeze) }
}

/// Undoes [`freeze`].
pub(crate) fn thaw(folder: BorrowedFd<'_>) -> Result<(), Errno> {
    const FITHAW: rustix::ioctl::Opcode = rustix::ioctl::opcode::read_write::<c_int>(b'X', 120);
    // SAFETY: as for FIFREEZE: the kernel does not look at the argument.
    let thaw = unsafe { rustix::ioctl::NoArg::<FITHAW>::new() };
    // SAFETY: as above; one that is not frozen refuses.
    unsafe { rustix::ioctl::ioctl(folder, thaw) }
}

/// A listening vsock socket.
pub(crate) fn vsock_listen(port: u32, backlog: i32) -> io::Result<OwnedFd> {
    let socket = vsock_socket()?;
    let address = vsock_address(libc::VMADDR_CID_ANY, port);
    // SAFETY: `address` is a whole sockaddr_vm of the length given.
    check(unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), VSOCK_ADDRESS_BYTES)
    })?;
    rustix::net::listen(&socket, backlog)?;
    Ok(socket)
}

/// Tries to connect to a port of the host.
pub(crate) fn vsock_connect_host(port: u32) -> io::Result<OwnedFd> {
    let socket = vsock_socket()?;
    let address = vsock_address(libc::VMADDR_CID_HOST, port);
    // SAFETY: `address` is a whole sockaddr_vm of the length given.
    check(unsafe {
        libc::connect(socket.as_raw_fd(), (&raw const address).cast(), VSOCK_ADDRESS_BYTES)
    })?;
    Ok(socket)
}

/// Accepts one connection. `None`: it came from elsewhere than the host and was closed.
pub(crate) fn vsock_accept_host(listener: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    let mut address = vsock_address(0, 0);
    let mut length = VSOCK_ADDRESS_BYTES;
    // SAFETY: `address` has room for `length` bytes, and the kernel writes no more than that.
    let fd = unsafe {
        libc::accept4(
            listener.as_raw_fd(),
            (&raw mut address).cast(),
            &raw mut length,
            libc::SOCK_CLOEXEC,
        )
    };
    check(fd)?;
    // SAFETY: accept4 succeeded, so `fd` is a new descriptor that nobody else knows of.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok((address.svm_cid == libc::VMADDR_CID_HOST).then_some(socket))
}

const VSOCK_ADDRESS_BYTES: libc::socklen_t = 16;
const _: () = assert!(size_of::<libc::sockaddr_vm>() == 16);

fn vsock_socket() -> io::Result<OwnedFd> {
    // SAFETY: passes three numbers.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    check(fd)?;
    // SAFETY: socket succeeded, so `fd` is a new descriptor that nobody else knows of.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn vsock_address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: a sockaddr_vm is plain data for which all zeroes is valid.
    let mut address: libc::sockaddr_vm = unsafe { mem::zeroed() };
    // AF_VSOCK is 40, and the field is 16 bits wide on every platform.
    address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).unwrap_or_default();
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn check<T: PartialOrd + Default>(outcome: T) -> Result<(), Errno> {
    if outcome < T::default() { Err(last_errno()) } else { Ok(()) }
}

fn last_errno() -> Errno {
    // SAFETY: the location is this thread's own and always valid.
    Errno::from_raw_os_error(unsafe { *libc::__errno_location() })
}

/// Waits until some child of PID 1 has ended, and leaves it as it is. `None`: there is no child.
pub(crate) fn ended_child() -> io::Result<Option<Pid>> {
    // SAFETY: a siginfo_t is plain data for which all zeroes is valid.
    let mut info: libc::siginfo_t = unsafe { mem::zeroed() };
    let options = libc::WEXITED | libc::WNOWAIT | libc::__WALL;
    // SAFETY: the kernel fills the one siginfo_t, which lives over the call.
    match check(unsafe { libc::waitid(libc::P_ALL, 0, &raw mut info, options) }) {
        Ok(()) => {}
        Err(Errno::CHILD) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    // SAFETY: after a successful waitid the child's fields are those that are set.
    Ok(Pid::from_raw(unsafe { info.si_pid() }))
}

/// Takes the status of an ended child that nobody waits for.
pub(crate) fn reap(pid: Pid) -> io::Result<()> {
    let options = libc::WNOHANG | libc::__WALL;
    // SAFETY: a null status pointer is allowed: the kernel stores nothing then.
    let outcome = unsafe { libc::waitpid(pid.as_raw_nonzero().get(), ptr::null_mut(), options) };
    check(outcome).map_err(io::Error::from)
}

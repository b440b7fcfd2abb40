//! The shim's calls for which no safe wrapper exists. The shim has one thread.

use std::{
    ffi::CString,
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

use rustix::{
    io::Errno,
    process::Pid,
    thread::{UnshareFlags, unshare_unsafe},
};

/// Takes standard input, where the agent's socket is. Called once, first of all.
pub(super) fn claim_stdin() -> Option<OwnedFd> {
    // SAFETY: F_GETFD takes no pointer; on a closed number it fails.
    let open = unsafe { libc::fcntl(0, libc::F_GETFD) } >= 0;
    // SAFETY: it is open (checked), and nobody else owns it: this program never uses the standard
    // library's stdin, and calls this once.
    open.then(|| unsafe { OwnedFd::from_raw_fd(0) })
}

/// Closes every descriptor from `first` on. Called before this process has opened one itself.
pub(super) fn close_from(first: RawFd) -> Result<(), Errno> {
    let first = first.unsigned_abs();
    // SAFETY: the call takes three integers. What it closes was inherited and is owned by no Rust
    // object: the caller has opened nothing yet, and `first` lies above the standard three.
    let outcome = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    if outcome == 0 { Ok(()) } else { Err(last_errno()) }
}

/// Marks every descriptor from `first` on to be closed by exec.
pub(super) fn close_on_exec_from(first: RawFd) -> Result<(), Errno> {
    let first = first.unsigned_abs();
    let flags = libc::CLOSE_RANGE_CLOEXEC;
    // SAFETY: the call takes three integers, and with this flag closes nothing now.
    let outcome = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, flags) };
    if outcome == 0 { Ok(()) } else { Err(last_errno()) }
}

/// Makes `number` a duplicate of `fd` that survives exec.
pub(super) fn place(fd: BorrowedFd<'_>, number: RawFd) -> Result<(), Errno> {
    // SAFETY: `fd` is borrowed, so it is open. The caller has moved everything it still needs to
    // numbers above all it places, and execs or ends without dropping what it replaces.
    let outcome = unsafe { libc::dup2(fd.as_raw_fd(), number) };
    if outcome == number { Ok(()) } else { Err(last_errno()) }
}

/// Leaves namespaces of the parent's for new ones.
pub(super) fn unshare(flags: UnshareFlags) -> Result<(), Errno> {
    debug_assert!(!flags.contains(UnshareFlags::FILES));
    // SAFETY: what makes this unsafe is unsharing the table of descriptors between threads; the
    // flag for it is not among those given (see the callers), and there is one thread.
    unsafe { unshare_unsafe(flags) }
}

/// Splits this process in two. `None`: this is the child.
pub(super) fn fork() -> Result<Option<Pid>, Errno> {
    // SAFETY: this process has one thread, so no lock can be held by another and the child may run
    // any code.
    match unsafe { libc::fork() } {
        0 => Ok(None),
        pid => Pid::from_raw(pid).filter(|_| pid > 0).map(Some).ok_or_else(last_errno),
    }
}

/// Replaces this process's program by the one opened as `program`, with an empty environment.
/// Returns only if that fails.
pub(super) fn exec(program: BorrowedFd<'_>, arguments: &[CString]) -> Errno {
    let mut pointers: Vec<_> = arguments.iter().map(|argument| argument.as_ptr()).collect();
    pointers.push(ptr::null());
    let environment: [*const libc::c_char; 1] = [ptr::null()];
    // SAFETY: the path is an empty C string; `pointers` and `environment` end with a null, and every
    // other pointer is to a C string that `arguments` keeps alive. `program` is borrowed, so open.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            pointers.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    last_errno()
}

/// Waits for the end of a child. Gives its wait status as the kernel does.
pub(super) fn wait_for(child: Pid) -> Result<i32, Errno> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is a live c_int for the kernel to write to.
        let outcome = unsafe { libc::waitpid(child.as_raw_nonzero().get(), &raw mut status, 0) };
        match outcome {
            -1 if last_errno() == Errno::INTR => {}
            -1 => return Err(last_errno()),
            _ => return Ok(status),
        }
    }
}

fn last_errno() -> Errno {
    let error = io::Error::last_os_error();
    Errno::from_io_error(&error).unwrap_or(Errno::INVAL)
}

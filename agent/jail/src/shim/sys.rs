//! The shim's calls for which no safe wrapper exists. The shim has one thread.

use std::{
    ffi::CString,
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

use rustix::{io::Errno, process::Pid};

use super::landlock::Denied;

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

/// Whether children that end are gone at once, or wait to be waited for. Survives fork, and by the
/// rules of exec also that: set back to `false` before this process waits for a child.
pub(super) fn reap_children_unseen(unseen: bool) -> Result<(), Errno> {
    let handler = if unseen { libc::SIG_IGN } else { libc::SIG_DFL };
    // SAFETY: neither of the two dispositions runs code of ours.
    let before = unsafe { libc::signal(libc::SIGCHLD, handler) };
    if before == libc::SIG_ERR { Err(last_errno()) } else { Ok(()) }
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

/// Takes every capability out of the bounding set, those of newer kernels too.
pub(super) fn empty_bounding_set() -> Result<(), Errno> {
    for capability in 0.. {
        // SAFETY: this operation takes one integer; the others are not looked at.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } < 0 {
            return match last_errno() {
                // The one behind the last.
                Errno::INVAL if capability > 0 => Ok(()),
                errno => Err(errno),
            };
        }
    }
    Ok(())
}

/// The version of Landlock that this kernel has.
pub(super) fn landlock_abi() -> Result<i32, Errno> {
    const VERSION: u32 = 1;
    let none = ptr::null::<Denied>();
    // SAFETY: with a null attribute of size 0 and this flag the call looks at no memory.
    let abi = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0_usize, VERSION) };
    i32::try_from(abi).ok().filter(|abi| *abi > 0).ok_or_else(last_errno)
}

/// A set of rules that denies all of `denied` which it does not allow later.
pub(super) fn landlock_ruleset(denied: &Denied) -> Result<OwnedFd, Errno> {
    let size = size_of::<Denied>();
    // SAFETY: the attribute is three 64-bit numbers laid out as in C, alive during the call. A
    // kernel that knows fewer takes it as long as the rest is zero, and says so if not.
    let fd = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, ptr::from_ref(denied), size, 0_u32)
    };
    let fd = RawFd::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(last_errno)?;
    // SAFETY: the kernel has just made it for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Allows `access` to the file opened as `file`.
pub(super) fn landlock_allow(
    ruleset: &OwnedFd,
    file: BorrowedFd<'_>,
    access: u64,
) -> Result<(), Errno> {
    const PATH_BENEATH: u32 = 1;
    #[repr(C, packed)]
    struct Rule {
        access: u64,
        file: i32,
    }
    let rule = Rule { access, file: file.as_raw_fd() };
    // SAFETY: `rule` is laid out as the kernel's packed structure and alive during the call; both
    // descriptors are borrowed, so open.
    let outcome = unsafe {
        libc::syscall(
            libc::SYS_landlock_add_rule,
            ruleset.as_raw_fd(),
            PATH_BENEATH,
            &raw const rule,
            0_u32,
        )
    };
    if outcome == 0 { Ok(()) } else { Err(last_errno()) }
}

/// Puts this process under `ruleset` for good.
pub(super) fn landlock_restrict(ruleset: &OwnedFd) -> Result<(), Errno> {
    // SAFETY: the call takes an open descriptor and an integer.
    let outcome =
        unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0_u32) };
    if outcome == 0 { Ok(()) } else { Err(last_errno()) }
}

/// Lets go of this program's code, as far as it is in memory: nine tenths of it have done their
/// work. What the wait needs is read back from the page cache.
pub(super) fn let_go_of_code() {
    const PAGE_BYTES: usize = 4096;
    unsafe extern "C" {
        #[link_name = "__executable_start"]
        static START: u8;
        #[link_name = "etext"]
        static END: u8;
    }
    let start = (&raw const START).addr().next_multiple_of(PAGE_BYTES);
    let end = (&raw const END).addr() / PAGE_BYTES * PAGE_BYTES;
    let range = ptr::with_exposed_provenance_mut(start);
    // SAFETY: between these symbols of the linker lie the program's headers and code, mapped from
    // its file and never written to (relocations are in the data behind): a page that is dropped
    // reads the same when it comes back. Only the symbols' addresses are taken.
    unsafe { libc::madvise(range, end.saturating_sub(start), libc::MADV_DONTNEED) };
}

fn last_errno() -> Errno {
    let error = io::Error::last_os_error();
    Errno::from_io_error(&error).unwrap_or(Errno::INVAL)
}

//! What a child does between fork and exec.

use std::{io, os::unix::process::CommandExt, process::Command};

use rustix::{
    io::{FdFlags, fcntl_setfd},
    process::{Gid, Resource, Rlimit, Uid, setrlimit},
    thread::{set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid},
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

//! The program `holdfast-shim`: the parent of one VMM, and what makes such parents.
//!
//! The agent may be killed or replaced at any time; somebody must still be there to learn how a VMM
//! ended. The agent starts one [`nursery`], which forks a shim for each VMM, ahead of use. The shim
//! makes its namespaces and waits. It takes its orders from the agent, enters the sandbox's cgroup,
//! makes the VMM the first process of the pid namespace, tells the run folder both pids, gives up all it does not need, waits, records the
//! VMM's wait status and ends. A VMM does not outlive its shim: the kernel kills it when the shim
//! ends.

mod child;
mod landlock;
mod nursery;
mod orders;
mod rights;
mod room;
#[allow(unsafe_code)]
mod sys;

use std::{
    io::Read,
    os::fd::{AsFd, OwnedFd},
    process::ExitCode,
};

use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, Signal, getpid, pidfd_open, pidfd_send_signal, setsid},
    thread::UnshareFlags,
};

pub use landlock::landlock_version;
pub(crate) use orders::{
    ANSWER_FDS, Failure, HANDED_MAX, MESSAGE_BYTES_MAX, OWN_FDS, Orders, REQUEST, answer_from_bytes,
};

use crate::{
    Identity,
    messages::{FDS_MAX, receive},
    record::{Instance, Pids, write_exit},
    sys::unshare,
};
use nursery::Home;
use orders::{failed, failed_io};

/// First descriptor that is not one of the standard three.
const FIRST_FD: i32 = 3;

/// What a VMM calls its host: the real name is nothing it needs to know.
const HOST_NAME: &[u8] = b"jail";

/// What came with the orders.
struct Given {
    program: OwnedFd,
    door: OwnedFd,
    pids: OwnedFd,
    exit: OwnedFd,
    config: OwnedFd,
    log: OwnedFd,
    handed: Vec<OwnedFd>,
}

/// A VMM whose program runs.
struct Started {
    vmm: Pid,
    /// Of the VMM.
    handle: OwnedFd,
    /// Of this process.
    own_handle: OwnedFd,
    exit: OwnedFd,
    identity: Identity,
}

impl Started {
    fn kill(&self) {
        // Fails when it has ended, which is what is wanted.
        let _ = pidfd_send_signal(&self.handle, Signal::KILL);
    }
}

/// Runs the program to its end.
pub fn run() -> ExitCode {
    nursery::run()
}

/// All that is the same for every VMM. What it costs is the agent's, in its cgroup: the kernel's
/// memory of some empty namespaces.
fn get_ready() -> Result<(), Failure> {
    setsid().map_err(failed("leave the agent's session"))?;
    leave_namespaces()
}

/// Waits for orders. `None`: it is not needed any more.
fn orders(agent: &OwnedFd) -> Result<Option<(Orders, Given)>, Failure> {
    let (text, fds) =
        receive(agent, MESSAGE_BYTES_MAX, FDS_MAX).map_err(failed("receive its orders"))?;
    if text.is_empty() && fds.is_empty() {
        return Ok(None);
    }
    let text = str::from_utf8(&text).map_err(|_| misread())?;
    let orders = Orders::from_text(text).ok_or_else(misread)?;
    let given = given(&orders, fds)?;
    Ok(Some((orders, given)))
}

/// Follows the orders until the VMM's program runs. `None`: this is the child, which could not
/// become a VMM.
fn start((orders, given): (Orders, Given), home: &Home) -> Result<Option<Started>, Failure> {
    sys::place(given.log.as_fd(), 2).map_err(failed("have its log"))?;
    // First, so that all that follows is charged to the sandbox. `0` means the writer itself.
    rustix::io::write(&given.door, b"0").map_err(failed("enter the cgroup"))?;
    // Of the cgroup it is in by now: that is the root the VMM sees.
    unshare(UnshareFlags::NEWCGROUP).map_err(failed("make a namespace"))?;
    let (mut told, tell) = std::io::pipe().map_err(failed_io("make a pipe"))?;
    // The other end is the VMM's sign that this process lives, until the kernel's death signal is.
    let (watch, lifeline) = std::io::pipe().map_err(failed_io("make a pipe"))?;
    let Some(vmm) = sys::fork().map_err(failed("fork"))? else {
        drop((told, lifeline));
        child::become_vmm(&orders, given, &home.proc, child::Ends { shim: watch, tell });
        return Ok(None);
    };
    drop((tell, watch));
    wait_for_exec(&mut told)?;
    drop(lifeline);
    let instance = |pid| Instance::now(&home.proc, pid).map_err(failed_io("look at processes"));
    let pids = Pids { shim: instance(getpid())?, vmm: instance(vmm)? };
    pids.write(&given.pids).map_err(failed_io("tell the run folder"))?;
    let handle = |pid| pidfd_open(pid, PidfdFlags::NONBLOCK).map_err(failed("hold a process"));
    let (handle, own_handle) = (handle(vmm)?, handle(getpid())?);
    Ok(Some(Started { vmm, handle, own_handle, exit: given.exit, identity: orders.identity }))
}

/// Into namespaces of this sandbox alone, with nothing in them: that of mounts is a copy of the
/// empty room, where this process is already. The pid namespace begins with the next child.
fn leave_namespaces() -> Result<(), Failure> {
    let all = UnshareFlags::NEWNS
        | UnshareFlags::NEWPID
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS;
    unshare(all).map_err(failed("make namespaces"))?;
    rustix::system::sethostname(HOST_NAME).map_err(failed("forget the host's name"))
}

/// The pipe ends without a word when the child's program runs.
fn wait_for_exec(told: &mut impl Read) -> Result<(), Failure> {
    let mut bytes = Vec::new();
    told.read_to_end(&mut bytes).map_err(failed_io("read a pipe"))?;
    Failure::from_bytes(&bytes).map_or(Ok(()), Err)
}

/// Waits for the VMM's end and records it.
fn see_out(started: Started) -> ExitCode {
    if drop_rights(started.identity).is_err() {
        // Nothing is run with rights it should not have.
        started.kill();
    }
    let Started { vmm, handle, own_handle, exit, .. } = started;
    drop((handle, own_handle));
    sys::let_go_of_code();
    let recorded = sys::wait_for(vmm)
        .map_err(std::io::Error::from)
        .and_then(|status| write_exit(&exit, status));
    if recorded.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// All that waiting and one write do not need. Becomes the VMM's user and no other: the kernel
/// sends the VMM its death signal only if this process might send it itself.
fn drop_rights(identity: Identity) -> Result<(), Errno> {
    sys::empty_bounding_set()?;
    rights::become_user(identity)?;
    rights::drop_capabilities()?;
    landlock::no_files()
}

fn misread() -> Failure {
    Failure { step: "read its orders".to_owned(), errno: libc::EBADMSG }
}

fn given(orders: &Orders, fds: Vec<OwnedFd>) -> Result<Given, Failure> {
    let mut fds = fds.into_iter();
    let mut next = || fds.next().ok_or_else(misread);
    let (program, door) = (next()?, next()?);
    let (pids, exit, config, log) = (next()?, next()?, next()?, next()?);
    let handed: Vec<_> = fds.collect();
    if handed.len() != orders.numbers.len() {
        return Err(misread());
    }
    Ok(Given { program, door, pids, exit, config, log, handed })
}

//! The program `holdfast-shim`: the parent of one VMM.
//!
//! The agent may be killed or replaced at any time; somebody must still be there to learn how a VMM
//! ended. The shim takes its orders from the agent, enters the sandbox's cgroup, makes the VMM the
//! first process of a pid namespace, tells the run folder both pids, gives up all it does not need,
//! waits, records the VMM's wait status and ends. A VMM does not outlive its shim: the kernel kills
//! it when the shim ends.

mod child;
mod orders;
#[allow(unsafe_code)]
mod sys;

use std::{
    io::{IoSliceMut, PipeWriter, Read},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    process::ExitCode,
};

use rustix::{
    fs::{Mode, OFlags},
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recvmsg, send,
    },
    process::{Pid, Signal, getpid, kill_process, setsid},
    thread::{
        UnshareFlags, set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
    },
};

pub(crate) use orders::{
    FDS_MAX, Failure, HANDED_MAX, MESSAGE_BYTES_MAX, OWN_FDS, Orders, answer_from_bytes,
};

use crate::{
    Identity,
    record::{Instance, Pids, write_exit},
};
use orders::{answer_to_bytes, failed, failed_io};

/// First descriptor that is not one of the standard three.
const FIRST_FD: i32 = 3;

/// What came with the orders.
struct Given {
    program: OwnedFd,
    door: OwnedFd,
    pids: OwnedFd,
    exit: OwnedFd,
    config: OwnedFd,
    handed: Vec<OwnedFd>,
}

/// A VMM whose program runs.
struct Started {
    vmm: Pid,
    exit: OwnedFd,
    identity: Identity,
    /// Its other end is the VMM's sign that this process lives. Only for its start: afterwards the
    /// kernel's death signal does.
    _lifeline: PipeWriter,
}

/// Runs the shim to its end.
pub fn run() -> ExitCode {
    let Some(agent) = sys::claim_stdin() else { return ExitCode::FAILURE };
    match start(&agent) {
        Ok(Some(started)) => {
            let answer = answer_to_bytes(&Ok(()));
            // Nobody is told of this VMM: nobody would ever end it.
            if send(&agent, &answer, SendFlags::NOSIGNAL).is_err() {
                let _ = kill_process(started.vmm, Signal::KILL);
            }
            drop(agent);
            see_out(&started)
        }
        // The child, which could not become a VMM. It has told.
        Ok(None) => ExitCode::FAILURE,
        Err(failure) => {
            // If the agent is gone there is nobody to tell.
            let _ = send(&agent, &answer_to_bytes(&Err(failure)), SendFlags::NOSIGNAL);
            ExitCode::FAILURE
        }
    }
}

/// Follows the orders until the VMM's program runs. `None` in the child, if that fails.
fn start(agent: &OwnedFd) -> Result<Option<Started>, Failure> {
    sys::close_from(FIRST_FD).map_err(failed("close what was inherited"))?;
    let (orders, given) = receive(agent)?;
    // First, so that all that follows is charged to the sandbox. `0` means the writer itself.
    rustix::io::write(&given.door, b"0").map_err(failed("enter the cgroup"))?;
    setsid().map_err(failed("leave the agent's session"))?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let proc = rustix::fs::open("/proc", flags, Mode::empty()).map_err(failed("open /proc"))?;
    sys::unshare(UnshareFlags::NEWPID).map_err(failed("make namespaces"))?;

    let (mut told, tell) = std::io::pipe().map_err(failed_io("make a pipe"))?;
    let (watch, lifeline) = std::io::pipe().map_err(failed_io("make a pipe"))?;
    let Some(vmm) = sys::fork().map_err(failed("fork"))? else {
        drop((told, lifeline));
        child::become_vmm(&orders, given, child::Ends { shim: watch, tell });
        return Ok(None);
    };
    drop((tell, watch));
    let mut bytes = Vec::new();
    // The pipe ends without a word when the program runs.
    told.read_to_end(&mut bytes).map_err(failed_io("read a pipe"))?;
    if let Some(failure) = Failure::from_bytes(&bytes) {
        return Err(failure);
    }
    let instance = |pid| Instance::now(&proc, pid).map_err(failed_io("look at processes"));
    let pids = Pids { shim: instance(getpid())?, vmm: instance(vmm)? };
    pids.write(&given.pids).map_err(failed_io("tell the run folder"))?;
    Ok(Some(Started { vmm, exit: given.exit, identity: orders.identity, _lifeline: lifeline }))
}

/// Waits for the VMM's end and records it.
fn see_out(started: &Started) -> ExitCode {
    if drop_rights(started.identity).is_err() {
        // Nothing is run with rights it should not have.
        let _ = kill_process(started.vmm, Signal::KILL);
    }
    let recorded = sys::wait_for(started.vmm)
        .map_err(std::io::Error::from)
        .and_then(|status| write_exit(&started.exit, status));
    if recorded.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Becomes the VMM's user: the kernel sends the signal at this process's end only if this process
/// might send it itself.
fn drop_rights(identity: Identity) -> Result<(), rustix::io::Errno> {
    become_user(identity)?;
    set_no_new_privs(true)
}

fn become_user(identity: Identity) -> Result<(), rustix::io::Errno> {
    let uid = rustix::process::Uid::from_raw(identity.uid);
    let gid = rustix::process::Gid::from_raw(identity.gid);
    // These set the calling thread's: there is one.
    set_thread_groups(&[])?;
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)
}

/// The agent's one message.
fn receive(agent: &OwnedFd) -> Result<(Orders, Given), Failure> {
    let misread = || Failure { step: "read its orders".to_owned(), errno: libc::EBADMSG };
    let mut text = vec![0; MESSAGE_BYTES_MAX];
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(
        agent.as_fd(),
        &mut [IoSliceMut::new(&mut text)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )
    .map_err(failed("receive its orders"))?;
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(misread());
    }
    let text = str::from_utf8(&text[..got.bytes]).map_err(|_| misread())?;
    let orders = Orders::from_text(text).ok_or_else(misread)?;
    let mut fds = fds.into_iter();
    let mut next = || fds.next().ok_or_else(misread);
    let (program, door, pids, exit, config) = (next()?, next()?, next()?, next()?, next()?);
    let handed: Vec<_> = fds.collect();
    if handed.len() != orders.numbers.len() {
        return Err(misread());
    }
    Ok((orders, Given { program, door, pids, exit, config, handed }))
}

//! The program `holdfast-shim`: the parent of one VMM.
//!
//! The agent may be killed or replaced at any time; somebody must still be there to learn how a VMM
//! ended. The shim takes its orders from the agent, enters the sandbox's cgroup, makes the VMM the
//! first process of a pid namespace, tells the run folder both pids, gives up all it does not need,
//! waits, records the VMM's wait status and ends. A VMM does not outlive its shim: the kernel kills
//! it when the shim ends.

mod child;
mod landlock;
mod orders;
mod rights;
mod room;
#[allow(unsafe_code)]
mod sys;

use std::{
    io::{IoSlice, IoSliceMut, Read},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    process::ExitCode,
};

use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
    process::{Pid, Signal, getpid, kill_process, setsid},
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space},
};

pub(crate) use orders::{
    FDS_MAX, Failure, HANDED_MAX, MESSAGE_BYTES_MAX, OWN_FDS, Orders, Task, answer_from_bytes,
};

use crate::{
    Identity,
    record::{Instance, Pids, write_exit},
};
use orders::{answer_to_bytes, failed, failed_io};

/// First descriptor that is not one of the standard three.
const FIRST_FD: i32 = 3;

/// What a VMM calls its host: the real name is nothing it needs to know.
const HOST_NAME: &[u8] = b"jail";

/// What came with the orders.
struct Given {
    program: OwnedFd,
    room: OwnedFd,
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
}

/// What became of the task.
enum Done {
    Room(OwnedFd),
    Vmm(Started),
    /// This is the child, which could not become a VMM and has told.
    Child,
}

/// Runs the shim to its end.
pub fn run() -> ExitCode {
    let Some(agent) = sys::claim_stdin() else { return ExitCode::FAILURE };
    match carry_out(&agent) {
        Ok(Done::Room(room)) => match answer(&agent, &Ok(()), Some(&room)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        Ok(Done::Vmm(started)) => {
            // Nobody is told of this VMM: nobody would ever end it.
            if answer(&agent, &Ok(()), None).is_err() {
                let _ = kill_process(started.vmm, Signal::KILL);
            }
            drop(agent);
            see_out(&started)
        }
        Ok(Done::Child) => ExitCode::FAILURE,
        Err(failure) => {
            // If the agent is gone there is nobody to tell.
            let _ = answer(&agent, &Err(failure), None);
            ExitCode::FAILURE
        }
    }
}

fn carry_out(agent: &OwnedFd) -> Result<Done, Failure> {
    sys::close_from(FIRST_FD).map_err(failed("close what was inherited"))?;
    let (task, fds) = receive(agent)?;
    match task {
        Task::Room => room::build().map(Done::Room),
        Task::Vmm(orders) => start(&orders, given(&orders, fds)?),
    }
}

/// Follows the orders until the VMM's program runs.
fn start(orders: &Orders, given: Given) -> Result<Done, Failure> {
    // First, so that all that follows is charged to the sandbox. `0` means the writer itself.
    rustix::io::write(&given.door, b"0").map_err(failed("enter the cgroup"))?;
    setsid().map_err(failed("leave the agent's session"))?;
    if orders.own_cores {
        match sys::share_no_core() {
            // No core of this machine has two threads.
            Ok(()) | Err(Errno::NODEV) => {}
            Err(errno) => return Err(failed("have cores of its own")(errno)),
        }
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let proc = rustix::fs::open("/proc", flags, Mode::empty()).map_err(failed("open /proc"))?;
    leave_namespaces(&given.room)?;

    let (mut told, tell) = std::io::pipe().map_err(failed_io("make a pipe"))?;
    // The other end is the VMM's sign that this process lives, until the kernel's death signal is.
    let (watch, lifeline) = std::io::pipe().map_err(failed_io("make a pipe"))?;
    let Some(vmm) = sys::fork().map_err(failed("fork"))? else {
        drop((told, lifeline));
        child::become_vmm(orders, given, &proc, child::Ends { shim: watch, tell });
        return Ok(Done::Child);
    };
    drop((tell, watch));
    wait_for_exec(&mut told)?;
    drop(lifeline);
    let instance = |pid| Instance::now(&proc, pid).map_err(failed_io("look at processes"));
    let pids = Pids { shim: instance(getpid())?, vmm: instance(vmm)? };
    pids.write(&given.pids).map_err(failed_io("tell the run folder"))?;
    Ok(Done::Vmm(Started { vmm, exit: given.exit, identity: orders.identity }))
}

/// Into namespaces of this sandbox alone, with nothing in them. The pid namespace begins with the
/// next child.
fn leave_namespaces(room: &OwnedFd) -> Result<(), Failure> {
    move_into_link_name_space(room.as_fd(), Some(LinkNameSpaceType::Mount))
        .map_err(failed("enter the empty room"))?;
    let all = UnshareFlags::NEWNS
        | UnshareFlags::NEWPID
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    sys::unshare(all).map_err(failed("make namespaces"))?;
    rustix::system::sethostname(HOST_NAME).map_err(failed("forget the host's name"))
}

/// The pipe ends without a word when the child's program runs.
fn wait_for_exec(told: &mut impl Read) -> Result<(), Failure> {
    let mut bytes = Vec::new();
    told.read_to_end(&mut bytes).map_err(failed_io("read a pipe"))?;
    Failure::from_bytes(&bytes).map_or(Ok(()), Err)
}

/// Waits for the VMM's end and records it.
fn see_out(started: &Started) -> ExitCode {
    if drop_rights(started.identity).is_err() {
        // Nothing is run with rights it should not have.
        let _ = kill_process(started.vmm, Signal::KILL);
    }
    sys::let_go_of_code();
    let recorded = sys::wait_for(started.vmm)
        .map_err(std::io::Error::from)
        .and_then(|status| write_exit(&started.exit, status));
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

/// The agent's one message.
fn receive(agent: &OwnedFd) -> Result<(Task, Vec<OwnedFd>), Failure> {
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
    Ok((Task::from_text(text).ok_or_else(misread)?, fds))
}

fn given(orders: &Orders, fds: Vec<OwnedFd>) -> Result<Given, Failure> {
    let mut fds = fds.into_iter();
    let mut next = || fds.next().ok_or_else(misread);
    let (program, room, door) = (next()?, next()?, next()?);
    let (pids, exit, config) = (next()?, next()?, next()?);
    let handed: Vec<_> = fds.collect();
    if handed.len() != orders.numbers.len() {
        return Err(misread());
    }
    Ok(Given { program, room, door, pids, exit, config, handed })
}

fn answer(agent: &OwnedFd, answer: &orders::Answer, fd: Option<&OwnedFd>) -> Result<(), Errno> {
    let bytes = answer_to_bytes(answer);
    let fds: Vec<_> = fd.into_iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    }
    sendmsg(agent, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL).map(drop)
}

//! The nursery: the one process of this program that the agent starts. It makes the empty room
//! around itself and forks a shim for each VMM.
//!
//! A shim begun by the agent itself would cost more the more sandboxes there are: what starts a
//! program copies the agent's table of descriptors, which has several for each of them, and closes
//! them one by one. The nursery has a handful, and its shims need no exec.

use std::{
    ffi::CStr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    process::ExitCode,
};

use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    thread::set_name,
};

use super::{
    FIRST_FD, get_ready, orders,
    orders::{Answer, Failure, REQUEST, REQUEST_FDS, answer_to_bytes, failed},
    room, see_out, start, sys,
};
use crate::messages::{receive, send};

/// Names of the processes, in 15 bytes.
const NURSERY: &CStr = c"shim-nursery";
const WAITING: &CStr = c"shim-waiting";
const SHIM: &CStr = c"holdfast-shim";

/// What every shim begins with.
pub(super) struct Home {
    /// `/proc` of the host, which no path in the room leads to.
    pub(super) proc: OwnedFd,
}

/// Runs the program to its end: as the nursery, and in each child of it as a shim.
pub(super) fn run() -> ExitCode {
    let Some(agent) = sys::claim_stdin() else { return ExitCode::FAILURE };
    let made = settle();
    let told = answer(&agent, &made.as_ref().map(drop).map_err(Clone::clone), &[]);
    match (made, told) {
        (Ok(home), Ok(())) => serve(agent, home),
        _ => ExitCode::FAILURE,
    }
}

fn settle() -> Result<Home, Failure> {
    sys::close_from(FIRST_FD).map_err(failed("close what was inherited"))?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let proc = rustix::fs::open("/proc", flags, Mode::empty()).map_err(failed("open /proc"))?;
    room::build()?;
    // So that who looks for what a sandbox has left sees this one for what it is.
    set_name(NURSERY).map_err(failed("take its name"))?;
    // Nobody waits for a shim: its end is seen by its handle, and told by its record.
    sys::reap_children_unseen(true).map_err(failed("let its children go unseen"))?;
    Ok(Home { proc })
}

/// Forks a shim for every request, until the agent is gone.
fn serve(agent: OwnedFd, home: Home) -> ExitCode {
    loop {
        let socket = match request(&agent) {
            Ok(Some(socket)) => socket,
            Ok(None) => return ExitCode::SUCCESS,
            // The request's descriptors are closed: whoever waits for that shim hears of it.
            Err(Errno::BADMSG) => continue,
            // It would be the same again. The agent starts another nursery.
            Err(_) => return ExitCode::FAILURE,
        };
        match sys::fork() {
            Ok(None) => {
                // Its number is that of standard input, which is /dev/null for a VMM.
                std::mem::forget(agent);
                return be_shim(socket, home);
            }
            Ok(Some(_)) => {}
            Err(errno) => {
                // If nobody listens there is nobody to tell.
                let _ = answer(&socket, &Err(failed("fork")(errno)), &[]);
            }
        }
    }
}

/// `None`: the agent is gone.
fn request(agent: &OwnedFd) -> Result<Option<OwnedFd>, Errno> {
    let (text, fds) = receive(agent, REQUEST.len(), REQUEST_FDS)?;
    if text.is_empty() && fds.is_empty() {
        return Ok(None);
    }
    match <[OwnedFd; REQUEST_FDS]>::try_from(fds) {
        Ok([socket]) if text == REQUEST => Ok(Some(socket)),
        _ => Err(Errno::BADMSG),
    }
}

fn be_shim(agent: OwnedFd, home: Home) -> ExitCode {
    let settled = set_name(WAITING)
        .and_then(|()| sys::place(std::io::stdout().as_fd(), 0))
        .and_then(|()| sys::reap_children_unseen(false))
        .map_err(failed("begin"))
        .and_then(|()| get_ready());
    if answer(&agent, &settled, &[]).is_err() || settled.is_err() {
        return ExitCode::FAILURE;
    }
    let started = match orders(&agent) {
        Ok(Some(orders)) => {
            set_name(SHIM).map_err(failed("take its name")).and_then(|()| start(orders, &home))
        }
        Ok(None) => return ExitCode::SUCCESS,
        Err(failure) => Err(failure),
    };
    match started {
        Ok(Some(started)) => {
            let handles = [started.own_handle.as_fd(), started.handle.as_fd()];
            // Nobody is told of this VMM: nobody would ever end it.
            if answer(&agent, &Ok(()), &handles).is_err() {
                started.kill();
            }
            drop((agent, home));
            see_out(started)
        }
        // This is the child, which could not become a VMM and has told.
        Ok(None) => ExitCode::FAILURE,
        Err(failure) => {
            // If the agent is gone there is nobody to tell.
            let _ = answer(&agent, &Err(failure), &[]);
            ExitCode::FAILURE
        }
    }
}

fn answer(socket: &OwnedFd, answer: &Answer, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    send(socket, &answer_to_bytes(answer), fds)
}

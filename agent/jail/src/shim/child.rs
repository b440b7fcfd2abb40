//! What the shim's child does until it is the VMM.

use std::{
    ffi::CString,
    io::{PipeReader, PipeWriter, Write},
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, fcntl_dupfd_cloexec},
    process::{Signal, set_parent_process_death_signal, setsid},
};

use super::{
    FIRST_FD, Given, landlock,
    orders::{Failure, Orders, failed},
    rights, sys,
};
use crate::process::CONFIG_FD;

/// The child's ends of its pipes with the shim.
pub(super) struct Ends {
    /// Hung up once the shim is gone.
    pub(super) shim: PipeReader,
    /// Takes the failure, if there is one; exec closes it.
    pub(super) tell: PipeWriter,
}

/// Becomes the VMM, or tells why not.
pub(super) fn become_vmm(orders: &Orders, given: Given, proc: &OwnedFd, mut ends: Ends) {
    let failure = match prepare(orders, given, proc, &mut ends) {
        Ok(program) => execute(orders, &program),
        Err(failure) => failure,
    };
    // A shim that is gone needs no telling.
    let _ = ends.tell.write_all(&failure.to_bytes());
}

/// Returns only if it fails.
fn execute(orders: &Orders, program: &OwnedFd) -> Failure {
    let arguments: Result<Vec<_>, _> =
        orders.arguments.iter().map(|argument| CString::new(argument.as_str())).collect();
    let errno = match arguments {
        Ok(arguments) => sys::exec(program.as_fd(), &arguments),
        Err(_) => Errno::INVAL,
    };
    failed("execute the program")(errno)
}

/// All but the exec. Gives the program.
fn prepare(
    orders: &Orders,
    given: Given,
    proc: &OwnedFd,
    ends: &mut Ends,
) -> Result<OwnedFd, Failure> {
    setsid().map_err(failed("lead a session"))?;
    rights::be_ordinary_to_the_oom_killer(proc)
        .map_err(failed("set its place for the OOM killer"))?;
    rights::become_user(orders.identity).map_err(failed("become another user"))?;
    rights::enter_user_namespace(proc, orders.identity)
        .map_err(failed("enter a user namespace"))?;
    // Those in the new namespace, which has given all of them.
    sys::empty_bounding_set().map_err(failed("empty its bounding set"))?;
    rights::drop_capabilities().map_err(failed("drop its capabilities"))?;
    landlock::only_execute(given.program.as_fd()).map_err(failed("forbid itself all files"))?;
    let program = hand_over(orders, given, ends)?;
    rights::limit(orders.limits).map_err(failed("limit itself"))?;
    // After the change of user, which forgets it.
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(failed("die with the shim"))?;
    if hung_up(&ends.shim) {
        return Err(failed("outlive the shim")(Errno::SRCH));
    }
    Ok(program)
}

/// Puts every descriptor at the number that the VMM knows it by; the rest goes with exec. Gives the
/// program, and leaves `ends` at numbers that are not in the way.
fn hand_over(orders: &Orders, given: Given, ends: &mut Ends) -> Result<OwnedFd, Failure> {
    let step = "hand descriptors over";
    let mut placed: Vec<(OwnedFd, RawFd)> = vec![(given.config, CONFIG_FD)];
    placed.extend(given.handed.into_iter().zip(orders.numbers.iter().copied()));
    let own = [given.program.as_raw_fd(), ends.shim.as_raw_fd(), ends.tell.as_raw_fd()];
    let used =
        own.into_iter().chain(placed.iter().flat_map(|(fd, number)| [fd.as_raw_fd(), *number]));
    let above = used.max().unwrap_or(FIRST_FD) + 1;
    // Two steps, for what is at a number may be needed at another.
    let moved = |fd: &dyn AsFd| fcntl_dupfd_cloexec(fd.as_fd(), above).map_err(failed(step));
    let program = moved(&given.program)?;
    *ends = Ends { shim: moved(&ends.shim)?.into(), tell: moved(&ends.tell)?.into() };
    let mut ready = Vec::with_capacity(placed.len());
    for (fd, number) in &placed {
        ready.push((moved(fd)?, *number));
    }
    // Closed before their numbers are given to others, lest their drop close those.
    drop((placed, given.program, given.door, given.pids, given.exit, given.log));
    sys::close_on_exec_from(FIRST_FD).map_err(failed(step))?;
    for (fd, number) in &ready {
        sys::place(fd.as_fd(), *number).map_err(failed(step))?;
    }
    Ok(program)
}

fn hung_up(shim: &PipeReader) -> bool {
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut looked = [PollFd::new(shim, PollFlags::empty())];
    // An error would leave us not knowing.
    poll(&mut looked, Some(&at_once)).map_or(true, |_| !looked[0].revents().is_empty())
}

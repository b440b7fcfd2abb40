//! The call Exec: starts a command, carries its streams, and tells how it ended.
//!
//! When the command itself ends, its children in the background live on, as in any container. Those
//! that hold its stdout or stderr open delay the answer by 200 ms at most; everything the command
//! wrote before it ended is delivered, however slow the host. A time-out, and the loss of a
//! connection where the exec is not kept, kill the children too.

use std::{
    os::fd::{AsFd, BorrowedFd},
    time::{Duration, Instant},
};

use holdfast_wire::guest::{Exec, Exited};

use crate::{
    command::{Overrides, Prepared, words},
    exchange::{Exchange, Running},
    failure::from_io,
    guest::Guest,
    link::Link,
    process::{NotStarted, Patience, Process, Stdio, pipe_for},
    workload::Workload,
};

/// Runs the command and sends everything up to the last answer.
pub(crate) fn run(guest: &Guest, exec: &Exec, link: Link) {
    let begun = || {
        let workload = guest.workload()?;
        let seat = exec.keep.as_ref().map(|keep| guest.keeper.seat(keep)).transpose()?.flatten();
        Ok::<_, NotStarted>((begin(&workload, exec, link.as_fd())?, seat))
    };
    let (running, seat) = match begun() {
        Ok(begun) => begun,
        Err(NotStarted::Refused(refused)) => return link.refuse(refused),
        // A time-out is one however far the command had come.
        Err(NotStarted::Late) => return link.end(Exited::TimedOut),
    };
    // A pipe that cannot be set up ends the command, and the closed connection says so.
    if let Ok(exchange) = Exchange::new(running, link, seat) {
        exchange.run();
    }
}

fn begin(workload: &Workload, exec: &Exec, peer: BorrowedFd<'_>) -> Result<Running, NotStarted> {
    let deadline =
        exec.timeout_ms.and_then(|limit| Instant::now().checked_add(Duration::from_millis(limit)));
    let cgroup = workload
        .cgroups()
        .for_exec()
        .map_err(|error| from_io("cannot make a cgroup for the command", &error))?;
    let inside = workload.enter()?;
    let overrides =
        Overrides { env: &exec.env, cwd: exec.cwd.as_deref(), user: exec.user.as_deref() };
    let prepared = Prepared::new(&words(&exec.command, workload), overrides, workload, &inside)?;
    let (uid, gid) = (prepared.user.uid, prepared.user.gid);
    let stdin = if exec.stdin { Some(pipe_for(uid, gid)?) } else { None };
    let (stdout, stdout_end) = pipe_for(uid, gid)?;
    let (stderr, stderr_end) = pipe_for(uid, gid)?;
    let stdio = Stdio {
        stdin: stdin.as_ref().map_or(workload.null(), |(end, _)| end.as_fd()),
        stdout: stdout_end.as_fd(),
        stderr: stderr_end.as_fd(),
    };
    let patience = Patience { deadline, peer: Some(peer) };
    let process = Process::start(workload, &prepared, &stdio, cgroup, patience, &inside)?;
    // The child's ends must be its alone, or their closing is never seen: they go with this frame.
    let stdin = stdin.map(|(_, writer)| writer);
    Ok(Running { process, deadline, stdin, stdout, stderr })
}

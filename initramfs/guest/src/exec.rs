//! The call Exec: starts a command, carries its streams, and tells how it ended.
//!
//! When the command itself ends, its children in the background live on, as in any container. Those
//! that hold its stdout or stderr open delay the answer by 200 ms at most; everything the command
//! wrote before it ended is delivered, however slow the host. A time-out and a lost connection kill
//! the children too.

use std::{
    os::fd::AsFd,
    time::{Duration, Instant},
};

use holdfast_wire::guest::{Exec, Exited, Failure};

use crate::{
    command::{Overrides, Prepared, words},
    connection::Connection,
    exchange::Exchange,
    failure::{from_errno, from_io},
    process::{Patience, Process, Stdio, pipe_for},
    workload::Workload,
};

/// Runs the command and sends everything up to the last answer. An error is the answer still to be
/// sent; `Ok` with the connection lost is possible and means that nobody listens any more.
pub(crate) fn run(
    workload: &Workload,
    exec: &Exec,
    connection: &mut Connection,
) -> Result<Option<Exited>, Failure> {
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
    let patience = Patience { deadline, peer: Some(connection.as_fd()) };
    let process = Process::start(workload, &prepared, &stdio, cgroup, patience, &inside)?;
    // The child's ends must be its alone, or their closing is never seen.
    let stdin = stdin.map(|(_, writer)| writer);
    drop((stdout_end, stderr_end));
    let streams = [Some(stdout), Some(stderr)];
    let exchange = Exchange::new(connection, process, deadline, stdin, streams)
        .map_err(|error| from_errno("cannot carry the command's streams", error))?;
    exchange.run()
}

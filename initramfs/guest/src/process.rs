//! One process of the workload, from its start to its end, with a cgroup of its own.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::Instant,
};

use holdfast_wire::guest::{Exited, Failure, FailureKind};
use rustix::{
    event::{PollFd, PollFlags},
    fs::{Gid, Uid},
    io::Errno,
    pipe::{PipeFlags, pipe_with},
    process::Pid,
};

use crate::{
    cgroup::Cgroup,
    children::Children,
    clock::poll_until,
    command::Prepared,
    failure::{failure, from_errno, from_io},
    program::exec_failure,
    sys,
    workload::{Inside, Workload},
};

/// A started process. Dropped while it runs, it is killed with all its children.
#[derive(Debug)]
pub(crate) struct Process {
    child: sys::Child,
    cgroup: Cgroup,
    children: Arc<Children>,
    ended: Option<Exited>,
    /// As the sandbox sees it.
    pub inner_pid: u32,
}

/// The child's ends of its standard streams.
#[derive(Debug)]
pub(crate) struct Stdio<'a> {
    pub stdin: BorrowedFd<'a>,
    pub stdout: BorrowedFd<'a>,
    pub stderr: BorrowedFd<'a>,
}

/// When to stop waiting for a program to be loaded: a hostile file system can make that for ever.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Patience<'a> {
    pub deadline: Option<Instant>,
    /// Stop when this connection's other end is closed.
    pub peer: Option<BorrowedFd<'a>>,
}

/// Why there is no process.
#[derive(Debug)]
pub(crate) enum NotStarted {
    Refused(Failure),
    /// The deadline came first.
    Late,
}

impl From<Failure> for NotStarted {
    fn from(refused: Failure) -> Self {
        Self::Refused(refused)
    }
}

impl NotStarted {
    /// For whoever sets a deadline of its own.
    pub(crate) fn into_failure(self, name: &str) -> Failure {
        match self {
            Self::Refused(refused) => refused,
            Self::Late => not_loaded(name),
        }
    }
}

fn not_loaded(name: &str) -> Failure {
    failure(FailureKind::Exhausted, format!("{name:?} was not loaded in time"))
}

impl Process {
    pub(crate) fn start(
        workload: &Workload,
        prepared: &Prepared,
        stdio: &Stdio<'_>,
        cgroup: Cgroup,
        patience: Patience<'_>,
        _inside: &Inside,
    ) -> Result<Self, NotStarted> {
        let (told, report) = pipe_with(PipeFlags::CLOEXEC)
            .map_err(|error| from_errno("cannot make a pipe", error))?;
        let image = sys::Image {
            program: &prepared.program,
            argv: &prepared.argv,
            env: &prepared.env,
            stdin: stdio.stdin,
            stdout: stdio.stdout,
            stderr: stdio.stderr,
            holder: workload.holder(),
            uid: prepared.user.uid,
            gid: prepared.user.gid,
            groups: &prepared.user.groups,
        };
        let children = Arc::clone(&workload.children);
        let child = children
            .make(|| sys::spawn(&image, cgroup.as_fd(), report.as_fd()))
            .map_err(|error| from_io(format_args!("cannot start {:?}", prepared.name), &error))?;
        drop(report);
        // From here on dropping kills and reaps.
        let mut process = Self { child, cgroup, children, ended: None, inner_pid: 0 };
        process.inner_pid = read_report(&told, &prepared.name, patience)?;
        Ok(process)
    }

    /// Readable once the process has ended.
    pub(crate) fn pidfd(&self) -> BorrowedFd<'_> {
        self.child.pidfd.as_fd()
    }

    /// As PID 1 sees it.
    pub(crate) fn leader(&self) -> Pid {
        self.child.pid
    }

    /// To the process group, which is the process's own.
    pub(crate) fn signal(&self, signal: i32) -> std::io::Result<()> {
        match self.ended {
            // Its number may be another's by now.
            Some(_) => Ok(()),
            None => sys::signal_group(self.child.pid, signal),
        }
    }

    /// Kills it and all its children, whatever groups and sessions they made.
    pub(crate) fn kill(&self) -> std::io::Result<()> {
        self.cgroup.kill()
    }

    /// Waits for the end. Children it left in the background live on.
    pub(crate) fn wait(&mut self) -> std::io::Result<Exited> {
        if let Some(exited) = self.ended {
            return Ok(exited);
        }
        let exited = self.children.wait(&self.child)?;
        self.ended = Some(exited);
        Ok(exited)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.ended.is_none() {
            // Should the cgroup be gone the group's signal still reaches the process itself.
            let killed = self.cgroup.kill();
            if killed.is_err() {
                let _ = sys::signal_group(self.child.pid, libc::SIGKILL);
            }
            let _ = self.wait();
        }
    }
}

/// A pipe whose ends the user may open again by way of `/dev/stdout`.
pub(crate) fn pipe_for(uid: u32, gid: u32) -> Result<(OwnedFd, OwnedFd), Failure> {
    let fail = |error| from_errno("cannot make a pipe", error);
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).map_err(fail)?;
    if (uid, gid) != (0, 0) {
        let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        rustix::fs::fchown(&writer, uid, gid).map_err(fail)?;
    }
    Ok((reader, writer))
}

/// Reads what the child says before it becomes the program: its pid, then, if it could not, why.
fn read_report(told: &OwnedFd, name: &str, patience: Patience<'_>) -> Result<u32, NotStarted> {
    let lost = || failure(FailureKind::Internal, format!("{name:?} ended before it ran"));
    let mut words = Vec::with_capacity(2);
    loop {
        await_report(told, name, patience)?;
        let mut word = [0; sys::REPORT_BYTES];
        match rustix::io::read(told, &mut word) {
            Ok(sys::REPORT_BYTES) if words.len() < 2 => words.push(i32::from_ne_bytes(word)),
            Ok(0) => break,
            Err(Errno::INTR) => {}
            _ => return Err(lost().into()),
        }
    }
    match words.as_slice() {
        [pid] => Ok(u32::try_from(*pid).map_err(|_| lost())?),
        [_, error] => Err(exec_failure(name, Errno::from_raw_os_error(*error)).into()),
        _ => Err(lost().into()),
    }
}

fn await_report(told: &OwnedFd, name: &str, patience: Patience<'_>) -> Result<(), NotStarted> {
    let hung_up = PollFlags::RDHUP;
    let mut fds = vec![PollFd::new(told, PollFlags::IN)];
    fds.extend(patience.peer.map(|peer| PollFd::from_borrowed_fd(peer, hung_up)));
    loop {
        poll_until(&mut fds, patience.deadline)
            .map_err(|error| from_errno("cannot wait for a program to start", error))?;
        if !fds[0].revents().is_empty() {
            return Ok(());
        }
        let peer_gone = fds.get(1).is_some_and(|peer| !peer.revents().is_empty());
        let late = patience.deadline.is_some_and(|deadline| Instant::now() >= deadline);
        if peer_gone {
            return Err(not_loaded(name).into());
        }
        if late {
            return Err(NotStarted::Late);
        }
    }
}

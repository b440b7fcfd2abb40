//! The image's own program, started with the sandbox: its output goes into a bounded log, its end
//! is remembered.

use std::{
    collections::VecDeque,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use holdfast_wire::guest::{Exited, Failure, FailureKind};
use rustix::{
    event::{PollFd, PollFlags},
    io::Errno,
};

use crate::{
    clock::poll_until,
    command::{Overrides, Prepared},
    failure::{failure, from_io},
    process::{Patience, Process, Stdio, pipe_for},
    rpc::THREAD_STACK_BYTES,
    sys,
    workload::Workload,
};

/// Last bytes kept of what the entrypoint wrote: what a person reads to learn why it failed.
const LOG_BYTES_MAX: usize = 256 * 1024;

/// Longest time its program may take to be loaded.
const LOAD_MAX: Duration = Duration::from_secs(30);

/// Name of its cgroup below the workload's.
pub(crate) const ENTRYPOINT_CGROUP: &str = "main";

const READ_BYTES: usize = 16 * 1024;

#[derive(Debug)]
pub struct Entrypoint {
    leader: rustix::process::Pid,
    log: Mutex<Log>,
    exited: Mutex<Option<Exited>>,
}

/// The last bytes of a stream.
#[derive(Debug, Default)]
struct Log(VecDeque<u8>);

impl Log {
    fn push(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
        let surplus = self.0.len().saturating_sub(LOG_BYTES_MAX);
        self.0.drain(..surplus);
    }
}

impl Entrypoint {
    /// Starts `argv` in the workload. Returns once the program runs.
    pub fn start(workload: &Arc<Workload>, argv: Vec<String>) -> Result<Arc<Self>, Failure> {
        let (answer, started) = mpsc::sync_channel(1);
        let of_thread = Arc::clone(workload);
        thread::Builder::new()
            .name("entrypoint".to_owned())
            .stack_size(THREAD_STACK_BYTES)
            .spawn(move || match begin(&of_thread, &argv) {
                Ok((process, output)) => {
                    let entrypoint = Arc::new(Self {
                        leader: process.leader(),
                        log: Mutex::default(),
                        exited: Mutex::new(None),
                    });
                    // Whoever asked has a thread that waits for exactly this.
                    let _ = answer.send(Ok(Arc::clone(&entrypoint)));
                    entrypoint.follow(process, output);
                }
                Err(refused) => {
                    let _ = answer.send(Err(refused));
                }
            })
            .map_err(|error| from_io("cannot start a thread for the entrypoint", &error))?;
        let lost = |_| failure(FailureKind::Internal, "the entrypoint's thread ended");
        started.recv().map_err(lost)?
    }

    /// `None`: it runs.
    pub fn exited(&self) -> Option<Exited> {
        *self.exited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn log(&self) -> Vec<u8> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).0.iter().copied().collect()
    }

    /// To the program itself, not to its children, while it runs: stopping them is its own affair.
    pub fn signal(&self, signal: i32) {
        // Held, so that it is not reaped, and its number not given away, in between.
        let exited = self.exited.lock().unwrap_or_else(PoisonError::into_inner);
        if exited.is_none() {
            let _ = sys::signal_process(self.leader, signal);
        }
    }

    /// Reads its output until nobody can write any more, and notes its end when that comes.
    fn follow(&self, mut process: Process, output: OwnedFd) {
        let mut output = Some(output);
        while output.is_some() || self.exited().is_none() {
            let running = self.exited().is_none();
            let mut fds = Vec::with_capacity(2);
            fds.extend(output.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
            if running {
                fds.push(PollFd::from_borrowed_fd(process.pidfd(), PollFlags::IN));
            }
            if poll_until(&mut fds, None).is_err() {
                return;
            }
            let ended = running && fds.last().is_some_and(|fd| !fd.revents().is_empty());
            let readable = output.is_some() && !fds[0].revents().is_empty();
            if readable {
                self.read(&mut output);
            }
            if ended {
                let mut exited = self.exited.lock().unwrap_or_else(PoisonError::into_inner);
                *exited = process.wait().ok();
                if exited.is_none() {
                    return;
                }
            }
        }
    }

    fn read(&self, output: &mut Option<OwnedFd>) {
        let Some(fd) = output else { return };
        let mut bytes = [0; READ_BYTES];
        match rustix::io::read(&*fd, &mut bytes) {
            Ok(0) => *output = None,
            Ok(count) => {
                self.log.lock().unwrap_or_else(PoisonError::into_inner).push(&bytes[..count]);
            }
            Err(Errno::INTR) => {}
            Err(_) => *output = None,
        }
    }
}

fn begin(workload: &Arc<Workload>, argv: &[String]) -> Result<(Process, OwnedFd), Failure> {
    let cgroup = workload
        .cgroups()
        .named(ENTRYPOINT_CGROUP)
        .map_err(|error| from_io("cannot make the entrypoint's cgroup", &error))?;
    let inside = workload.enter()?;
    let prepared = Prepared::new(argv, Overrides::default(), workload, &inside)?;
    let (output, end) = pipe_for(prepared.user.uid, prepared.user.gid)?;
    // One pipe for both streams keeps their order.
    let stdio = Stdio { stdin: workload.null(), stdout: end.as_fd(), stderr: end.as_fd() };
    let patience = Patience { deadline: Some(Instant::now() + LOAD_MAX), peer: None };
    let process = Process::start(workload, &prepared, &stdio, cgroup, patience, &inside)
        .map_err(|why| why.into_failure(&prepared.name))?;
    Ok((process, output))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_keeps_the_last_bytes_and_no_more() {
        let mut log = Log::default();
        log.push(&vec![b'a'; LOG_BYTES_MAX]);
        log.push(b"end");
        assert_eq!(log.0.len(), LOG_BYTES_MAX);
        assert!(log.0.iter().copied().skip(LOG_BYTES_MAX - 4).eq(*b"aend"));
    }
}

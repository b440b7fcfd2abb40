//! Serves the queue of one disk. File I/O blocks this thread and no other.

use std::sync::{Arc, atomic::Ordering};

use super::{
    backing::Backing,
    counters::DiskCounters,
    request::{Failure, Moved, Request, STATUS_OK},
    state::State,
};
use crate::{
    devices::{
        chain::Chain,
        queue::{Broken, Progress, Ring},
        runner::Worker,
    },
    seccomp::ThreadKind,
    vm::Memory,
};

/// Requests handled in one go: few, since each may wait for the host's disk.
const BATCH: usize = 8;
/// Errors of the host that go to the log; a disk that is full says so on every write.
const ERRORS_LOGGED_MAX: u64 = 16;

pub(super) struct DiskWorker {
    backing: Backing,
    state: State,
    counters: Arc<DiskCounters>,
    errors_logged: u64,
}

impl DiskWorker {
    pub(super) fn new(backing: Backing, state: State, counters: Arc<DiskCounters>) -> Self {
        Self { backing, state, counters, errors_logged: 0 }
    }

    /// Answers one request. Returns the bytes written to its buffers.
    fn answer(&mut self, chain: Chain<'_>) -> Result<usize, Broken> {
        let mut request = Request::read(chain)?;
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        match request.carry_out(&self.backing, &self.state) {
            Ok(Moved { read, written }) => {
                self.counters.read_bytes.fetch_add(read as u64, Ordering::Relaxed);
                self.counters.written_bytes.fetch_add(written as u64, Ordering::Relaxed);
                Ok(read + request.status.write(&[STATUS_OK]))
            }
            Err(failure) => {
                self.counters.errors.fetch_add(1, Ordering::Relaxed);
                self.log(&failure);
                Ok(request.status.write(&[failure.status()]))
            }
        }
    }

    fn log(&mut self, failure: &Failure) {
        if let Failure::Host(error) = failure
            && self.errors_logged < ERRORS_LOGGED_MAX
        {
            self.errors_logged += 1;
            log::warn!(disk:% = self.state.name, error:%; "disk request failed");
        }
    }
}

impl Worker for DiskWorker {
    fn thread_kind(&self) -> ThreadKind {
        ThreadKind::Disk
    }

    fn work(&mut self, rings: &mut [Ring], memory: &Memory) -> Result<Progress, Broken> {
        let [requests] = rings else { return Ok(Progress::Idle) };
        requests.serve(memory, BATCH, |chain| self.answer(chain))
    }
}

//! Serves the queue of one disk. File I/O blocks this thread and no other.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

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
        rate::Throttle,
        runner::Worker,
        saved::{Differs, WorkerState},
    },
    limits::blk::{BATCH, ERRORS_LOGGED_MAX},
    seccomp::ThreadKind,
    vm::Memory,
};

pub(super) struct DiskWorker {
    requests: Requests,
    throttle: Throttle,
}

impl DiskWorker {
    pub(super) fn new(
        backing: Backing,
        state: State,
        counters: Arc<DiskCounters>,
        throttle: Throttle,
    ) -> Self {
        Self { requests: Requests { backing, state, counters, errors_logged: 0 }, throttle }
    }
}

/// What answers requests.
struct Requests {
    backing: Backing,
    state: State,
    counters: Arc<DiskCounters>,
    errors_logged: u64,
}

impl Requests {
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

    fn work(
        &mut self,
        rings: &mut [Ring],
        memory: &Memory,
        now: Instant,
    ) -> Result<Progress, Broken> {
        let [queue] = rings else { return Ok(Progress::Idle) };
        let Self { requests, throttle } = self;
        queue.serve(memory, BATCH, throttle, now, |chain| requests.answer(chain))
    }

    fn save(&self) -> WorkerState {
        WorkerState::Disk(self.requests.state.clone())
    }

    fn restore(&mut self, state: WorkerState) -> Result<(), Differs> {
        let same = state == self.save();
        if same { Ok(()) } else { Err(Differs::new(&state, &self.save())) }
    }
}

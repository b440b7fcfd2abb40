//! Serves the queue of one disk. File I/O blocks this thread and no other.
//!
//! Reads of what the host has to read itself wait side by side: each is asked for without waiting
//! first, which has the kernel begin, and only when nothing else is to be done is the first of them
//! waited for. Requests may be answered in any order (virtio 1.2, 5.2.6: a driver that wants one
//! waits for the other's end).

use std::{
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use super::{
    backing::Backing,
    counters::DiskCounters,
    request::{Begun, Failure, Moved, Request, STATUS_OK},
    state::State,
};
use crate::{
    devices::{
        queue::{Broken, Progress, Ring},
        rate::Throttle,
        runner::Worker,
        saved::{Differs, WorkerState},
    },
    limits::blk::{BATCH, ERRORS_LOGGED_MAX, READS_AT_ONCE_MAX, TRANSFER_BYTES_MAX},
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

/// A read that waits for the host's disk, by the head of its chain.
type Waiting<'m> = (u16, Request<'m>);

impl Requests {
    /// Does one request, or begins it. Returns the bytes written to its buffers; `None`: it waits.
    fn begin(&mut self, request: &mut Request<'_>) -> Option<usize> {
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        match request.begin(&self.backing, &self.state) {
            Ok(Begun::Waits) => None,
            Ok(Begun::Done(moved)) => Some(self.answer(request, Ok(moved))),
            Err(failure) => Some(self.answer(request, Err(failure))),
        }
    }

    /// Waits for one that began.
    fn finish(&mut self, request: &mut Request<'_>) -> usize {
        let outcome = request.finish(&self.backing);
        self.answer(request, outcome)
    }

    /// Returns the bytes written to its buffers.
    fn answer(&mut self, request: &mut Request<'_>, outcome: Result<Moved, Failure>) -> usize {
        match outcome {
            Ok(Moved { read, written }) => {
                self.counters.read_bytes.fetch_add(read as u64, Ordering::Relaxed);
                self.counters.written_bytes.fetch_add(written as u64, Ordering::Relaxed);
                read + request.status.write(&[STATUS_OK])
            }
            Err(failure) => {
                self.counters.errors.fetch_add(1, Ordering::Relaxed);
                self.log(&failure);
                request.status.write(&[failure.status()])
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

impl DiskWorker {
    /// Answers what need not wait for the host's disk, and begins what must.
    fn begin<'m>(
        &mut self,
        queue: &mut Ring,
        memory: &'m Memory,
        now: Instant,
        waiting: &mut Vec<Waiting<'m>>,
    ) -> Result<Progress, Broken> {
        queue.refuse_kicks(memory)?;
        let (mut answered, mut awaited_bytes) = (0, 0);
        // Each turn takes a request, or sees that one has just come.
        for _ in 0..BATCH + READS_AT_ONCE_MAX {
            let full = waiting.len() == READS_AT_ONCE_MAX || awaited_bytes >= TRANSFER_BYTES_MAX;
            if answered == BATCH || full {
                break;
            }
            if let Some(until) = self.throttle.held_until(now) {
                return Ok(Progress::At(until));
            }
            match queue.next(memory)? {
                Some(chain) => {
                    self.throttle.spend(chain.bytes());
                    let head = chain.head;
                    let mut request = Request::read(chain)?;
                    match self.requests.begin(&mut request) {
                        Some(written) => {
                            queue.give_back(memory, head, written)?;
                            answered += 1;
                        }
                        None => {
                            awaited_bytes += request.bytes_left();
                            waiting.push((head, request));
                        }
                    }
                }
                // It offers more as these come back, and need not kick for it.
                None if !waiting.is_empty() => return Ok(Progress::More),
                None if queue.ask_for_kick(memory)? => {}
                None => return Ok(Progress::Idle),
            }
        }
        Ok(Progress::More)
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
        let mut waiting = Vec::new();
        let progress = self.begin(queue, memory, now, &mut waiting);
        // Also those before a chain that stops the device.
        for (head, mut request) in waiting {
            let written = self.requests.finish(&mut request);
            queue.give_back(memory, head, written)?;
        }
        progress
    }

    fn save(&self) -> WorkerState {
        WorkerState::Disk(self.requests.state.clone())
    }

    fn restore(&mut self, state: WorkerState) -> Result<(), Differs> {
        let same = state == self.save();
        if same { Ok(()) } else { Err(Differs::new(&state, &self.save())) }
    }
}

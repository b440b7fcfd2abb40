//! Answers requests for entropy.

use std::time::Instant;

use super::state::State;
use crate::{
    devices::{
        chain::Chain,
        queue::{Broken, Progress, Ring},
        rate::Throttle,
        runner::Worker,
        saved::{Differs, WorkerState},
    },
    limits::rng::{BATCH, REQUEST_BYTES_MAX, STEP_BYTES},
    random,
    seccomp::ThreadKind,
    vm::Memory,
};

pub(super) struct RngWorker {
    state: State,
}

impl RngWorker {
    pub(super) fn new(state: State) -> Self {
        Self { state }
    }

    fn fill(&mut self, mut chain: Chain<'_>) -> Result<usize, Broken> {
        chain.only_writable()?;
        if chain.writable.is_empty() {
            return Err(Broken::TooShort { what: "random bytes", bytes: 0 });
        }
        let mut target = chain.writable.take(REQUEST_BYTES_MAX);
        let mut given = 0;
        while !target.is_empty() {
            let mut step = [0; STEP_BYTES];
            let wanted = target.len().min(STEP_BYTES);
            if let Err(error) = random::fill(&mut step[..wanted]) {
                // The driver sees a short answer and asks again.
                log::warn!(error:%; "no random bytes from the host");
                break;
            }
            given += target.write(&step[..wanted]);
        }
        self.state.bytes_given += given as u64;
        Ok(given)
    }
}

impl Worker for RngWorker {
    fn thread_kind(&self) -> ThreadKind {
        ThreadKind::Rng
    }

    fn work(
        &mut self,
        rings: &mut [Ring],
        memory: &Memory,
        now: Instant,
    ) -> Result<Progress, Broken> {
        let [requests] = rings else { return Ok(Progress::Idle) };
        requests.serve(memory, BATCH, &mut Throttle::default(), now, |chain| self.fill(chain))
    }

    fn save(&self) -> WorkerState {
        WorkerState::Rng(self.state)
    }

    fn restore(&mut self, state: WorkerState) -> Result<(), Differs> {
        let WorkerState::Rng(state) = state else { return Err(Differs::new(&state, &self.save())) };
        self.state = state;
        Ok(())
    }
}

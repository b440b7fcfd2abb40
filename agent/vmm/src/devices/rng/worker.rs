//! Answers requests for entropy.

use super::state::State;
use crate::{
    devices::{
        chain::Chain,
        queue::{Broken, Progress, Ring},
        runner::Worker,
    },
    random,
    seccomp::ThreadKind,
    vm::Memory,
};

/// Bytes given for one request; the rest of a longer buffer stays as it is. Linux asks for at most
/// one cache line or page at a time, and a driver that wants more asks again.
const REQUEST_BYTES_MAX: usize = 4096;
/// Requests handled in one go.
const BATCH: usize = 16;
/// Bytes fetched from the host at a time.
const STEP_BYTES: usize = 256;

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

    fn work(&mut self, rings: &mut [Ring], memory: &Memory) -> Result<Progress, Broken> {
        let [requests] = rings else { return Ok(Progress::Idle) };
        requests.serve(memory, BATCH, |chain| self.fill(chain))
    }
}

//! Gives pages back to the host as the guest names them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use super::{
    device::{ACTUAL_AT, TARGET_AT, state},
    pages::Pages,
    state::State,
};
use crate::{
    devices::{
        chain::Chain,
        configuration::Configuration,
        queue::{Broken, Places, Progress, Ring},
        rate::Throttle,
        runner::Worker,
        saved::{Differs, WorkerState},
    },
    limits::balloon::{BATCH, NAMED_MAX},
    seccomp::ThreadKind,
    vm::Memory,
};

const NAME_BYTES: usize = 4;

pub(super) struct BalloonWorker {
    configuration: Configuration,
    given_back_bytes: Arc<AtomicU64>,
}

impl BalloonWorker {
    pub(super) fn new(configuration: Configuration, given_back_bytes: Arc<AtomicU64>) -> Self {
        Self { configuration, given_back_bytes }
    }

    fn give_back(&self, pages: Pages, memory: &Memory) -> Result<(), Broken> {
        let bytes = pages.give_back(memory)?;
        self.given_back_bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Ranges of pages that are free now; the guest uses none of them before we answer.
    fn reports(&self, ring: &mut Ring, memory: &Memory) -> Result<Progress, Broken> {
        ring.refuse_kicks(memory)?;
        for _ in 0..BATCH {
            match ring.next_places(memory)? {
                Some(Places { head, writable }) => {
                    let mut pages = Pages::default();
                    writable.into_iter().for_each(|(at, bytes)| pages.add_range(at, bytes));
                    self.give_back(pages, memory)?;
                    ring.give_back(memory, head, 0)?;
                }
                None if ring.ask_for_kick(memory)? => {}
                None => return Ok(Progress::Idle),
            }
        }
        Ok(Progress::More)
    }
}

/// The pages a request names.
fn named(chain: Chain<'_>) -> Result<Pages, Broken> {
    chain.only_readable()?;
    let mut names = chain.readable;
    let bytes = names.len();
    if bytes > NAMED_MAX * NAME_BYTES {
        return Err(Broken::TooLong { what: "a list of pages", bytes });
    }
    let mut pages = Pages::default();
    while let Some(name) = names.read() {
        pages.add(u32::from_le_bytes(name).into());
    }
    Ok(pages)
}

impl Worker for BalloonWorker {
    fn thread_kind(&self) -> ThreadKind {
        ThreadKind::Balloon
    }

    fn work(
        &mut self,
        rings: &mut [Ring],
        memory: &Memory,
        now: Instant,
    ) -> Result<Progress, Broken> {
        let [inflate, deflate, reporting] = rings else { return Ok(Progress::Idle) };
        let free = &mut Throttle::default();
        let given = inflate.serve(memory, BATCH, free, now, |chain| {
            self.give_back(named(chain)?, memory).map(|()| 0)
        })?;
        // A page that is used again is there again; only the request must make sense.
        let taken = deflate.serve(memory, BATCH, free, now, |chain| named(chain).map(|_| 0))?;
        let reported = self.reports(reporting, memory)?;
        Ok(given.or(taken).or(reported))
    }

    fn reset(&mut self) {
        // The next driver begins without a balloon, and may use all pages again.
        self.configuration.set_number(ACTUAL_AT, 0);
    }

    fn save(&self) -> WorkerState {
        WorkerState::Balloon(state(&self.configuration))
    }

    fn restore(&mut self, state: WorkerState) -> Result<(), Differs> {
        let WorkerState::Balloon(State { target_pages, actual_pages }) = state else {
            return Err(Differs::new(&state, &self.save()));
        };
        self.configuration.set_number(TARGET_AT, target_pages);
        self.configuration.set_number(ACTUAL_AT, actual_pages);
        Ok(())
    }
}

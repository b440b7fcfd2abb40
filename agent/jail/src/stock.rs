//! Things made ahead, so that whoever needs one waits for nothing.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use log::warn;
use rustix::{process::setpriority_process, thread::gettid};

use crate::JailError;

/// After one could not be made.
const PAUSE: Duration = Duration::from_secs(5);

/// Whoever waits for a sandbox comes first, and what is made here is wanted at the next one only.
const NICENESS: i32 = 19;

/// A stock of things that are each used once.
#[derive(Debug)]
pub(crate) struct Stock<T> {
    shared: Arc<Shared<T>>,
    maker: Option<JoinHandle<()>>,
}

/// What a stock is kept of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    /// Of the thread, in 15 bytes; and in the log.
    pub(crate) name: &'static str,
    /// How many are kept.
    pub(crate) ready: usize,
    /// How long the place of one that was taken is left empty: what it was taken for comes first.
    pub(crate) delay: Duration,
}

#[derive(Debug)]
struct Shared<T> {
    shelf: Mutex<Shelf<T>>,
    changed: Condvar,
}

#[derive(Debug)]
struct Shelf<T> {
    things: VecDeque<T>,
    closed: bool,
}

impl<T> Shared<T> {
    fn shelf(&self) -> MutexGuard<'_, Shelf<T>> {
        // A thread that panicked left a queue that is whole.
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits so long, or less if the stock is closed. Whether it is.
    fn closed_within(&self, wait: Duration) -> bool {
        let open = |shelf: &mut Shelf<T>| !shelf.closed;
        let waited = self.changed.wait_timeout_while(self.shelf(), wait, open);
        waited.unwrap_or_else(PoisonError::into_inner).0.closed
    }
}

impl<T: Send + 'static> Stock<T> {
    /// Begins to make things on a thread of its own.
    pub(crate) fn start(
        plan: Plan,
        make: impl Fn() -> Result<T, JailError> + Send + 'static,
    ) -> Self {
        let shelf = Mutex::new(Shelf { things: VecDeque::new(), closed: false });
        let shared = Arc::new(Shared { shelf, changed: Condvar::new() });
        let theirs = Arc::clone(&shared);
        let maker = thread::Builder::new()
            .name(plan.name.to_owned())
            .spawn(move || keep_ready(&theirs, plan, &make))
            .inspect_err(
                |error| warn!(error:%, what = plan.name; "nothing is made ahead: no thread"),
            )
            .ok();
        Self { shared, maker }
    }

    /// One that is ready, if any is.
    pub(crate) fn take(&self) -> Option<T> {
        let thing = self.shared.shelf().things.pop_front();
        self.shared.changed.notify_all();
        thing
    }

    /// How many are ready.
    pub(crate) fn ready(&self) -> usize {
        self.shared.shelf().things.len()
    }
}

impl<T> Drop for Stock<T> {
    fn drop(&mut self) {
        self.shared.shelf().closed = true;
        self.shared.changed.notify_all();
        // It is in the making of one thing at most. One that panicked has said so.
        let _ = self.maker.take().map(JoinHandle::join);
    }
}

fn keep_ready<T>(shared: &Shared<T>, plan: Plan, make: &impl Fn() -> Result<T, JailError>) {
    if let Err(error) = setpriority_process(Some(gettid()), NICENESS) {
        warn!(error:%, what = plan.name; "made ahead at usual priority");
    }
    loop {
        let full = |shelf: &mut Shelf<T>| !shelf.closed && shelf.things.len() >= plan.ready;
        let waited = plan.delay > Duration::ZERO && shared.shelf().things.len() >= plan.ready;
        let shelf = shared.changed.wait_while(shared.shelf(), full);
        if shelf.unwrap_or_else(PoisonError::into_inner).closed
            || (waited && shared.closed_within(plan.delay))
        {
            return;
        }
        match make() {
            Ok(thing) => shared.shelf().things.push_back(thing),
            Err(error) => {
                // Whoever needs one makes it, and is told what is wrong.
                warn!(error:%, what = plan.name; "none made ahead");
                if shared.closed_within(PAUSE) {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        time::Instant,
    };

    use super::*;

    const PLAN: Plan = Plan { name: "test", ready: 3, delay: Duration::from_millis(50) };

    fn wait_until(check: impl Fn() -> bool) {
        let began = Instant::now();
        while !check() {
            assert!(began.elapsed() < Duration::from_secs(10), "it does not come about");
            thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn what_is_taken_is_made_again_each_thing_once() {
        let made = AtomicUsize::new(0);
        let stock = Stock::start(PLAN, move || Ok(made.fetch_add(1, Ordering::Relaxed)));
        for round in 0..5 {
            wait_until(|| stock.ready() == PLAN.ready);
            assert_eq!(stock.take(), Some(round));
        }
    }

    #[test]
    fn an_empty_stock_gives_nothing_and_goes_at_once() {
        let nothing = || Err(JailError::TooManyFds { fds: 0 });
        let stock = Stock::<()>::start(PLAN, nothing);
        assert_eq!(stock.take(), None);
        let began = Instant::now();
        drop(stock);
        assert!(began.elapsed() < PAUSE);
    }
}

//! Who uses a running sandbox, and for how long nobody has.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Uses of one sandbox: calls at work, streams that are open.
#[derive(Debug)]
pub(super) struct Activity(Mutex<Uses>);

#[derive(Debug)]
struct Uses {
    open: usize,
    /// When the last of them ended.
    ended: Instant,
}

/// One use, until it is dropped.
#[derive(Debug)]
pub(super) struct Busy(Arc<Activity>);

impl Activity {
    /// Used just now.
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(Uses { open: 0, ended: Instant::now() })))
    }

    pub(super) fn begin(self: &Arc<Self>) -> Busy {
        self.uses().open += 1;
        Busy(Arc::clone(self))
    }

    /// `None`: somebody uses it.
    pub(super) fn idle_for(&self) -> Option<Duration> {
        let uses = self.uses();
        (uses.open == 0).then(|| uses.ended.elapsed())
    }

    fn uses(&self) -> MutexGuard<'_, Uses> {
        // Two plain numbers, each changed in one step.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut uses = self.0.uses();
        uses.open -= 1;
        uses.ended = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_idle_from_the_end_of_the_last_use_on() {
        let activity = Activity::new();
        assert!(activity.idle_for().is_some());
        let (one, two) = (activity.begin(), activity.begin());
        drop(one);
        assert_eq!(activity.idle_for(), None);
        let before = Instant::now();
        drop(two);
        assert!(activity.idle_for().unwrap() <= before.elapsed());
    }
}

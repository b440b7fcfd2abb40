//! How often something may happen. The clock comes in as an argument.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// So many a period in the long run, and all of a period's at once after a rest.
#[derive(Debug, Default)]
pub(crate) struct Bucket {
    /// Taken out, in parts of one: what has flowed back since is counted when somebody looks.
    taken: f64,
    at: Option<Instant>,
}

impl Bucket {
    pub(crate) fn take(&mut self, per_period: u32, period: Duration, now: Instant) -> bool {
        let rate = f64::from(per_period);
        if let Some(at) = self.at.replace(now) {
            let passed = now.saturating_duration_since(at).as_secs_f64() / period.as_secs_f64();
            self.taken = (self.taken - passed * rate).max(0.0);
        }
        let fits = self.taken + 1.0 <= rate;
        if fits {
            self.taken += 1.0;
        }
        fits
    }
}

/// Different things in a window of time. Those of the window before last are forgotten at once.
#[derive(Debug, Default)]
pub(crate) struct Distinct {
    seen: HashMap<Box<str>, Instant>,
}

impl Distinct {
    /// Whether `name` is one of the last `max` of the window.
    pub(crate) fn admit(&mut self, name: &str, max: u32, window: Duration, now: Instant) -> bool {
        if let Some(at) = self.seen.get_mut(name) {
            *at = now;
            return true;
        }
        let full = |seen: &HashMap<_, _>| u32::try_from(seen.len()).is_ok_and(|len| len >= max);
        if full(&self.seen) {
            self.seen.retain(|_, at| now.saturating_duration_since(*at) < window);
        }
        let fits = !full(&self.seen);
        if fits {
            self.seen.insert(name.into(), now);
        }
        fits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_bucket_gives_a_periods_worth_at_once_and_then_at_its_rate() {
        let (mut bucket, start) = (Bucket::default(), Instant::now());
        let at_once = (0..20).filter(|_| bucket.take(10, SECOND, start)).count();
        assert_eq!(at_once, 10);
        let later = start + SECOND / 2;
        assert_eq!((0..20).filter(|_| bucket.take(10, SECOND, later)).count(), 5);
        assert!(!Bucket::default().take(0, SECOND, start), "0 allows none");
    }

    #[test]
    fn a_name_seen_before_is_no_new_one_and_old_ones_are_forgotten() {
        let (mut names, start) = (Distinct::default(), Instant::now());
        assert!(names.admit("a", 2, SECOND, start) && names.admit("b", 2, SECOND, start));
        assert!(!names.admit("c", 2, SECOND, start));
        assert!(names.admit("a", 2, SECOND, start + SECOND));
        assert!(names.admit("c", 2, SECOND, start + SECOND), "b is too old to count");
        assert!(!names.admit("b", 2, SECOND, start + SECOND));
    }
}

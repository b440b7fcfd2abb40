//! Token buckets: how much a device may do, in bytes and in operations. Time comes in as an
//! argument.
//!
//! A request begins when every bucket holds at least one token, and is paid for in full once its
//! size is known, into debt if need be. So nothing is put back or cut, a request larger than the
//! burst passes too, and the rate holds in the long run.

use std::time::{Duration, Instant};

use holdfast_wire::vmm::{IoLimits, Rate};

/// A bucket is kept in billionths of a token: what one token a second brings in a nanosecond.
const BILLION: i128 = 1_000_000_000;
/// A bucket that ran dry is waited for until it holds what comes in this time, lest a quick device
/// wakes for each token.
const REST: Duration = Duration::from_millis(1);

/// One rate.
#[derive(Debug)]
pub(super) struct TokenBucket {
    rate: Rate,
    /// In billionths; below zero: owed.
    level: i128,
    counted_at: Instant,
}

impl TokenBucket {
    /// A full bucket.
    pub(super) fn new(rate: Rate, now: Instant) -> Self {
        Self { rate, level: full(rate), counted_at: now }
    }

    /// `None`: a request may begin. Else when to ask again.
    pub(super) fn held_until(&mut self, now: Instant) -> Option<Instant> {
        self.fill(now);
        if self.level >= BILLION {
            return None;
        }
        let rest = nanoseconds(REST).saturating_mul(self.rate.per_second.into());
        let wanted = rest.clamp(BILLION, full(self.rate));
        let per_nanosecond = i128::from(self.rate.per_second.max(1));
        let wait = (wanted - self.level + per_nanosecond - 1) / per_nanosecond;
        // A debt of centuries is waited for in steps.
        Some(now + Duration::from_nanos(u64::try_from(wait).unwrap_or(u64::MAX).min(YEAR)))
    }

    /// Pays for a request that began.
    pub(super) fn spend(&mut self, tokens: u64) {
        self.level = self.level.saturating_sub(i128::from(tokens) * BILLION);
    }

    fn fill(&mut self, now: Instant) {
        // A clock that was read earlier than the last one brings nothing, and takes nothing.
        let passed = now.saturating_duration_since(self.counted_at);
        self.counted_at = self.counted_at.max(now);
        let come = nanoseconds(passed).saturating_mul(self.rate.per_second.into());
        self.level = self.level.saturating_add(come).min(full(self.rate));
    }
}

/// In nanoseconds; an `Instant` can always be moved on by it.
const YEAR: u64 = 365 * 24 * 3600 * 1_000_000_000;

fn full(rate: Rate) -> i128 {
    i128::from(rate.burst.max(1)) * BILLION
}

fn nanoseconds(time: Duration) -> i128 {
    i128::try_from(time.as_nanos()).unwrap_or(i128::MAX)
}

/// Both limits of one device, or of one direction of it. The default has none.
#[derive(Debug, Default)]
pub(super) struct Throttle {
    bytes: Option<TokenBucket>,
    operations: Option<TokenBucket>,
}

impl Throttle {
    pub(super) fn new(limits: IoLimits, now: Instant) -> Self {
        let bucket = |rate: Rate| TokenBucket::new(rate, now);
        Self { bytes: limits.bytes.map(bucket), operations: limits.operations.map(bucket) }
    }

    /// `None`: an operation may begin. Else when to ask again.
    pub(super) fn held_until(&mut self, now: Instant) -> Option<Instant> {
        let buckets = [&mut self.bytes, &mut self.operations].into_iter().flatten();
        buckets.filter_map(|bucket| bucket.held_until(now)).max()
    }

    /// Pays for one operation of `bytes` that began.
    pub(super) fn spend(&mut self, bytes: usize) {
        if let Some(bucket) = &mut self.bytes {
            bucket.spend(bytes as u64);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.spend(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn after(start: Instant, micros: u64) -> Instant {
        start + Duration::from_micros(micros)
    }

    #[test]
    fn a_full_bucket_gives_its_burst_and_then_holds() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(Rate { per_second: 10, burst: 3 }, start);
        for _ in 0..3 {
            assert_eq!(bucket.held_until(start), None);
            bucket.spend(1);
        }
        let until = bucket.held_until(start).unwrap();
        assert_eq!(until, after(start, 100_000));
        assert_eq!(bucket.held_until(until), None);
    }

    #[test]
    fn one_nanosecond_before_its_time_a_bucket_still_holds() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(Rate { per_second: 7, burst: 1 }, start);
        bucket.spend(1);
        let until = bucket.held_until(start).unwrap();
        assert_eq!(bucket.held_until(until - Duration::from_nanos(1)), Some(until));
        assert_eq!(bucket.held_until(until), None);
    }

    #[test]
    fn a_request_larger_than_the_burst_passes_and_is_paid_for_afterwards() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(Rate { per_second: 1000, burst: 10 }, start);
        assert_eq!(bucket.held_until(start), None);
        bucket.spend(3010);
        assert_eq!(bucket.held_until(start), Some(after(start, 3_001_000)));
    }

    #[test]
    fn a_rest_fills_no_more_than_the_burst() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(Rate { per_second: 1000, burst: 5 }, start);
        let later = start + Duration::from_secs(1 << 40);
        assert_eq!(bucket.held_until(later), None);
        bucket.spend(5);
        assert!(bucket.held_until(later).is_some());
    }

    #[test]
    fn a_quick_bucket_is_waited_for_a_millisecond_at_a_time() {
        let start = Instant::now();
        let rate = Rate { per_second: 1 << 30, burst: 1 << 25 };
        let mut bucket = TokenBucket::new(rate, start);
        bucket.spend(1 << 25);
        assert_eq!(bucket.held_until(start), Some(after(start, 1000)));
    }

    #[test]
    fn a_clock_that_goes_back_brings_nothing() {
        let start = Instant::now();
        let mut bucket =
            TokenBucket::new(Rate { per_second: 1, burst: 1 }, after(start, 5_000_000));
        bucket.spend(1);
        assert!(bucket.held_until(start).is_some());
        assert_eq!(bucket.held_until(after(start, 6_000_000)), None);
    }

    #[test]
    fn the_largest_debt_neither_panics_nor_passes() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(Rate { per_second: 1, burst: 1 }, start);
        (0..4).for_each(|_| bucket.spend(u64::MAX));
        assert!(bucket.held_until(start).unwrap() > start);
    }

    #[test]
    fn the_slower_of_two_limits_decides_and_none_holds_nothing() {
        let start = Instant::now();
        let limits = IoLimits {
            bytes: Some(Rate { per_second: 1 << 20, burst: 1 << 20 }),
            operations: Some(Rate { per_second: 1, burst: 1 }),
        };
        let mut throttle = Throttle::new(limits, start);
        throttle.spend(1);
        assert_eq!(throttle.held_until(start), Some(after(start, 1_000_000)));
        let mut free = Throttle::default();
        free.spend(usize::MAX);
        assert_eq!(free.held_until(start), None);
    }

    proptest! {
        #[test]
        fn whoever_asks_and_waits_as_told_gets_the_rate_and_no_more(
            per_second in 1..1_000_000_000u64,
            burst_ms in 10..2000u64,
            sizes in prop::collection::vec(1..200_000u64, 1..200),
        ) {
            let burst = (per_second.saturating_mul(burst_ms) / 1000).max(1);
            let start = Instant::now();
            let mut bucket = TokenBucket::new(Rate { per_second, burst }, start);
            let (mut now, mut paid) = (start, 0);
            for size in sizes {
                if let Some(until) = bucket.held_until(now) {
                    prop_assert!(until > now);
                    now = until;
                    prop_assert_eq!(bucket.held_until(now), None);
                }
                let come = (now - start).as_nanos() * u128::from(per_second) / 1_000_000_000;
                // What began before this request is covered by burst and rate.
                prop_assert!(u128::from(paid) <= u128::from(burst) + come);
                bucket.spend(size);
                paid += size;
            }
            // And not much less than the rate: beyond what it came with, only one rest is lost.
            let come = (now - start).as_nanos() * u128::from(per_second) / 1_000_000_000;
            let rest = u128::from(per_second) / 1000 + 2;
            prop_assert!(come <= u128::from(paid) + rest);
        }
    }
}

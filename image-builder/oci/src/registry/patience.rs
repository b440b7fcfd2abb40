//! How often and how long a registry in trouble is asked again.

use std::time::Duration;

/// Numbers of the waiting. Tests make them short.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Patience {
    /// Tries without any progress before giving up.
    pub tries_max: u32,
    /// Wait after the first failure; doubled after each one more.
    pub wait_first: Duration,
    /// Longest wait of our own choice.
    pub wait_max: Duration,
    /// Longest wait a registry may ask for (`Retry-After`). One that asks for more is not waited
    /// for at all: coming back earlier would only be refused again.
    pub asked_wait_max: Duration,
    /// Longest time for a connection to come about.
    pub connect: Duration,
    /// Longest time without a byte of an answer.
    pub silence: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            tries_max: 5,
            wait_first: Duration::from_millis(250),
            wait_max: Duration::from_secs(8),
            asked_wait_max: Duration::from_secs(60),
            connect: Duration::from_secs(10),
            silence: Duration::from_secs(30),
        }
    }
}

impl Patience {
    /// How long to wait after `failures` failures in a row, of which the last came with
    /// `Retry-After: asked`. `None`: give up.
    pub fn wait(&self, failures: u32, asked: Option<Duration>) -> Option<Duration> {
        if failures >= self.tries_max {
            return None;
        }
        let doubled = 2u32.saturating_pow(failures.saturating_sub(1));
        let own = self.wait_first.saturating_mul(doubled).min(self.wait_max);
        match asked {
            Some(asked) if asked > self.asked_wait_max => None,
            Some(asked) => Some(asked.max(own)),
            None => Some(own),
        }
    }
}

/// `Retry-After` in its form of seconds. The form of a date is left to our own waiting: it would
/// need the two clocks to agree.
pub(crate) fn retry_after(header: &str) -> Option<Duration> {
    header.trim().parse().ok().map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_a_limit_and_end() {
        let patience = Patience { tries_max: 8, ..Patience::default() };
        let waits: Vec<_> = (1..=8).map(|failures| patience.wait(failures, None)).collect();
        let expected = [250, 500, 1000, 2000, 4000, 8000, 8000];
        let mut expected: Vec<_> = expected.map(|ms| Some(Duration::from_millis(ms))).into();
        expected.push(None);
        assert_eq!(waits, expected);
    }

    #[test]
    fn what_the_registry_asks_for_is_honoured_within_bounds() {
        let patience = Patience::default();
        let seconds = |s| Some(Duration::from_secs(s));
        assert_eq!(patience.wait(1, seconds(7)), seconds(7));
        assert_eq!(patience.wait(1, seconds(0)), Some(Duration::from_millis(250)));
        assert_eq!(patience.wait(1, seconds(61)), None);
        assert_eq!(patience.wait(u32::MAX, seconds(1)), None);
    }

    #[test]
    fn only_seconds_are_read_from_the_header() {
        assert_eq!(retry_after(" 120 "), Some(Duration::from_secs(120)));
        for text in ["", "-1", "1.5", "Wed, 21 Oct 2015 07:28:00 GMT", "99999999999999999999999"] {
            assert_eq!(retry_after(text), None, "{text}");
        }
    }
}

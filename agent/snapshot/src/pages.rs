//! Sets of pages.

use std::ops::Range;

/// The unit in which changes are kept.
pub const PAGE_BYTES: usize = 4096;
/// Pages of one frame: small enough that one fault waits for little, large enough to compress.
pub(crate) const FRAME_PAGES: usize = 16;
pub(crate) const FRAME_BYTES: usize = FRAME_PAGES * PAGE_BYTES;

/// Pages by number, in ascending runs that neither touch nor overlap.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pages {
    runs: Vec<Range<u64>>,
}

impl Pages {
    pub fn runs(&self) -> &[Range<u64>] {
        &self.runs
    }

    /// Their numbers, one by one.
    pub fn pages(&self) -> impl Iterator<Item = u64> {
        self.runs.iter().cloned().flatten()
    }

    /// Whether this one is among them.
    pub fn holds(&self, page: u64) -> bool {
        let after = self.runs.partition_point(|run| run.start <= page);
        after > 0 && page < self.runs[after - 1].end
    }

    pub fn count(&self) -> u64 {
        self.runs.iter().map(|run| run.end - run.start).sum()
    }
}

/// Of ranges in any order.
impl FromIterator<Range<u64>> for Pages {
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(ranges: I) -> Self {
        let mut ranges: Vec<_> = ranges.into_iter().filter(|range| !range.is_empty()).collect();
        ranges.sort_by_key(|range| range.start);
        let mut runs: Vec<Range<u64>> = Vec::new();
        for range in ranges {
            match runs.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => runs.push(range),
            }
        }
        Self { runs }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_in_any_order_become_runs_that_do_not_touch() {
        let pages: Pages = [7..9, 1..3, 2..4, 9..9, 9..10].into_iter().collect();
        assert_eq!(pages.runs(), [1..4, 7..10]);
        assert_eq!(pages.count(), 6);
        let held: Vec<_> = (0..12).filter(|page| pages.holds(*page)).collect();
        assert_eq!(held, [1, 2, 3, 7, 8, 9]);
        assert_eq!(pages.pages().collect::<Vec<_>>(), held);
        assert!(!Pages::default().holds(0));
    }
}

//! Runs of whole pages of guest memory, to be given back to the host in as few calls as possible.

use vm_memory::GuestAddress;

use crate::{
    devices::queue::Broken,
    vm::{
        Memory,
        memory::{self, PAGE_BYTES},
    },
};

/// Pages, each run from its first page to the page behind its last. Unordered until taken.
#[derive(Debug, Default)]
pub(super) struct Pages {
    runs: Vec<(u64, u64)>,
}

impl Pages {
    /// Adds one page by its number. Neighbours in ascending or descending order, as guests name
    /// them, become one run at once.
    pub(super) fn add(&mut self, page: u64) {
        match self.runs.last_mut() {
            Some((_, end)) if *end == page => *end += 1,
            Some((start, _)) if page.checked_add(1) == Some(*start) => *start = page,
            // No guest has a page there; refused when it is given back.
            _ => self.runs.push((page, page.saturating_add(1))),
        }
    }

    /// Adds the pages that lie wholly in `bytes` bytes from `address` on.
    pub(super) fn add_range(&mut self, address: GuestAddress, bytes: u32) {
        let start = address.0.div_ceil(PAGE_BYTES);
        let end = address.0.saturating_add(bytes.into()) / PAGE_BYTES;
        if start < end {
            self.runs.push((start, end));
        }
    }

    /// The runs in order, as few as they can be.
    fn coalesced(mut self) -> Vec<(u64, u64)> {
        self.runs.sort_unstable();
        let mut whole: Vec<(u64, u64)> = Vec::with_capacity(self.runs.len());
        for (start, end) in self.runs {
            match whole.last_mut() {
                Some((_, last)) if start <= *last => *last = end.max(*last),
                _ => whole.push((start, end)),
            }
        }
        whole
    }

    /// Gives all of them back to the host, or none when one is not the guest's. Returns the bytes.
    pub(super) fn give_back(self, memory: &Memory) -> Result<u64, Broken> {
        let runs = self.coalesced();
        for &(start, end) in &runs {
            if let Some(page) = memory::first_page_outside(memory, start, end) {
                return Err(Broken::Page { page });
            }
        }
        let mut bytes = 0;
        for (start, end) in runs {
            memory::give_back(memory, start, end)
                .map_err(|source| Broken::Host { what: "take back pages", source })?;
            bytes += (end - start) * PAGE_BYTES;
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn coalesced(pages: &[u64]) -> Vec<(u64, u64)> {
        let mut all = Pages::default();
        pages.iter().for_each(|page| all.add(*page));
        all.coalesced()
    }

    #[test]
    fn neighbours_become_one_run_in_whatever_order_they_come() {
        assert_eq!(coalesced(&[5, 6, 7]), [(5, 8)]);
        assert_eq!(coalesced(&[7, 6, 5]), [(5, 8)]);
        assert_eq!(coalesced(&[9, 1, 8, 2]), [(1, 3), (8, 10)]);
        assert_eq!(coalesced(&[3, 3, 3]), [(3, 4)]);
        assert_eq!(coalesced(&[]), []);
        assert_eq!(coalesced(&[u64::MAX]), [(u64::MAX, u64::MAX)]);
    }

    #[test]
    fn only_pages_that_lie_wholly_in_a_range_count() {
        for (address, bytes, runs) in [
            (0x1000, 0x2000, vec![(1, 3)]),
            (0x1001, 0x2000, vec![(2, 3)]),
            (0x1001, 0x1fff, vec![(2, 3)]),
            (0x1001, 0x1ffe, vec![]),
            (u64::MAX, u32::MAX, vec![]),
        ] {
            let mut pages = Pages::default();
            pages.add_range(GuestAddress(address), bytes);
            assert_eq!(pages.coalesced(), runs, "{bytes:#x} bytes at {address:#x}");
        }
    }

    proptest! {
        #[test]
        fn runs_hold_exactly_the_pages_added_and_never_touch(
            pages in prop::collection::vec(0..64u64, 0..100),
        ) {
            let runs = coalesced(&pages);
            let mut held: Vec<u64> = runs.iter().flat_map(|(start, end)| *start..*end).collect();
            let mut wanted = pages;
            wanted.sort_unstable();
            wanted.dedup();
            held.sort_unstable();
            prop_assert_eq!(held, wanted);
            prop_assert!(runs.windows(2).all(|pair| pair[0].1 < pair[1].0));
        }
    }
}

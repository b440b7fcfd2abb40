//! Pages that a guest touches as soon as it goes on: those it is given ahead the next time. A hint,
//! believed by nobody: whatever it says, the guest sees the same memory.

use std::collections::BTreeMap;

use holdfast_snapshot::{PAGE_BYTES, Pages};
use holdfast_wire::{
    pager::FIRST_MAX,
    vmm::{PageRun, WRITTEN_MAX},
};

const PAGE: u64 = PAGE_BYTES as u64;
/// Of a number that is kept: below the page's address.
const WRITTEN: u64 = 1;
const PACKED: u64 = 2;

/// Pages that one suspend packs again. They take a megabyte or so: a guest that nobody has used is
/// still suspended by writing little.
const REPACKED_MAX: usize = 640;

/// What is known of one page.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Known {
    /// The guest writes to it.
    written: bool,
    /// The snapshot has it beside others of its kind.
    packed: bool,
}

/// The pages, ascending. At most as many as a pager is told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Touched(BTreeMap<u64, Known>);

impl Touched {
    /// What a process was seen to have of its guest's memory. `None`: that is too much to be what a
    /// guest touches first.
    pub(super) fn seen(there: &Pages, own: &Pages) -> Option<Self> {
        if there.count() > FIRST_MAX as u64 {
            return None;
        }
        let mut seen: BTreeMap<_, _> = there.pages().map(|page| (page, Known::default())).collect();
        for page in own.pages() {
            if let Some(known) = seen.get_mut(&page) {
                known.written = true;
            }
        }
        Some(Self(seen))
    }

    /// Of numbers of 8 bytes.
    pub(super) fn decode(bytes: &[u8]) -> Self {
        let (numbers, _) = bytes.as_chunks::<8>();
        let numbers = numbers.iter().take(FIRST_MAX).map(|number| u64::from_le_bytes(*number));
        let known =
            |number: u64| Known { written: number & WRITTEN != 0, packed: number & PACKED != 0 };
        Self(numbers.map(|number| (number / PAGE, known(number))).collect())
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let number = |(page, known): (&u64, &Known)| {
            page * PAGE + u64::from(known.written) * WRITTEN + u64::from(known.packed) * PACKED
        };
        self.0.iter().flat_map(|entry| number(entry).to_le_bytes()).collect()
    }

    pub(super) fn pages(&self) -> impl Iterator<Item = u64> {
        self.0.keys().copied()
    }

    /// Where the pages are that a pager brings first, in bytes: those that lie together, for of
    /// others it would unpack 15 that nobody needs with each. All of them, if none do.
    pub(super) fn to_bring(&self) -> Vec<u64> {
        let none = self.0.values().all(|known| !known.packed);
        let wanted = self.0.iter().filter(|(_, known)| none || known.packed);
        wanted.map(|(page, _)| page * PAGE).collect()
    }

    /// Whether it is one of those that are written.
    pub(super) fn is_written(&self, page: u64) -> bool {
        self.0.get(&page).is_some_and(|known| known.written)
    }

    /// Those that are written, as a VMM is told.
    pub(super) fn written(&self) -> Vec<PageRun> {
        let mut runs: Vec<PageRun> = Vec::new();
        for (&page, _) in self.0.iter().filter(|(_, known)| known.written) {
            match runs.last_mut() {
                Some(run) if run.page + u64::from(run.count) == page => run.count += 1,
                _ => runs.push(PageRun { page, count: 1 }),
            }
        }
        runs.truncate(WRITTEN_MAX);
        runs
    }

    /// Pages that are packed again although they have not changed: those that lie here and there,
    /// once they are a quarter of all.
    pub(super) fn to_repack(&self) -> Vec<u64> {
        let scattered = self.0.iter().filter(|(_, known)| !known.packed);
        let scattered: Vec<_> = scattered.map(|(page, _)| *page).collect();
        let count = if scattered.len() * 4 > self.0.len() { REPACKED_MAX } else { 0 };
        scattered.into_iter().take(count).collect()
    }

    /// A snapshot that is written now has these beside each other. `None`: all of them.
    pub(super) fn packed(&mut self, those: Option<&Pages>) {
        for (page, known) in &mut self.0 {
            known.packed |= those.is_none_or(|those| those.holds(*page));
        }
    }

    /// What a later look found, of the same snapshot.
    pub(super) fn replace(&mut self, seen: Self) {
        let before = std::mem::replace(self, seen);
        for (page, known) in &mut self.0 {
            known.packed = before.0.get(page).is_some_and(|before| before.packed);
        }
    }

    /// Pages that were missed, by their addresses.
    pub(super) fn add(&mut self, missed: &[u64]) {
        for at in missed {
            if self.0.len() < FIRST_MAX {
                self.0.entry(at / PAGE).or_default();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;

    fn pages(runs: &[Range<u64>]) -> Pages {
        runs.iter().cloned().collect()
    }

    fn run(start: u64, end: u64) -> Pages {
        std::iter::once(start..end).collect()
    }

    #[test]
    fn what_is_kept_is_read_back_and_told_in_runs() {
        let own = pages(&[4..6, 9..10, 20..21]);
        let mut touched = Touched::seen(&pages(&[3..7, 9..10]), &own).unwrap();
        touched.packed(Some(&run(4, 10)));
        assert_eq!(Touched::decode(&touched.encode()), touched);
        let of = |page, count| PageRun { page, count };
        assert_eq!(touched.written(), [of(4, 2), of(9, 1)]);
        assert_eq!(touched.to_bring(), [4, 5, 6, 9].map(|page| page * PAGE));
        assert_eq!(Touched::decode(&[1, 2, 3]), Touched::default());
    }

    #[test]
    fn pages_are_packed_again_when_a_quarter_of_them_lie_elsewhere() {
        let mut touched = Touched::seen(&run(0, 8), &pages(&[])).unwrap();
        assert_eq!(touched.to_repack(), [0, 1, 2, 3, 4, 5, 6, 7]);
        touched.packed(None);
        assert!(touched.to_repack().is_empty());
        touched.add(&[20 * PAGE, 20 * PAGE, 3 * PAGE, 21 * PAGE]);
        assert!(touched.to_repack().is_empty(), "2 of 10");
        // What is touched no more is forgotten, and what lies together is not.
        touched.replace(Touched::seen(&run(6, 10), &run(6, 7)).unwrap());
        assert_eq!(touched.to_bring(), [6 * PAGE, 7 * PAGE]);
        assert_eq!(touched.to_repack(), [8, 9]);
        touched.packed(Some(&run(8, 9)));
        assert!(touched.to_repack().is_empty());
        touched.replace(Touched::seen(&run(0, 2000), &pages(&[])).unwrap());
        assert_eq!(touched.to_repack().len(), REPACKED_MAX);
    }

    #[test]
    fn a_guest_that_has_touched_much_is_not_one_that_has_just_gone_on() {
        let (fits, over) = (FIRST_MAX as u64, FIRST_MAX as u64 + 1);
        assert!(Touched::seen(&run(0, fits), &pages(&[])).is_some());
        assert_eq!(Touched::seen(&run(0, over), &pages(&[])), None);
    }
}

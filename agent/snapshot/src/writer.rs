//! Writes one layer of an image: reads what may have changed, leaves out what is zero, packs the
//! rest in the order in which it will be wanted.

use std::ops::Range;

use crate::{
    Name, PAGE_BYTES, Pages, PieceStore, SnapshotError, Source,
    key::Key,
    layer::{Content, Layer, Run},
    pages::FRAME_BYTES,
    segment::Segments,
};

const ZERO: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// What it came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Written {
    /// Pages looked at.
    pub considered: u64,
    pub zero: u64,
    pub packed: u64,
    /// Bytes put into segments.
    pub stored_bytes: u64,
}

/// A layer that was put.
pub(crate) struct PutLayer {
    pub(crate) name: Name,
    pub(crate) segments: Vec<Name>,
    pub(crate) written: Written,
}

/// How to write.
pub(crate) struct Plan<'a> {
    /// zstd's, of what is wanted first and of the rest.
    pub(crate) levels: Levels,
    /// Pages to look at.
    pub(crate) pages: &'a Pages,
    /// Of these, pages to pack first, in this order.
    pub(crate) first: &'a [u64],
    /// Whether something lies below: then zeros are to be noted.
    pub(crate) has_parent: bool,
}

/// Levels of zstd.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Levels {
    pub(crate) first: i32,
    pub(crate) rest: i32,
}

pub(crate) fn write(
    store: &dyn PieceStore,
    key: &Key,
    source: &dyn Source,
    plan: &Plan<'_>,
) -> Result<PutLayer, SnapshotError> {
    let image_pages = source.bytes() / PAGE_BYTES as u64;
    let mut packing = Packing {
        source,
        has_parent: plan.has_parent,
        segments: Segments::new(store, key, plan.levels.rest)?,
        level: plan.levels.first,
        then: plan.levels.first,
        frame: vec![0; FRAME_BYTES],
        filled: 0,
        runs: Vec::new(),
        written: Written::default(),
    };
    let (first, rest) = in_order(plan.pages, plan.first, image_pages);
    first.into_iter().try_for_each(|run| packing.take(run))?;
    // A frame that is begun stays what it is: no frame but the last may be short.
    packing.then = plan.levels.rest;
    if packing.filled == 0 {
        packing.level = packing.then;
    }
    rest.into_iter().try_for_each(|run| packing.take(run))?;
    packing.flush()?;
    let stored = packing.segments.finish()?;
    let written = Written { stored_bytes: stored.bytes, ..packing.written };
    let segments = stored.segments.iter().map(|segment| segment.name).collect();
    let layer =
        Layer::new(image_pages, written.packed, packing.runs, stored.frames, stored.segments);
    Ok(PutLayer { name: layer.put(store, key)?, segments, written })
}

/// The pages that come first as they were asked for, and the others ascending; none twice, none
/// that the image does not have.
fn in_order(pages: &Pages, first: &[u64], end: u64) -> (Vec<Range<u64>>, Vec<Range<u64>>) {
    let inside = |run: &Range<u64>| run.start.min(end)..run.end.min(end);
    let all: Pages = pages.runs().iter().map(inside).collect();
    let mut seen = std::collections::BTreeSet::new();
    let contains = |page: u64| {
        let after = all.runs().partition_point(|run| run.start <= page);
        after > 0 && page < all.runs()[after - 1].end
    };
    let wanted = first.iter().copied().filter(|page| contains(*page) && seen.insert(*page));
    let ahead: Vec<_> = wanted.map(|page| page..page + 1).collect();
    if seen.is_empty() {
        return (ahead, all.runs().to_vec());
    }
    let mut rest = Vec::new();
    for run in all.runs() {
        let mut from = run.start;
        for &page in seen.range(run.clone()) {
            rest.push(from..page);
            from = page + 1;
        }
        rest.push(from..run.end);
    }
    rest.retain(|run| !run.is_empty());
    (ahead, rest)
}

struct Packing<'a> {
    source: &'a dyn Source,
    has_parent: bool,
    segments: Segments<'a>,
    /// zstd's, of the frame that is not full yet, and of those after it.
    level: i32,
    then: i32,
    /// Pages of the frame that is not full yet, then room for more: they are read to where they stay.
    frame: Vec<u8>,
    filled: usize,
    runs: Vec<Run>,
    written: Written,
}

impl Packing<'_> {
    fn take(&mut self, run: Range<u64>) -> Result<(), SnapshotError> {
        let mut from = run.start;
        while from < run.end {
            let room = (FRAME_BYTES - self.filled) / PAGE_BYTES;
            let count = (run.end - from).min(room as u64);
            let at = from * PAGE_BYTES as u64;
            let length = usize::try_from(count).unwrap_or(room) * PAGE_BYTES;
            let read = self.filled..self.filled + length;
            self.source
                .read_at(at, &mut self.frame[read.clone()])
                .map_err(|source| SnapshotError::Source { at, source })?;
            for (page, place) in (from..).zip(read.step_by(PAGE_BYTES)) {
                self.take_page(page, place);
            }
            from += count;
            if self.filled == FRAME_BYTES {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Keeps a page that was read to `place` of the frame, unless it is zero.
    fn take_page(&mut self, page: u64, place: usize) {
        self.written.considered += 1;
        let text = place..place + PAGE_BYTES;
        if self.frame[text.clone()] == ZERO {
            self.written.zero += 1;
            if self.has_parent {
                self.note(page, Content::Zero);
            }
            return;
        }
        self.note(page, Content::Packed(self.written.packed));
        self.written.packed += 1;
        // Over the zeros before it, if there were any.
        if place != self.filled {
            self.frame.copy_within(text, self.filled);
        }
        self.filled += PAGE_BYTES;
    }

    fn note(&mut self, page: u64, content: Content) {
        let next = Run { page, count: 1, content };
        match self.runs.last_mut() {
            Some(last) if last.goes_on_in(&next) => last.count += 1,
            _ => self.runs.push(next),
        }
    }

    fn flush(&mut self) -> Result<(), SnapshotError> {
        if self.filled > 0 {
            self.segments.push(&self.frame[..self.filled], self.level)?;
            self.filled = 0;
            self.level = self.then;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_wanted_first_come_in_their_order_and_the_rest_after_them_once() {
        let pages: Pages = [0..4, 10..12, 98..200].into_iter().collect();
        let (ahead, rest) = in_order(&pages, &[11, 2, 7, 11, 99], 100);
        assert_eq!(ahead, [11..12, 2..3, 99..100]);
        assert_eq!(rest, [0..2, 3..4, 10..11, 98..99]);
        let (ahead, rest) = in_order(&pages, &[], 100);
        assert_eq!((ahead, rest), (vec![], vec![0..4, 10..12, 98..100]));
    }
}

//! An image that is filled in while it is used already: frame by frame, in whatever order, by
//! several threads.

use std::ops::Range;

use crate::{
    Name, PAGE_BYTES, PieceStore, SnapshotError,
    frame::Unpacker,
    image::{Opened, open_layers},
    key::Key,
    layer::Content,
    pages::FRAME_PAGES,
};

const PAGE: u64 = PAGE_BYTES as u64;
const FRAME: u64 = FRAME_PAGES as u64;

/// Which frame of which layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Frame {
    layer: usize,
    number: u64,
}

/// What one thread needs to unpack frames.
pub struct FrameReader(Unpacker);

impl FrameReader {
    pub fn new() -> Result<Self, SnapshotError> {
        Unpacker::new().map(Self)
    }
}

impl std::fmt::Debug for FrameReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FrameReader")
    }
}

/// A frame's pages, those that the image shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unpacked {
    text: Vec<u8>,
    /// Byte of the image, and where in the text its bytes are.
    runs: Vec<(u64, Range<usize>)>,
}

impl Unpacked {
    /// Where in the image, in bytes, and what is there. Ascending within the frame's layer only.
    pub fn runs(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.runs.iter().map(|(at, range)| (*at, &self.text[range.clone()]))
    }

    /// The same of some pages only, which are told by their first byte.
    pub fn runs_of(&self, those: impl Fn(u64) -> bool) -> Vec<(u64, &[u8])> {
        let mut runs: Vec<(u64, Range<usize>)> = Vec::new();
        for (at, text) in &self.runs {
            for (page, start) in (*at..).step_by(PAGE_BYTES).zip(text.clone().step_by(PAGE_BYTES)) {
                let end = start + PAGE_BYTES;
                match runs.last_mut() {
                    _ if !those(page) => {}
                    Some((first, range))
                        if range.end == start && *first + range.len() as u64 == page =>
                    {
                        range.end = end;
                    }
                    _ => runs.push((page, start..end)),
                }
            }
        }
        runs.into_iter().map(|(at, range)| (at, &self.text[range])).collect()
    }
}

/// Pages in a row, by where they are packed.
#[derive(Debug, Clone, Copy)]
struct PackedRun {
    packed: u64,
    page: u64,
    count: u64,
}

struct Filled {
    opened: Opened,
    /// In the order of the pack.
    runs: Vec<PackedRun>,
}

/// An image as the frames it is made of.
pub struct Fill<'s> {
    store: &'s dyn PieceStore,
    bytes: u64,
    layers: Vec<Filled>,
}

impl std::fmt::Debug for Fill<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Fill of {} bytes in {} layers", self.bytes, self.layers.len())
    }
}

impl<'s> Fill<'s> {
    /// Of an image of so many bytes; `layers` from the topmost on, as an authenticated manifest has
    /// them.
    pub fn open(
        store: &'s dyn PieceStore,
        key: &Key,
        bytes: u64,
        layers: &[Name],
    ) -> Result<Self, SnapshotError> {
        let layers = open_layers(store, key, bytes, layers)?.into_iter().map(|opened| {
            let packed = opened.layer.runs.iter().filter_map(|run| match run.content {
                Content::Packed(packed) => {
                    Some(PackedRun { packed, page: run.page, count: run.count })
                }
                Content::Zero => None,
            });
            let mut runs: Vec<_> = packed.collect();
            runs.sort_by_key(|run| run.packed);
            Filled { opened, runs }
        });
        Ok(Self { store, bytes, layers: layers.collect() })
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many frames there are.
    pub fn count(&self) -> usize {
        self.layers.iter().map(|filled| filled.opened.layer.frames.len()).sum()
    }

    /// The frame's place among all of them.
    pub fn place(&self, frame: Frame) -> usize {
        let above = self.layers[..frame.layer].iter();
        let before: usize = above.map(|filled| filled.opened.layer.frames.len()).sum();
        before + usize::try_from(frame.number).unwrap_or(usize::MAX)
    }

    /// Where the bytes at `at` come from. `None`: they are zero.
    pub fn frame_at(&self, at: u64) -> Option<Frame> {
        let page = at / PAGE;
        let (layer, content) = self.layers.iter().enumerate().find_map(|(index, filled)| {
            filled.opened.layer.find(page).map(|content| (index, content))
        })?;
        match content {
            Content::Packed(packed) => Some(Frame { layer, number: packed / FRAME }),
            Content::Zero => None,
        }
    }

    /// All of them, in the order in which they were packed: what is wanted first comes first.
    pub fn frames(&self) -> impl Iterator<Item = Frame> {
        self.layers.iter().enumerate().flat_map(|(layer, filled)| {
            (0..filled.opened.layer.frames.len() as u64).map(move |number| Frame { layer, number })
        })
    }

    /// Reads, checks and unpacks one.
    pub fn unpack(
        &self,
        reader: &mut FrameReader,
        frame: Frame,
    ) -> Result<Unpacked, SnapshotError> {
        let missing = SnapshotError::Internal { what: "a frame of a layer that is not there" };
        let filled = self.layers.get(frame.layer).ok_or(missing)?;
        let text = filled.opened.fetch(self.store, &mut reader.0, frame.number)?;
        Ok(Unpacked { runs: self.shown(frame), text })
    }

    /// The pages of a frame that no layer above has.
    fn shown(&self, Frame { layer, number }: Frame) -> Vec<(u64, Range<usize>)> {
        let (start, end) = (number * FRAME, (number + 1) * FRAME);
        let runs = &self.layers[layer].runs;
        let from = runs.partition_point(|run| run.packed + run.count <= start);
        let mut shown: Vec<(u64, Range<usize>)> = Vec::new();
        for run in runs[from..].iter().take_while(|run| run.packed < end) {
            for packed in run.packed.max(start)..(run.packed + run.count).min(end) {
                let page = run.page + (packed - run.packed);
                let above = &self.layers[..layer];
                if above.iter().any(|filled| filled.opened.layer.find(page).is_some()) {
                    continue;
                }
                let at = usize::try_from(packed - start).unwrap_or(0) * PAGE_BYTES;
                match shown.last_mut() {
                    Some((first, range))
                        if range.end == at && *first + range.len() as u64 == page * PAGE =>
                    {
                        range.end += PAGE_BYTES;
                    }
                    _ => shown.push((page * PAGE, at..at + PAGE_BYTES)),
                }
            }
        }
        shown
    }
}

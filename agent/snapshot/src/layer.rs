//! A layer: which pages of an image it has, and where each lies. A piece of its own, compressed and
//! sealed like a frame; read with the same distrust.

use std::io::Read;

use serde::{Deserialize, Serialize};

use crate::{
    Kind, Name, Part, PieceStore, SnapshotError,
    frame::STORED_BYTES_MAX,
    key::{Key, Salt16, random},
    pages::FRAME_PAGES,
};

const VERSION: u8 = 1;
const SALT_BYTES: usize = 16;
/// A layer is compressed once and read at every resume.
const LEVEL: i32 = 3;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Layer {
    version: u8,
    /// Of the image, with those that this layer does not have.
    pub(crate) pages: u64,
    /// Pages packed into its frames.
    pub(crate) packed: u64,
    /// Ascending, without overlap.
    pub(crate) runs: Vec<Run>,
    pub(crate) frames: Vec<FrameRef>,
    pub(crate) segments: Vec<SegmentRef>,
}

/// Pages in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Run {
    pub(crate) page: u64,
    pub(crate) count: u64,
    pub(crate) content: Content,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Content {
    Zero,
    /// From this one of the packed pages on.
    Packed(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FrameRef {
    /// Index into the layer's segments.
    pub(crate) segment: u32,
    /// The number it was sealed under.
    pub(crate) number: u32,
    pub(crate) offset: u32,
    pub(crate) bytes: u32,
    /// BLAKE3 of the stored bytes.
    pub(crate) hash: [u8; 32],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SegmentRef {
    pub(crate) name: Name,
    pub(crate) salt: Salt16,
}

impl Run {
    pub(crate) fn end(&self) -> u64 {
        self.page.saturating_add(self.count)
    }

    /// Whether `next` goes on where this ends, in the image and in the pack.
    pub(crate) fn goes_on_in(&self, next: &Self) -> bool {
        let same = match (self.content, next.content) {
            (Content::Zero, Content::Zero) => true,
            (Content::Packed(one), Content::Packed(other)) => {
                one.saturating_add(self.count) == other
            }
            _ => false,
        };
        same && self.end() == next.page
    }
}

impl Layer {
    /// `runs` in any order.
    pub(crate) fn new(
        pages: u64,
        packed: u64,
        mut runs: Vec<Run>,
        frames: Vec<FrameRef>,
        segments: Vec<SegmentRef>,
    ) -> Self {
        runs.sort_by_key(|run| run.page);
        runs.dedup_by(|next, run| {
            let joined = run.goes_on_in(next);
            run.count += if joined { next.count } else { 0 };
            joined
        });
        Self { version: VERSION, pages, packed, runs, frames, segments }
    }

    /// Where `page` lies; `None`: not in this layer.
    pub(crate) fn find(&self, page: u64) -> Option<Content> {
        let after = self.runs.partition_point(|run| run.page <= page);
        let run = self.runs.get(after.checked_sub(1)?).filter(|run| page < run.end())?;
        Some(match run.content {
            Content::Zero => Content::Zero,
            Content::Packed(at) => Content::Packed(at + (page - run.page)),
        })
    }

    /// Pages in frame `index`.
    pub(crate) fn pages_in_frame(&self, index: u64) -> usize {
        let before = index.saturating_mul(FRAME_PAGES as u64);
        let left = self.packed.saturating_sub(before).min(FRAME_PAGES as u64);
        usize::try_from(left).unwrap_or(FRAME_PAGES)
    }

    /// What is put, and its name.
    pub(crate) fn put(&self, store: &dyn PieceStore, key: &Key) -> Result<Name, SnapshotError> {
        let internal = |what| SnapshotError::Internal { what };
        let plain = postcard::to_stdvec(self).map_err(|_| internal("the form of a layer"))?;
        let mut sealed =
            zstd::encode_all(&plain[..], LEVEL).map_err(|_| internal("a compressed layer"))?;
        let salt: Salt16 = random()?;
        key.sealer(&salt)?.seal(0, &mut sealed)?;
        let bytes = [&salt[..], &sealed].concat();
        let name = Name::of(&bytes);
        let found = bytes.len() as u64;
        if found > Kind::Layer.bytes_max() {
            let part = Part::Piece(Kind::Layer, name);
            return Err(SnapshotError::TooLarge { part, found, max: Kind::Layer.bytes_max() });
        }
        store.put_piece(Kind::Layer, &name, &bytes)?;
        Ok(name)
    }

    pub(crate) fn open(
        store: &dyn PieceStore,
        key: &Key,
        name: &Name,
    ) -> Result<Self, SnapshotError> {
        let part = || Part::Piece(Kind::Layer, *name);
        let malformed = |reason: &str| SnapshotError::malformed(part(), reason);
        let bytes = store.whole_piece(Kind::Layer, name)?;
        let Some((salt, sealed)) = bytes.split_first_chunk::<SALT_BYTES>() else {
            return Err(malformed("too short"));
        };
        let mut sealed = sealed.to_vec();
        let opened = key.sealer(salt)?.open(0, &mut sealed);
        opened.ok_or_else(|| SnapshotError::WrongKey { part: part() })?;
        let decoder = zstd::Decoder::with_buffer(&sealed[..]).map_err(|_| malformed("not zstd"))?;
        let mut plain = Vec::new();
        let read = decoder.take(Kind::Layer.bytes_max()).read_to_end(&mut plain);
        read.map_err(|_| malformed("not zstd"))?;
        let layer: Self =
            postcard::from_bytes(&plain).map_err(|error| malformed(&error.to_string()))?;
        layer.check().map_err(malformed)?;
        Ok(layer)
    }

    /// Everything that indexes something lies inside of it.
    fn check(&self) -> Result<(), &'static str> {
        if self.version != VERSION {
            return Err("of another version");
        }
        if self.packed.div_ceil(FRAME_PAGES as u64) != self.frames.len() as u64 {
            return Err("frames missing or over");
        }
        let mut end = 0;
        for run in &self.runs {
            let inside = run.page.checked_add(run.count).is_some_and(|end| end <= self.pages);
            if run.count == 0 || run.page < end || !inside {
                return Err("runs out of order or outside of the image");
            }
            if let Content::Packed(at) = run.content
                && at.checked_add(run.count).is_none_or(|end| end > self.packed)
            {
                return Err("a run outside of its frames");
            }
            end = run.end();
        }
        let sound = |frame: &FrameRef| {
            usize::try_from(frame.segment).is_ok_and(|index| index < self.segments.len())
                && usize::try_from(frame.bytes).is_ok_and(|bytes| bytes <= STORED_BYTES_MAX)
        };
        if self.frames.iter().all(sound) { Ok(()) } else { Err("a frame that cannot be") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(page: u64, count: u64, content: Content) -> Run {
        Run { page, count, content }
    }

    fn layer(runs: Vec<Run>) -> Layer {
        let frame = FrameRef { segment: 0, number: 0, offset: 0, bytes: 100, hash: [0; 32] };
        let segment = SegmentRef { name: Name::of(b""), salt: [0; 16] };
        Layer::new(100, 20, runs, vec![frame; 2], vec![segment])
    }

    #[test]
    fn runs_that_go_on_in_each_other_are_one() {
        let packed = Content::Packed;
        let made = layer(vec![
            run(12, 1, packed(2)),
            run(10, 2, packed(0)),
            run(13, 1, packed(9)),
            run(14, 1, Content::Zero),
            run(15, 5, Content::Zero),
        ]);
        let expected = [run(10, 3, packed(0)), run(13, 1, packed(9)), run(14, 6, Content::Zero)];
        assert_eq!(made.runs, expected);
        assert_eq!(made.find(9), None);
        assert_eq!(made.find(12), Some(packed(2)));
        assert_eq!(made.find(13), Some(packed(9)));
        assert_eq!(made.find(19), Some(Content::Zero));
        assert_eq!(made.find(20), None);
    }

    #[test]
    fn a_layer_that_points_outside_of_itself_is_refused() {
        let sound = layer(vec![run(10, 3, Content::Packed(17))]);
        assert_eq!(sound.check(), Ok(()));
        let broken: [fn(&mut Layer); 9] = [
            |it| it.version = 2,
            |it| it.packed = 33,
            |it| it.runs[0].page = 98,
            |it| it.runs[0].page = u64::MAX,
            |it| it.runs[0].count = 0,
            |it| it.runs[0].content = Content::Packed(18),
            |it| it.runs.push(it.runs[0]),
            |it| it.frames[1].segment = 1,
            |it| it.frames[1].bytes = u32::MAX,
        ];
        for (index, break_it) in broken.iter().enumerate() {
            let mut layer = sound.clone();
            break_it(&mut layer);
            assert!(layer.check().is_err(), "change {index}");
        }
    }
}

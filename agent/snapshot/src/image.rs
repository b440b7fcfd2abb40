//! An image as a snapshot has it: layers on each other, the topmost first.

use std::os::{fd::AsFd, unix::fs::FileExt};

use rustix::fs::{FallocateFlags, fallocate, ftruncate};

use crate::{
    Kind, Name, PAGE_BYTES, Part, PieceStore, SnapshotError,
    frame::{Bad, Unpacker},
    key::{Key, Sealer},
    layer::{Content, Layer},
    pages::FRAME_PAGES,
};

/// Frames kept unpacked: a fault's neighbours come next.
const FRAMES_KEPT: usize = 4;

/// Reads pages. Not shared between threads: open one for each.
pub struct Image<'s> {
    store: &'s dyn PieceStore,
    bytes: u64,
    layers: Vec<Opened>,
    /// The frames used last, by layer and number.
    kept: Vec<((usize, u64), Vec<u8>)>,
    unpacker: Unpacker,
}

/// A layer, ready to be read.
pub(crate) struct Opened {
    pub(crate) layer: Layer,
    /// As its segments.
    sealers: Vec<Sealer>,
}

/// All layers of an image of so many bytes, from the topmost on.
pub(crate) fn open_layers(
    store: &dyn PieceStore,
    key: &Key,
    bytes: u64,
    layers: &[Name],
) -> Result<Vec<Opened>, SnapshotError> {
    let open = |name: &Name| {
        let layer = Layer::open(store, key, name)?;
        if layer.pages != bytes / PAGE_BYTES as u64 {
            let part = Part::Piece(Kind::Layer, *name);
            return Err(SnapshotError::malformed(part, "of an image of another length"));
        }
        let sealers = layer.segments.iter().map(|segment| key.sealer(&segment.salt));
        let sealers = sealers.collect::<Result<_, _>>()?;
        Ok(Opened { sealers, layer })
    };
    layers.iter().map(open).collect()
}

impl std::fmt::Debug for Image<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Image of {} bytes in {} layers", self.bytes, self.layers.len())
    }
}

impl<'s> Image<'s> {
    /// `layers` from the topmost on.
    pub(crate) fn open(
        store: &'s dyn PieceStore,
        key: &Key,
        bytes: u64,
        layers: &[Name],
    ) -> Result<Self, SnapshotError> {
        let layers = open_layers(store, key, bytes, layers)?;
        Ok(Self { store, bytes, layers, kept: Vec::new(), unpacker: Unpacker::new()? })
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many frames its layers have, and their stored bytes: what a restore reads.
    pub fn stored(&self) -> (u64, u64) {
        let frames = self.layers.iter().flat_map(|opened| &opened.layer.frames);
        frames.fold((0, 0), |(count, bytes), frame| (count + 1, bytes + u64::from(frame.bytes)))
    }

    /// The page's bytes, or `None` if they are all zero. Behind the end there is nothing but zeros.
    pub fn page(&mut self, page: u64) -> Result<Option<&[u8]>, SnapshotError> {
        let found =
            self.layers.iter().enumerate().find_map(|(index, opened)| {
                opened.layer.find(page).map(|content| (index, content))
            });
        let Some((index, Content::Packed(at))) = found else { return Ok(None) };
        let (frame, within) = (at / FRAME_PAGES as u64, at % FRAME_PAGES as u64);
        let start = usize::try_from(within).unwrap_or(0) * PAGE_BYTES;
        let text = self.frame(index, frame)?;
        Ok(Some(&text[start..start + PAGE_BYTES]))
    }

    fn frame(&mut self, layer: usize, number: u64) -> Result<&[u8], SnapshotError> {
        match self.kept.iter().position(|(which, _)| *which == (layer, number)) {
            // The one used last stands last, and goes last.
            Some(place) => self.kept[place..].rotate_left(1),
            None => {
                let text = self.layers[layer].fetch(self.store, &mut self.unpacker, number)?;
                if self.kept.len() == FRAMES_KEPT {
                    self.kept.remove(0);
                }
                self.kept.push(((layer, number), text));
            }
        }
        Ok(self.kept.last().map_or(&[], |(_, text)| text))
    }

    /// Writes the image to `file`: afterwards it has its length, its bytes, and holes for what is
    /// zero. Layer by layer from the lowest, so that every frame is unpacked once.
    pub fn restore<F: FileExt + AsFd>(&self, file: &F) -> Result<(), SnapshotError> {
        let cannot = SnapshotError::store;
        // Whatever was in it goes.
        ftruncate(file, 0).map_err(|error| cannot("empty the image's file")(error.into()))?;
        ftruncate(file, self.bytes)
            .map_err(|error| cannot("lengthen the image's file")(error.into()))?;
        let mut unpacker = Unpacker::new()?;
        for (index, opened) in self.layers.iter().enumerate().rev() {
            let is_lowest = index + 1 == self.layers.len();
            opened.write(self.store, &mut unpacker, file, is_lowest)?;
        }
        Ok(())
    }

    /// Reads and unpacks every frame there is; returns how many. The first that is not sound is the
    /// error.
    pub(crate) fn verify(&self) -> Result<u64, SnapshotError> {
        let (mut count, mut unpacker) = (0, Unpacker::new()?);
        for opened in &self.layers {
            for number in 0..opened.layer.frames.len() as u64 {
                opened.fetch(self.store, &mut unpacker, number)?;
                count += 1;
            }
        }
        Ok(count)
    }
}

impl Opened {
    /// A frame, checked in this order: hash, key, form.
    pub(crate) fn fetch(
        &self,
        store: &dyn PieceStore,
        unpacker: &mut Unpacker,
        number: u64,
    ) -> Result<Vec<u8>, SnapshotError> {
        let index = usize::try_from(number).unwrap_or(usize::MAX);
        // Both were checked when the layer was opened.
        let internal = || SnapshotError::Internal { what: "a frame that is not there" };
        let frame = self.layer.frames.get(index).ok_or_else(internal)?;
        let place = usize::try_from(frame.segment).unwrap_or(usize::MAX);
        let segment = self.layer.segments.get(place).ok_or_else(internal)?;
        let sealer = self.sealers.get(place).ok_or_else(internal)?;
        let bytes = usize::try_from(frame.bytes).unwrap_or(usize::MAX);
        let stored =
            store.read_piece(Kind::Segment, &segment.name, u64::from(frame.offset), bytes)?;
        let part = || Part::Frame(segment.name, frame.number);
        if *blake3::hash(&stored).as_bytes() != frame.hash {
            return Err(SnapshotError::Changed { part: part() });
        }
        let length = self.layer.pages_in_frame(number) * PAGE_BYTES;
        let unpacked = unpacker.unpack(sealer, frame.number, stored, length);
        unpacked.map_err(|bad| match bad {
            Bad::Key => SnapshotError::WrongKey { part: part() },
            Bad::Form => SnapshotError::malformed(part(), "not a frame of its pages"),
        })
    }

    fn write<F: FileExt + AsFd>(
        &self,
        store: &dyn PieceStore,
        unpacker: &mut Unpacker,
        file: &F,
        is_lowest: bool,
    ) -> Result<(), SnapshotError> {
        let page_bytes = PAGE_BYTES as u64;
        // In the order of the pack: a frame's pages may lie anywhere in the image.
        let mut runs: Vec<_> = self.layer.runs.iter().collect();
        runs.sort_by_key(|run| match run.content {
            Content::Zero => 0,
            Content::Packed(at) => at,
        });
        let mut current: Option<(u64, Vec<u8>)> = None;
        for run in runs {
            let Content::Packed(start) = run.content else {
                // The lowest layer lies on a hole.
                if !is_lowest {
                    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    fallocate(file, flags, run.page * page_bytes, run.count * page_bytes)
                        .map_err(|error| SnapshotError::store("punch a hole")(error.into()))?;
                }
                continue;
            };
            let mut done = 0;
            while done < run.count {
                let at = start + done;
                let (number, within) = (at / FRAME_PAGES as u64, at % FRAME_PAGES as u64);
                if current.as_ref().is_none_or(|(kept, _)| *kept != number) {
                    current = Some((number, self.fetch(store, unpacker, number)?));
                }
                let text = current.as_ref().map_or(&[][..], |(_, text)| text);
                let from = usize::try_from(within).unwrap_or(0) * PAGE_BYTES;
                let count = (run.count - done).min(FRAME_PAGES as u64 - within);
                let length = usize::try_from(count).unwrap_or(FRAME_PAGES) * PAGE_BYTES;
                file.write_all_at(&text[from..from + length], (run.page + done) * page_bytes)
                    .map_err(SnapshotError::store("write an image"))?;
                done += count;
            }
        }
        Ok(())
    }
}

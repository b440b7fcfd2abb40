//! One frame as it is stored: compressed if that makes it smaller, then sealed.

use crate::{
    SnapshotError,
    key::{Sealer, TAG_BYTES},
    pages::FRAME_BYTES,
};

/// First byte of what is sealed.
const PLAIN: u8 = 0;
const COMPRESSED: u8 = 1;
/// What no stored frame is longer than.
pub(crate) const STORED_BYTES_MAX: usize = 1 + FRAME_BYTES + TAG_BYTES;

/// Makes stored frames.
pub(crate) struct Packer {
    level: i32,
    compressor: zstd::bulk::Compressor<'static>,
    compressed: Vec<u8>,
}

impl Packer {
    pub(crate) fn new(level: i32) -> Result<Self, SnapshotError> {
        let compressor = zstd::bulk::Compressor::new(level)
            .map_err(|_| SnapshotError::Internal { what: "a compressor" })?;
        Ok(Self { level, compressor, compressed: vec![0; FRAME_BYTES] })
    }

    /// From the next frame on, at this level of zstd's.
    pub(crate) fn set_level(&mut self, level: i32) -> Result<(), SnapshotError> {
        if level != self.level {
            let set = self.compressor.set_compression_level(level);
            set.map_err(|_| SnapshotError::Internal { what: "a compressor" })?;
            self.level = level;
        }
        Ok(())
    }

    /// `text`, at most a frame, to be stored under `number`.
    pub(crate) fn pack(
        &mut self,
        sealer: &Sealer,
        number: u32,
        text: &[u8],
    ) -> Result<Vec<u8>, SnapshotError> {
        // One byte short of the text: what does not get smaller fails, and stays plain.
        let room = &mut self.compressed[..text.len().saturating_sub(1)];
        let compressed = self.compressor.compress_to_buffer(text, room).ok();
        let (kind, body) = match compressed {
            Some(length) => (COMPRESSED, &self.compressed[..length]),
            None => (PLAIN, text),
        };
        let mut stored = Vec::with_capacity(1 + body.len() + TAG_BYTES);
        stored.push(kind);
        stored.extend_from_slice(body);
        sealer.seal(number, &mut stored)?;
        Ok(stored)
    }
}

/// Why a stored frame is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bad {
    Key,
    Form,
}

/// What unpacks frames.
pub(crate) struct Unpacker(zstd::bulk::Decompressor<'static>);

impl Unpacker {
    pub(crate) fn new() -> Result<Self, SnapshotError> {
        let decompressor = zstd::bulk::Decompressor::new();
        decompressor.map(Self).map_err(|_| SnapshotError::Internal { what: "a decompressor" })
    }

    /// What was packed; it must have `length` bytes.
    pub(crate) fn unpack(
        &mut self,
        sealer: &Sealer,
        number: u32,
        mut stored: Vec<u8>,
        length: usize,
    ) -> Result<Vec<u8>, Bad> {
        sealer.open(number, &mut stored).ok_or(Bad::Key)?;
        let (kind, body) = stored.split_first().ok_or(Bad::Form)?;
        let text = match *kind {
            PLAIN => body.to_vec(),
            // More than is wanted has no room, and is an error.
            COMPRESSED => self.0.decompress(body, length).map_err(|_| Bad::Form)?,
            _ => return Err(Bad::Form),
        };
        if text.len() == length { Ok(text) } else { Err(Bad::Form) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Key;

    fn unpack(
        sealer: &Sealer,
        number: u32,
        stored: Vec<u8>,
        length: usize,
    ) -> Result<Vec<u8>, Bad> {
        Unpacker::new().unwrap().unpack(sealer, number, stored, length)
    }

    fn sealer() -> Sealer {
        Key::new([1; 32]).sealer(&[2; 16]).unwrap()
    }

    #[test]
    fn what_does_not_get_smaller_is_stored_as_it_is() {
        let noise: Vec<u8> = (0..FRAME_BYTES / 32)
            .flat_map(|number| *blake3::hash(&number.to_le_bytes()).as_bytes())
            .collect();
        let mut packer = Packer::new(1).unwrap();
        for (text, small) in [(vec![7; FRAME_BYTES], true), (noise, false), (vec![1; 4096], true)] {
            let stored = packer.pack(&sealer(), 3, &text).unwrap();
            assert_eq!(stored.len() < text.len() / 2, small);
            assert!(stored.len() <= STORED_BYTES_MAX);
            assert_eq!(unpack(&sealer(), 3, stored, text.len()).unwrap(), text);
        }
    }

    #[test]
    fn a_frame_of_another_length_or_kind_is_of_no_form() {
        let mut packer = Packer::new(1).unwrap();
        let stored = packer.pack(&sealer(), 0, &[7; 8192]).unwrap();
        for length in [4096, 8191, 8193] {
            assert_eq!(unpack(&sealer(), 0, stored.clone(), length), Err(Bad::Form));
        }
        assert_eq!(unpack(&sealer(), 1, stored, 8192), Err(Bad::Key));
        let mut other = vec![9, 1, 2];
        sealer().seal(0, &mut other).unwrap();
        assert_eq!(unpack(&sealer(), 0, other, 2), Err(Bad::Form));
    }
}

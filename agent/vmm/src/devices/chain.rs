//! One request of the driver: a chain of descriptors, read once, bounded and checked, as the pieces
//! of guest memory it names.

use std::collections::VecDeque;

use vm_memory::{VolatileSlice, bitmap::MS};

use super::queue::Broken;
use crate::vm::Memory;

/// A piece of guest memory. The guest may change it at any time.
pub(super) type Slice<'m> = VolatileSlice<'m, MS<'m, Memory>>;

/// A request: what the device may read, and after it what the device may write.
pub(super) struct Chain<'m> {
    pub(super) head: u16,
    pub(super) readable: Buffer<'m>,
    pub(super) writable: Buffer<'m>,
}

impl Chain<'_> {
    /// Of all its buffers.
    pub(super) fn bytes(&self) -> usize {
        self.readable.len().saturating_add(self.writable.len())
    }

    /// For queues on which the driver only sends.
    pub(super) fn only_readable(&self) -> Result<(), Broken> {
        if self.writable.is_empty() { Ok(()) } else { Err(Broken::Direction) }
    }

    /// For queues on which the driver only receives.
    pub(super) fn only_writable(&self) -> Result<(), Broken> {
        if self.readable.is_empty() { Ok(()) } else { Err(Broken::Direction) }
    }
}

/// Pieces of guest memory that count as one run of bytes.
#[derive(Default)]
pub(super) struct Buffer<'m> {
    slices: VecDeque<Slice<'m>>,
    len: usize,
}

impl<'m> Buffer<'m> {
    pub(super) fn push(&mut self, slice: Slice<'m>) {
        if !slice.is_empty() {
            self.len += slice.len();
            self.slices.push_back(slice);
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first piece. Never empty.
    pub(super) fn front(&self) -> Option<Slice<'m>> {
        self.slices.front().cloned()
    }

    pub(super) fn slices(&self) -> impl Iterator<Item = &Slice<'m>> {
        self.slices.iter()
    }

    /// Cuts the first `count` bytes off, or all of it when there are fewer.
    pub(super) fn take(&mut self, count: usize) -> Self {
        let mut front = Self::default();
        while front.len < count
            && let Some(slice) = self.slices.pop_front()
        {
            self.len -= slice.len();
            match slice.split_at(count - front.len) {
                Ok((wanted, rest)) => {
                    front.push(wanted);
                    if !rest.is_empty() {
                        self.len += rest.len();
                        self.slices.push_front(rest);
                    }
                }
                // The slice ends before the cut.
                Err(_) => front.push(slice),
            }
        }
        front
    }

    /// Puts what was cut off back to the front.
    pub(super) fn put_back(&mut self, front: Self) {
        self.len += front.len;
        for slice in front.slices.into_iter().rev() {
            self.slices.push_front(slice);
        }
    }

    /// Cuts the first `N` bytes off and copies them, so that they are read once. `None`: fewer are
    /// left.
    pub(super) fn read<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        (self.len >= N && self.copy(&mut bytes) == N).then_some(bytes)
    }

    /// Copies the front into `bytes`, as far as either reaches, and cuts it off. Returns the number
    /// of bytes.
    pub(super) fn copy(&mut self, bytes: &mut [u8]) -> usize {
        let mut copied = 0;
        for slice in self.take(bytes.len()).slices() {
            copied += slice.copy_to(&mut bytes[copied..]);
        }
        copied
    }

    /// Writes `bytes` to the front, as far as they fit, and cuts off what was written. Returns
    /// their number.
    pub(super) fn write(&mut self, bytes: &[u8]) -> usize {
        let mut written = 0;
        for slice in self.take(bytes.len()).slices() {
            slice.copy_from(&bytes[written..]);
            written += slice.len();
        }
        written
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

    use super::*;

    fn memory() -> Memory {
        Memory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap()
    }

    fn buffer<'m>(memory: &'m Memory, pieces: &[(u64, usize)]) -> Buffer<'m> {
        let mut buffer = Buffer::default();
        for (at, len) in pieces {
            let slices = memory.get_slices(GuestAddress(*at), *len, Permissions::ReadWrite);
            slices.unwrap().for_each(|slice| buffer.push(slice.unwrap()));
        }
        buffer
    }

    #[test]
    fn bytes_are_read_and_written_over_piece_borders() {
        let memory = memory();
        let mut target = buffer(&memory, &[(0x10, 3), (0x20, 1), (0x30, 9)]);
        assert_eq!(target.write(b"abcdef"), 6);
        assert_eq!(target.len(), 7);
        let mut source = buffer(&memory, &[(0x10, 3), (0x20, 1), (0x30, 2)]);
        assert_eq!(source.read::<4>(), Some(*b"abcd"));
        assert_eq!(source.read::<4>(), None, "two bytes are left");
        assert_eq!(source.read::<2>(), Some(*b"ef"));
        assert!(source.is_empty());
    }

    #[test]
    fn a_write_stops_where_the_buffer_ends() {
        let memory = memory();
        assert_eq!(buffer(&memory, &[(0x10, 3)]).write(b"abcdef"), 3);
        assert_eq!(memory.read_obj::<[u8; 4]>(GuestAddress(0x10)).unwrap(), *b"abc\0");
    }

    #[test]
    fn cutting_keeps_every_byte_once() {
        let memory = memory();
        for cut in 0..=14 {
            let mut rest = buffer(&memory, &[(0, 5), (5, 1), (6, 7)]);
            let front = rest.take(cut);
            assert_eq!((front.len(), rest.len()), (cut.min(13), 13 - cut.min(13)), "cut at {cut}");
            let sum: usize = front.slices().chain(rest.slices()).map(|slice| slice.len()).sum();
            assert_eq!(sum, 13, "cut at {cut}");
            rest.put_back(front);
            let all: Vec<_> = rest.slices().map(|slice| slice.len()).collect();
            assert_eq!((rest.len(), all.iter().sum()), (13, 13), "cut at {cut}");
        }
    }
}

//! One virtqueue of a running device, over the crate `virtio-queue`, which reads rings but ends a
//! bad chain in silence: here a chain is taken whole or the queue is [`Broken`].

use std::sync::Arc;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryError, Permissions};

use super::{
    chain::{Buffer, Chain},
    interrupt::Interrupt,
};
use crate::vm::Memory;

const DESCRIPTOR_BYTES: usize = 16;

/// What the driver did that a queue cannot go on from.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error("queue {queue} was not set up")]
    NotReady { queue: usize },
    #[error("queue {queue} has size {size}, which is not a power of two up to {max}")]
    Size { queue: usize, size: u32, max: u16 },
    #[error("queue {queue} has its {part} at {address:#x}, misaligned or outside of memory")]
    Place { queue: usize, part: &'static str, address: u64 },
    #[error("ring")]
    Ring(#[from] virtio_queue::Error),
    #[error("a chain ends in a descriptor that does not exist, loops or is too long")]
    ChainEnd,
    #[error("a descriptor names bytes outside of memory")]
    Memory(#[from] GuestMemoryError),
    #[error("a chain has buffers of the wrong direction")]
    Direction,
    #[error("a chain of {bytes} bytes is too short for {what}")]
    TooShort { what: &'static str, bytes: usize },
}

/// Whether a queue has more to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// Nothing until the driver kicks.
    Idle,
    /// The batch was used up.
    More,
}

/// What the driver wrote into the registers of one queue; checked when the device is started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct RingSetup {
    pub(super) size: u32,
    pub(super) ready: bool,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

/// A queue in use.
pub(super) struct Ring {
    queue: Queue,
    interrupt: Arc<Interrupt>,
}

impl Ring {
    /// Checks what the driver set up. `index` is for the error.
    pub(super) fn new(
        index: usize,
        setup: &RingSetup,
        max: u16,
        event_idx: bool,
        memory: &Memory,
        interrupt: Arc<Interrupt>,
    ) -> Result<Self, Broken> {
        if !setup.ready {
            return Err(Broken::NotReady { queue: index });
        }
        let wrong_size = Broken::Size { queue: index, size: setup.size, max };
        let Ok(size) = u16::try_from(setup.size) else { return Err(wrong_size) };
        let mut queue = Queue::new(max)?;
        if queue.try_set_size(size).is_err() {
            return Err(wrong_size);
        }
        let entries = usize::from(size);
        let place = |part, address, align: u64, bytes| {
            let inside = memory.check_range(GuestAddress(address), bytes, Permissions::ReadWrite);
            // Address 0 is where the crate takes a queue for one that was never set up.
            let fits = address != 0 && address.is_multiple_of(align) && inside;
            if fits {
                Ok(GuestAddress(address))
            } else {
                Err(Broken::Place { queue: index, part, address })
            }
        };
        queue.try_set_desc_table_address(place(
            "descriptor table",
            setup.descriptors,
            16,
            DESCRIPTOR_BYTES * entries,
        )?)?;
        // Flags, index and event field: six bytes beside the entries of either ring.
        queue.try_set_avail_ring_address(place(
            "available ring",
            setup.available,
            2,
            6 + 2 * entries,
        )?)?;
        queue.try_set_used_ring_address(place("used ring", setup.used, 4, 6 + 8 * entries)?)?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        Ok(Self { queue, interrupt })
    }

    /// The next request, or `None` when the driver has offered no more.
    pub(super) fn next<'m>(&mut self, memory: &'m Memory) -> Result<Option<Chain<'m>>, Broken> {
        let size = self.queue.size();
        let Some(descriptors) = self.queue.iter(memory)?.next() else { return Ok(None) };
        read_chain(descriptors, size, memory).map(Some)
    }

    /// Undoes the last [`Self::next`].
    pub(super) fn put_back(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns a request to the driver with `written` bytes of answer, and tells it if it asked to
    /// be told.
    pub(super) fn give_back(
        &mut self,
        memory: &Memory,
        head: u16,
        written: usize,
    ) -> Result<(), Broken> {
        // A chain is at most 2^32 bytes long, so this only ever caps that one length.
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        self.queue.add_used(memory, head, written)?;
        if self.queue.needs_notification(memory)? {
            self.interrupt.used_buffers();
        }
        Ok(())
    }

    /// Asks for a kick when the driver offers more. True: it has done so already.
    pub(super) fn ask_for_kick(&mut self, memory: &Memory) -> Result<bool, Broken> {
        Ok(self.queue.enable_notification(memory)?)
    }

    /// Handles up to `batch` requests; `handle` returns the bytes it wrote to a chain. The bound
    /// is there because a device looks at its orders and other fds only in between: a driver that
    /// never stops asking must not keep it from a pause.
    pub(super) fn serve(
        &mut self,
        memory: &Memory,
        batch: usize,
        mut handle: impl FnMut(Chain<'_>) -> Result<usize, Broken>,
    ) -> Result<Progress, Broken> {
        self.queue.disable_notification(memory)?;
        for _ in 0..batch {
            match self.next(memory)? {
                Some(chain) => {
                    let head = chain.head;
                    let written = handle(chain)?;
                    self.give_back(memory, head, written)?;
                }
                None if self.ask_for_kick(memory)? => {}
                None => return Ok(Progress::Idle),
            }
        }
        Ok(Progress::More)
    }
}

/// Reads a whole chain of at most `size` descriptors, the most the driver may use.
fn read_chain<'m>(
    mut descriptors: DescriptorChain<&'m Memory>,
    size: u16,
    memory: &'m Memory,
) -> Result<Chain<'m>, Broken> {
    let head = descriptors.head_index();
    let mut chain = Chain { head, readable: Buffer::default(), writable: Buffer::default() };
    for _ in 0..size {
        // The crate ends the chain where a descriptor is bad; one that promised a next is told by
        // that from a good end.
        let Some(descriptor) = descriptors.next() else { return Err(Broken::ChainEnd) };
        let bytes = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
        let target = if descriptor.is_write_only() {
            &mut chain.writable
        } else if chain.writable.is_empty() {
            &mut chain.readable
        } else {
            return Err(Broken::Direction);
        };
        for slice in memory.get_slices(descriptor.addr(), bytes, Permissions::ReadWrite)? {
            target.push(slice?);
        }
        if !descriptor.has_next() {
            return Ok(chain);
        }
    }
    Err(Broken::ChainEnd)
}

#[cfg(test)]
mod tests;

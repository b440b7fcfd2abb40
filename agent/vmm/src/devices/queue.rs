//! One virtqueue of a running device, over the crate `virtio-queue`, which reads rings but ends a
//! bad chain in silence: here a chain is taken whole or the queue is [`Broken`].

use std::{
    io,
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
    time::Instant,
};

use serde::{Deserialize, Serialize};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT, desc::split::Descriptor};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, Permissions};

use super::{
    chain::{Buffer, Chain},
    interrupt::Interrupt,
    rate::Throttle,
    saved::RingState,
};
use crate::vm::Memory;

const DESCRIPTOR_BYTES: usize = 16;
/// Of a ring's flags and index, before its entries.
const RING_HEADER_BYTES: u64 = 4;
const USED_ENTRY_BYTES: u64 = 8;

/// What a device cannot go on from: mostly what the driver did.
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
    #[error("a chain of {bytes} bytes is too long for {what}")]
    TooLong { what: &'static str, bytes: usize },
    #[error("page {page:#x} is not one of the guest's memory")]
    Page { page: u64 },
    #[error("the host refused to {what}")]
    Host {
        what: &'static str,
        #[source]
        source: io::Error,
    },
}

/// Whether a queue has more to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// Nothing until the driver kicks, or an fd of the device is ready.
    Idle,
    /// Nothing before this moment, for a rate is used up.
    At(Instant),
    /// The batch was used up.
    More,
}

impl Progress {
    /// Of two things to do, the one that comes first.
    pub(super) fn or(self, other: Self) -> Self {
        match (self, other) {
            (Self::More, _) | (_, Self::More) => Self::More,
            (Self::At(one), Self::At(two)) => Self::At(one.min(two)),
            (Self::Idle, other) => other,
            (this, Self::Idle) => this,
        }
    }
}

/// What the driver wrote into the registers of one queue; checked when the device is started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
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
    event_idx: bool,
    /// Requests returned since the driver was last told, or found not to want to be.
    untold: u16,
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
        Ok(Self { queue, event_idx, untold: 0, interrupt })
    }

    /// Where it stands.
    pub(super) fn save(&self) -> RingState {
        RingState {
            next_available: self.queue.next_avail(),
            next_used: self.queue.next_used(),
            untold: self.untold,
        }
    }

    /// Goes on where another process stood. Any numbers do no more harm than a driver could: what
    /// lies in the ring is checked when it is taken.
    pub(super) fn restore(&mut self, state: RingState) {
        self.queue.set_next_avail(state.next_available);
        self.queue.set_next_used(state.next_used);
        self.untold = state.untold;
    }

    /// The next request, or `None` when the driver has offered no more.
    pub(super) fn next<'m>(&mut self, memory: &'m Memory) -> Result<Option<Chain<'m>>, Broken> {
        let size = self.queue.size();
        let Some(descriptors) = self.queue.iter(memory)?.next() else { return Ok(None) };
        read_chain(descriptors, size, memory).map(Some)
    }

    /// The next request as the places it names, for a device that wants these and no bytes. What
    /// lies outside of memory is the device's to refuse.
    pub(super) fn next_places(&mut self, memory: &Memory) -> Result<Option<Places>, Broken> {
        let size = self.queue.size();
        let Some(descriptors) = self.queue.iter(memory)?.next() else { return Ok(None) };
        let mut places = Places { head: descriptors.head_index(), writable: Vec::new() };
        walk(descriptors, size, |descriptor| {
            if !descriptor.is_write_only() {
                return Err(Broken::Direction);
            }
            places.writable.push((descriptor.addr(), descriptor.len()));
            Ok(())
        })?;
        Ok(Some(places))
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
        self.queue.add_used(memory, head, length(written))?;
        self.untold = self.untold.wrapping_add(1);
        self.tell(memory)
    }

    /// Returns several requests, each with the bytes written to it, that make one answer: the
    /// driver sees all of them at once.
    pub(super) fn give_back_all(
        &mut self,
        memory: &Memory,
        used: &[(u16, usize)],
    ) -> Result<(), Broken> {
        let Some((&(head, written), others)) = used.split_last() else { return Ok(()) };
        for &(head, written) in others {
            let next = self.queue.next_used();
            let slot = u64::from(next % self.queue.size());
            let at = self.queue.used_ring() + RING_HEADER_BYTES + USED_ENTRY_BYTES * slot;
            let entry = [u32::from(head).to_le_bytes(), length(written).to_le_bytes()].concat();
            memory.write_slice(&entry, GuestAddress(at))?;
            self.queue.set_next_used(next.wrapping_add(1));
            self.untold = self.untold.wrapping_add(1);
        }
        // The index that this one moves on shows them all.
        self.give_back(memory, head, written)
    }

    /// Raises the interrupt if the driver wants it for what has come back. The queue of the crate
    /// keeps this account too, but only of what it returned one by one.
    fn tell(&mut self, memory: &Memory) -> Result<(), Broken> {
        // The driver changes the event field and then looks at the ring; we the other way round.
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let entries = 2 * u64::from(self.queue.size());
            let at = GuestAddress(self.queue.avail_ring() + RING_HEADER_BYTES + entries);
            let event = u16::from_le(memory.load(at, Ordering::Relaxed)?);
            let since_event = self.queue.next_used().wrapping_sub(event).wrapping_sub(1);
            since_event < self.untold
        } else {
            true
        };
        self.untold = 0;
        if wanted {
            self.interrupt.used_buffers();
        }
        Ok(())
    }

    /// Wants no kicks until it asks for one.
    pub(super) fn refuse_kicks(&mut self, memory: &Memory) -> Result<(), Broken> {
        Ok(self.queue.disable_notification(memory)?)
    }

    /// Asks for a kick when the driver offers more. True: it has done so already.
    pub(super) fn ask_for_kick(&mut self, memory: &Memory) -> Result<bool, Broken> {
        Ok(self.queue.enable_notification(memory)?)
    }

    /// How many requests the driver has ever offered, modulo 2^16.
    pub(super) fn offered(&self, memory: &Memory) -> Result<u16, Broken> {
        Ok(self.queue.avail_idx(memory, Ordering::Acquire)?.0)
    }

    /// Asks for a kick when the driver has offered more than `offered`, while requests it offered
    /// before that are left. True: it has done so already.
    pub(super) fn ask_for_kick_after(
        &mut self,
        memory: &Memory,
        offered: u16,
    ) -> Result<bool, Broken> {
        // Without the event field this asks for every kick.
        self.queue.enable_notification(memory)?;
        if self.event_idx {
            let entries = USED_ENTRY_BYTES * u64::from(self.queue.size());
            let at = GuestAddress(self.queue.used_ring() + RING_HEADER_BYTES + entries);
            memory.store(offered.to_le(), at, Ordering::Relaxed)?;
            // The driver moves its index and then looks at the event field; we the other way round.
            fence(Ordering::SeqCst);
        }
        Ok(self.offered(memory)? != offered)
    }

    /// Handles up to `batch` requests, none before `throttle` lets it; `handle` returns the bytes
    /// it wrote to a chain. The bound is there because a device looks at its orders and other fds
    /// only in between: a driver that never stops asking must not keep it from a pause.
    pub(super) fn serve(
        &mut self,
        memory: &Memory,
        batch: usize,
        throttle: &mut Throttle,
        now: Instant,
        mut handle: impl FnMut(Chain<'_>) -> Result<usize, Broken>,
    ) -> Result<Progress, Broken> {
        self.refuse_kicks(memory)?;
        for _ in 0..batch {
            if let Some(until) = throttle.held_until(now) {
                return Ok(Progress::At(until));
            }
            match self.next(memory)? {
                Some(chain) => {
                    throttle.spend(chain.bytes());
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

/// A request as the places it names, all of them for the device to write.
pub(super) struct Places {
    pub(super) head: u16,
    pub(super) writable: Vec<(GuestAddress, u32)>,
}

/// A chain is at most 2^32 bytes long, so this only ever caps that one length.
fn length(written: usize) -> u32 {
    u32::try_from(written).unwrap_or(u32::MAX)
}

/// Shows each descriptor of a chain of at most `size`, the most the driver may use.
fn walk(
    mut descriptors: DescriptorChain<&Memory>,
    size: u16,
    mut show: impl FnMut(Descriptor) -> Result<(), Broken>,
) -> Result<(), Broken> {
    for _ in 0..size {
        // The crate ends the chain where a descriptor is bad; one that promised a next is told by
        // that from a good end.
        let Some(descriptor) = descriptors.next() else { return Err(Broken::ChainEnd) };
        show(descriptor)?;
        if !descriptor.has_next() {
            return Ok(());
        }
    }
    Err(Broken::ChainEnd)
}

/// Reads a whole chain.
fn read_chain<'m>(
    descriptors: DescriptorChain<&'m Memory>,
    size: u16,
    memory: &'m Memory,
) -> Result<Chain<'m>, Broken> {
    let head = descriptors.head_index();
    let mut chain = Chain { head, readable: Buffer::default(), writable: Buffer::default() };
    walk(descriptors, size, |descriptor| {
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
        Ok(())
    })?;
    Ok(chain)
}

#[cfg(test)]
mod tests;

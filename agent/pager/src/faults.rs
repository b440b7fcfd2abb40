//! Guest memory of another process, page by page as it is missed.

use std::{
    io,
    os::fd::OwnedFd,
    sync::atomic::{AtomicU64, Ordering},
};

use holdfast_wire::pager::Region;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use crate::{PagerError, sys};

const PAGE_BYTES: usize = 4096;
/// Faults taken from the kernel at once: no guest has more vCPUs and devices that wait.
const MESSAGES_MAX: usize = 64;

/// The VMM's guest memory and the descriptor that tells what is missing in it.
#[derive(Debug)]
pub(crate) struct Memory {
    faults: OwnedFd,
    regions: Vec<Region>,
    /// Bytes put.
    pub(crate) put: AtomicU64,
}

/// Whether the guest is there still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Guest {
    There,
    Gone,
}

impl Memory {
    /// `regions` must be of whole pages and together as long as the image.
    pub(crate) fn new(
        faults: OwnedFd,
        regions: Vec<Region>,
        bytes: u64,
    ) -> Result<Self, PagerError> {
        let paged = |number: u64| number.is_multiple_of(PAGE_BYTES as u64);
        let mut found: u64 = 0;
        let sound = regions.iter().all(|region| {
            let follows = region.offset == found;
            found = found.saturating_add(region.bytes);
            let ends = region.address.checked_add(region.bytes).is_some();
            follows && ends && paged(region.address) && paged(region.bytes)
        });
        if !sound || found != bytes {
            return Err(PagerError::Regions { found, wanted: bytes });
        }
        Ok(Self { faults, regions, put: AtomicU64::new(0) })
    }

    /// Puts `text` where byte `at` of the image is, but for what is there already.
    pub(crate) fn put(&self, mut at: u64, mut text: &[u8]) -> Result<Guest, PagerError> {
        while !text.is_empty() {
            let (address, room) = self.place(at).ok_or(PagerError::Outside { address: at })?;
            let here = text.len().min(usize::try_from(room).unwrap_or(usize::MAX));
            let done = match sys::copy(&self.faults, address, &text[..here]) {
                Ok(copied) => {
                    self.put.fetch_add(copied as u64, Ordering::Relaxed);
                    copied
                }
                Err(error) => match error.raw_os_error().map(Errno::from_raw_os_error) {
                    // Another put it; who waits for it may have been told to by a pager that died.
                    Some(Errno::EXIST) => {
                        self.wake(address)?;
                        PAGE_BYTES
                    }
                    // Its mappings were just changing.
                    Some(Errno::AGAIN) => 0,
                    Some(Errno::SRCH | Errno::NOENT) => return Ok(Guest::Gone),
                    _ => return Err(PagerError::Put { address, source: error }),
                },
            };
            at += done as u64;
            text = &text[done..];
        }
        Ok(Guest::There)
    }

    fn wake(&self, address: u64) -> Result<(), PagerError> {
        match sys::wake(&self.faults, address, PAGE_BYTES as u64) {
            // The guest is gone: nobody waits.
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
                Err(PagerError::Put { address, source: error })
            }
            _ => Ok(()),
        }
    }

    /// Byte `at` of the image in the VMM, and how many bytes of the region follow it.
    fn place(&self, at: u64) -> Option<(u64, u64)> {
        self.regions.iter().find_map(|region| {
            let inside = at.checked_sub(region.offset).filter(|inside| *inside < region.bytes)?;
            Some((region.address + inside, region.bytes - inside))
        })
    }

    /// Bytes of the image that are waited for: at least one, unless `patience` is over.
    pub(crate) fn wait(&self, patience: Timespec) -> Result<Vec<u64>, PagerError> {
        let mut watched = [PollFd::new(&self.faults, PollFlags::IN)];
        match poll(&mut watched, Some(&patience)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(PagerError::Faults(error.into())),
        }
        let mut bytes = [0; MESSAGES_MAX * sys::MESSAGE_BYTES];
        let length = match rustix::io::read(&self.faults, &mut bytes) {
            Ok(length) => length,
            // Nothing, or it was answered in between.
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(error) => return Err(PagerError::Faults(error.into())),
        };
        let (messages, _) = bytes[..length].as_chunks::<{ sys::MESSAGE_BYTES }>();
        let messages = messages.iter().map(sys::Message::of);
        messages
            .filter(|message| message.event == sys::PAGE_FAULT)
            .map(|message| self.of_address(message.address))
            .collect()
    }

    fn of_address(&self, address: u64) -> Result<u64, PagerError> {
        let found = self.regions.iter().find_map(|region| {
            let inside = address.checked_sub(region.address)?;
            (inside < region.bytes).then_some(region.offset + inside)
        });
        found.ok_or(PagerError::Outside { address })
    }

    /// From now on what is missing is zero, and nobody waits.
    pub(crate) fn release(&self) -> Result<(), PagerError> {
        for region in &self.regions {
            match sys::unregister(&self.faults, region.address, region.bytes) {
                Err(error) if !is_gone(&error) => {
                    return Err(PagerError::Put { address: region.address, source: error });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENOENT | libc::ENOMEM))
}

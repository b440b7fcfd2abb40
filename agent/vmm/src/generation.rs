//! The generation id (ACPI's VMGENCTR): 16 random bytes in guest memory that change when this
//! machine goes on as another one, so that two copies do not draw the same random numbers.

use std::io;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_sys_util::eventfd::EventFd;

use crate::{layout::GENERATION_ID, random, vm::Memory};

const ID_BYTES: usize = 16;

#[derive(Debug, thiserror::Error)]
pub(crate) enum GenerationError {
    #[error("no random bytes for the generation id")]
    Random(#[source] io::Error),
    #[error("generation id cannot be written to guest memory")]
    Write(#[source] GuestMemoryError),
    #[error("the guest cannot be told of its generation id")]
    Tell(#[source] io::Error),
}

/// The line that tells the guest of a change; ACPI's event device is at its other end.
pub(crate) struct Generation {
    line: EventFd,
}

impl Generation {
    pub(crate) fn new(line: EventFd) -> Self {
        Self { line }
    }

    /// Stores a new id, then tells the guest, which reads it anew.
    pub(crate) fn renew(&self, memory: &Memory) -> Result<(), GenerationError> {
        store(memory)?;
        self.line.write(1).map_err(GenerationError::Tell)
    }
}

/// Stores a new id. Enough before a guest has read the first one.
pub(crate) fn store(memory: &Memory) -> Result<(), GenerationError> {
    let mut id = [0; ID_BYTES];
    random::fill(&mut id).map_err(GenerationError::Random)?;
    memory.write_slice(&id, GuestAddress(GENERATION_ID)).map_err(GenerationError::Write)
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    fn id(memory: &Memory) -> [u8; ID_BYTES] {
        memory.read_obj(GuestAddress(GENERATION_ID)).unwrap()
    }

    #[test]
    fn every_renewal_stores_another_id_and_raises_the_line() {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let generation = Generation::new(line.try_clone().unwrap());
        store(&memory).unwrap();
        let first = id(&memory);
        assert!(line.read().is_err(), "told before anything changed");
        generation.renew(&memory).unwrap();
        assert_ne!(id(&memory), first);
        assert_eq!(line.read().unwrap(), 1);
    }
}

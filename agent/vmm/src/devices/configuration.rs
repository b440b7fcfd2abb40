//! A device's configuration space: bytes the driver reads, for some devices a few it writes, and
//! for some a few that the host changes.

use std::{
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

/// Cloning shares it: vCPUs access it through the device's window, others by these methods.
#[derive(Debug, Clone)]
pub(super) struct Configuration {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    bytes: Mutex<Vec<u8>>,
    /// What a driver may write.
    writable: Range<usize>,
    /// Changes with every change by the host, so that a driver which reads in several steps sees
    /// that it must begin anew.
    generation: AtomicU32,
}

impl Configuration {
    /// Bytes that never change.
    pub(super) fn fixed(bytes: Vec<u8>) -> Self {
        Self::with_writable(bytes, 0..0)
    }

    /// Bytes of which the driver may write those of `writable`.
    pub(super) fn with_writable(bytes: Vec<u8>, writable: Range<usize>) -> Self {
        let generation = AtomicU32::new(0);
        Self { shared: Arc::new(Shared { bytes: Mutex::new(bytes), writable, generation }) }
    }

    /// A load by the guest at `at`. Behind the end `data` stays as it is.
    pub(super) fn read(&self, at: u32, data: &mut [u8]) {
        let bytes = self.bytes();
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        let rest = bytes.get(at..).unwrap_or_default();
        let count = rest.len().min(data.len());
        data[..count].copy_from_slice(&rest[..count]);
    }

    /// A store by the guest at `at`: ignored unless all of it may be written.
    pub(super) fn driver_writes(&self, at: u32, data: &[u8]) {
        let from = usize::try_from(at).unwrap_or(usize::MAX);
        let to = from.saturating_add(data.len());
        let Range { start, end } = self.shared.writable;
        if start <= from
            && to <= end
            && let Some(target) = self.bytes().get_mut(from..to)
        {
            target.copy_from_slice(data);
        }
    }

    /// The little-endian number at `at`; 0 behind the end.
    pub(super) fn number(&self, at: u32) -> u32 {
        let mut word = [0; 4];
        self.read(at, &mut word);
        u32::from_le_bytes(word)
    }

    /// Changes the number at `at`. The driver is to be told.
    pub(super) fn set_number(&self, at: u32, number: u32) {
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        if let Some(word) = self.bytes().get_mut(at..).and_then(|rest| rest.first_chunk_mut()) {
            *word = number.to_le_bytes();
        }
        self.shared.generation.fetch_add(1, Ordering::SeqCst);
    }

    pub(super) fn generation(&self) -> u32 {
        self.shared.generation.load(Ordering::SeqCst)
    }

    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        // Plain bytes, whole after every step.
        self.shared.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(configuration: &Configuration) -> Vec<u8> {
        let mut bytes = vec![0xee; 10];
        configuration.read(0, &mut bytes);
        bytes
    }

    #[test]
    fn reads_end_where_the_bytes_do() {
        let configuration = Configuration::fixed(vec![1, 2, 3]);
        assert_eq!(all(&configuration), [1, 2, 3, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee]);
        configuration.read(u32::MAX, &mut [0; 4]);
        assert_eq!(configuration.number(1), u32::from_le_bytes([2, 3, 0, 0]));
    }

    #[test]
    fn a_driver_writes_only_where_it_may_and_only_whole() {
        let configuration = Configuration::with_writable(vec![0; 8], 4..8);
        for (at, data) in [(0, &[1; 4][..]), (2, &[1; 4]), (6, &[1; 4]), (u32::MAX, &[1; 8])] {
            configuration.driver_writes(at, data);
            assert_eq!(all(&configuration)[..8], [0; 8], "at {at}");
        }
        configuration.driver_writes(5, &[7, 8]);
        assert_eq!(all(&configuration)[..8], [0, 0, 0, 0, 0, 7, 8, 0]);
    }

    #[test]
    fn a_change_by_the_host_moves_the_generation_on() {
        let configuration = Configuration::fixed(vec![0; 8]);
        configuration.set_number(4, 0x0102_0304);
        assert_eq!((configuration.number(4), configuration.generation()), (0x0102_0304, 1));
    }
}

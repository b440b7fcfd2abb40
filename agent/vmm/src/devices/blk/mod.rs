//! Block device (virtio 1.2, section 5.2): one or several files, laid end to end, as one disk.

mod backing;
mod counters;
mod device;
mod request;
mod state;
mod worker;

pub(super) use backing::DiskError;
pub(super) use counters::DiskCounters;
pub(super) use device::device;
pub(super) use state::State;

#[cfg(test)]
mod tests;

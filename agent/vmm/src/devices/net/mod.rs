//! Network device (virtio 1.2, section 5.1) on a tap, with the work of checksums and of cutting
//! large segments left to whoever is last to touch a frame.
//!
//! Frames to the guest go over several of its buffers where one is too small (mergeable buffers):
//! a guest that takes large segments would otherwise have to keep 64 KiB of memory for every frame
//! it waits for, and so for every bare acknowledgement.

mod counters;
mod device;
mod header;
#[cfg(any(test, feature = "fuzzing"))]
pub(super) mod stand;
mod state;
mod sys;
mod tap;
mod worker;

pub(super) use counters::NetworkCounters;
pub(super) use device::device;
pub(super) use state::State;
pub(super) use tap::TapError;

#[cfg(test)]
mod tests;

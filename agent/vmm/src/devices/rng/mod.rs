//! Entropy device (virtio 1.2, section 5.4): fills the driver's buffers from the host's random
//! number generator.

mod device;
mod state;
mod worker;

pub(super) use device::device;
pub(super) use state::State;

#[cfg(test)]
mod tests;

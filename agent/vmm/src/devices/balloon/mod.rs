//! Memory balloon (virtio 1.2, section 5.5): pages that the guest does not use go back to the host,
//! those it gives up when told to and those it reports as free.
//!
//! No statistics queue: it would wake the guest for numbers that PID 1 tells better.

mod device;
mod pages;
mod state;
mod worker;

pub(super) use device::{Balloon, device};
pub(super) use state::State;

#[cfg(test)]
mod tests;

//! Socket device (virtio 1.2, section 5.10), without the host's vsock: the host side of every
//! connection is a Unix stream socket, accepted from an inherited listener.
//!
//! The crate `virtio-vsock` is not used: it reads chains of at most two descriptors, while Linux
//! from 6.17 on sends its data in as many pieces as its memory has.

mod connection;
mod counters;
mod credit;
mod device;
mod greeting;
mod host;
mod packet;
mod state;
mod table;
mod worker;

pub(super) use counters::VsockCounters;
pub(super) use device::device;
pub(super) use state::State;

#[cfg(test)]
mod tests;

//! Bytes between our own processes: one framing, and the messages of VMM control, guest RPC,
//! image conversion, paging and egress. No sockets and no async here: callers bring the bytes.
#![forbid(unsafe_code)]

pub mod convert;
pub mod egress;
pub mod frame;
pub mod guest;
pub mod pager;
pub mod vmm;

/// Version of every message in this crate, sent in the first message of a connection. Both ends
/// ship together; a guest resumed from an older snapshot is the one peer that may differ.
pub const WIRE_VERSION: u16 = 3;

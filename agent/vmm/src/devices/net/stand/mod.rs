//! What tests and fuzz targets of a network stand on: a real tap in a network namespace of its own.

mod sys;

pub(crate) use sys::{leave_network, tap};

/// What the VMM wants a tap to be made with.
pub(crate) const FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

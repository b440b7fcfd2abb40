//! Writes cpio archives in the form the kernel unpacks as its initramfs, and lists what goes into
//! the guest's and the host's.
//!
//! Form: "newc" of `Documentation/driver-api/early-userspace/buffer-format.rst`. Inode numbers
//! count up and times are zero, so that the same contents give the same bytes.
#![forbid(unsafe_code)]

mod cpio;
pub mod guest;
pub mod host;

pub use cpio::{Cpio, CpioError};

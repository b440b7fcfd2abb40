//! The one call for which no safe wrapper exists.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// The network namespace in which a tap lies.
pub(super) fn network_of(tap: &OwnedFd) -> io::Result<OwnedFd> {
    // SAFETY: SIOCGSKNS takes no argument, and `tap` is borrowed, so open.
    let fd = unsafe { libc::ioctl(tap.as_raw_fd(), libc::SIOCGSKNS as _) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

//! The calls of the VMM's core for which no safe wrapper exists.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd},
};

/// Takes ownership of the inherited fd `fd`. The caller ([`crate::inherited`]) does so before
/// anything in this process opened an fd, and at most once a number.
pub(crate) fn claim_fd(fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD takes no pointer; on a closed number it fails with EBADF.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the fd is open (checked above) and nobody else owns it: it came by inheritance, no
    // fd has been opened by this process yet, and the caller claims each number once.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

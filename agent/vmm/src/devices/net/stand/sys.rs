//! Making a tap, and a network namespace for it, for tests: no safe wrapper exists.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use fs_err::OpenOptions;

/// Makes the tap interface `name`, as the VMM wants it, in this thread's network namespace.
pub(crate) fn tap(name: &str, flags: i32) -> io::Result<OwnedFd> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: a struct of integers and a union of plain data, for all of which zeros are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes().take(15)) {
        *place = byte.cast_signed();
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).map_err(io::Error::other)?;
    // SAFETY: TUNSETIFF reads and writes one ifreq, the type of `request`, which lives through the
    // call.
    let made = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if made < 0 { Err(io::Error::last_os_error()) } else { Ok(device.into_parts().0.into()) }
}

/// Moves this thread into a network namespace of its own, with nothing in it.
pub(crate) fn leave_network() -> io::Result<()> {
    // SAFETY: takes no pointer; only this thread's view of networks changes, no memory or fd.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

//! Socket options for which no safe wrapper exists.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

/// Switches an option of IP on.
pub(crate) fn switch_on(socket: impl AsFd, option: i32) {
    let on: libc::c_int = 1;
    let length = libc::socklen_t::try_from(size_of::<libc::c_int>()).unwrap();
    let socket = socket.as_fd().as_raw_fd();
    // SAFETY: `on` is a live c_int, and the length says so.
    let outcome =
        unsafe { libc::setsockopt(socket, libc::SOL_IP, option, (&raw const on).cast(), length) };
    assert_eq!(outcome, 0, "{}", io::Error::last_os_error());
}

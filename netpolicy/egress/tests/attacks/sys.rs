//! Calls for which no safe wrapper exists.
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

/// CPU time that a process has used so far, of all its threads, up to this moment.
pub(crate) fn cpu_time_of(process: u32) -> std::time::Duration {
    let process = libc::pid_t::try_from(process).unwrap();
    let mut clock: libc::clockid_t = 0;
    // SAFETY: `clock` is a live clockid_t, which the call writes.
    let outcome = unsafe { libc::clock_getcpuclockid(process, &raw mut clock) };
    assert_eq!(outcome, 0, "process {process} has no clock");
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a live timespec, which the call writes.
    let outcome = unsafe { libc::clock_gettime(clock, &raw mut time) };
    assert_eq!(outcome, 0, "{}", io::Error::last_os_error());
    let (seconds, nanoseconds) = (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec));
    std::time::Duration::new(seconds.unwrap(), nanoseconds.unwrap())
}

//! Starting a program with one fd at a fixed number, for which no safe wrapper exists.
#![allow(unsafe_code)]

use std::{
    io,
    os::{fd::RawFd, unix::process::CommandExt},
    process::Command,
};

/// The child will find `from`, which must stay open until the spawn, at number `to`.
pub(super) fn place_fd(command: &mut Command, from: RawFd, to: RawFd) {
    let place = move || {
        // SAFETY: dup2 takes two numbers and no pointer; it replaces whatever was at `to` in the
        // child alone, where no destructor will run any more.
        if unsafe { libc::dup2(from, to) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: between fork and exec the closure makes one async-signal-safe call, and allocates
    // nothing (`last_os_error` only reads errno).
    unsafe { command.pre_exec(place) };
}

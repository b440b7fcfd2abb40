//! Calls on a tap for which no safe wrapper exists: its ioctls, and sending straight out of guest
//! memory, over which no Rust slice may be made.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use crate::devices::chain::Buffer;

/// Flags of the interface behind `tap`. Fails on what is no tap, and on one without an interface.
pub(super) fn interface_flags(tap: BorrowedFd<'_>) -> io::Result<i32> {
    // SAFETY: a struct of integers and a union of plain data, for all of which zeros are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: TUNGETIFF writes one ifreq, the type of `request`, which lives through the call.
    checked(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNGETIFF, &raw mut request) })?;
    // SAFETY: TUNGETIFF fills in the name and these flags; all of the union was zeroed before.
    Ok(unsafe { request.ifr_ifru.ifru_flags }.into())
}

/// Sets the length of the header in front of each frame.
pub(super) fn set_header_bytes(tap: BorrowedFd<'_>, bytes: i32) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads one int, which lives through the call.
    checked(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const bytes) })
}

/// Says what whoever reads frames here can do by itself (TUN_F_*).
pub(super) fn set_offload(tap: BorrowedFd<'_>, flags: u32) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument as a number and no pointer.
    checked(unsafe {
        libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags))
    })
}

/// Sends one frame: `header`, and behind it all of `frame`.
pub(super) fn send(tap: BorrowedFd<'_>, header: &[u8], frame: &Buffer<'_>) -> io::Result<()> {
    let guards: Vec<_> = frame.slices().map(|slice| slice.ptr_guard_mut()).collect();
    let mut pieces = Vec::with_capacity(guards.len() + 1);
    // The kernel only reads what it is pointed to here; iovec has no const form.
    let start = header.as_ptr().cast_mut().cast();
    pieces.push(libc::iovec { iov_base: start, iov_len: header.len() });
    pieces.extend(
        guards
            .iter()
            .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() }),
    );
    let count = libc::c_int::try_from(pieces.len()).map_err(io::Error::other)?;
    // SAFETY: the first iovec is `header`, borrowed for the call; each other is one slice of guest
    // memory, whose bounds vm-memory checked when it made the slice and whose mapping the slice
    // borrows, held by `frame` until after the call. The kernel reads all of them and writes none;
    // what the guest changes meanwhile ends up in its own frame in one form or the other. `pieces`
    // lives through the call and has `count` entries.
    let sent = unsafe { libc::writev(tap.as_raw_fd(), pieces.as_ptr(), count) };
    // A tap takes a frame whole or not at all.
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

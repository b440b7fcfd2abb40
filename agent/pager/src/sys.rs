//! The calls of userfaultfd(2), for which no safe wrapper exists, and inherited fds.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// `ioctl(2)` requests of `linux/userfaultfd.h`.
pub(crate) const UNREGISTER: u64 = 0x8010_aa01;
pub(crate) const WAKE: u64 = 0x8010_aa02;
pub(crate) const COPY: u64 = 0xc028_aa03;

/// `struct uffd_msg`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Message {
    pub(crate) event: u8,
    reserved: [u8; 7],
    pub(crate) flags: u64,
    pub(crate) address: u64,
    thread: u64,
}

/// A page is missing.
pub(crate) const PAGE_FAULT: u8 = 0x12;
pub(crate) const MESSAGE_BYTES: usize = size_of::<Message>();
const _: () = assert!(MESSAGE_BYTES == 32);

impl Message {
    /// Of its bytes as the kernel wrote them.
    pub(crate) fn of(bytes: &[u8; MESSAGE_BYTES]) -> Self {
        let number = |at: usize| {
            let mut eight = [0; 8];
            eight.copy_from_slice(&bytes[at..at + 8]);
            u64::from_ne_bytes(eight)
        };
        Self {
            event: bytes[0],
            reserved: [0; 7],
            flags: number(8),
            address: number(16),
            thread: number(24),
        }
    }
}

#[repr(C)]
struct Range {
    start: u64,
    bytes: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    bytes: u64,
    mode: u64,
    copied: i64,
}

/// Puts `text` at `address` of the memory that `faults` watches and wakes who waits for it. How many
/// bytes were put; an error if it is none.
pub(crate) fn copy(faults: &OwnedFd, address: u64, text: &[u8]) -> io::Result<usize> {
    let mut copy = Copy {
        to: address,
        from: text.as_ptr().expose_provenance() as u64,
        bytes: text.len() as u64,
        mode: 0,
        copied: 0,
    };
    // SAFETY: the kernel reads `bytes` bytes of `text`, which is borrowed for the call, writes to
    // memory of another process, and writes `copied` into a structure of the layout it expects.
    let outcome = unsafe { libc::ioctl(faults.as_raw_fd(), COPY, &raw mut copy) };
    let error = io::Error::last_os_error();
    match usize::try_from(copy.copied) {
        Ok(copied) if outcome == 0 || copied > 0 => Ok(copied),
        _ => Err(error),
    }
}

/// Wakes whoever waits for a page in the range, to look again.
pub(crate) fn wake(faults: &OwnedFd, start: u64, bytes: u64) -> io::Result<()> {
    on_range(faults, WAKE, start, bytes)
}

/// Watches the range no longer: what is missing in it reads as zeros from now on.
pub(crate) fn unregister(faults: &OwnedFd, start: u64, bytes: u64) -> io::Result<()> {
    on_range(faults, UNREGISTER, start, bytes)
}

fn on_range(faults: &OwnedFd, request: u64, start: u64, bytes: u64) -> io::Result<()> {
    let range = Range { start, bytes };
    // SAFETY: the kernel reads one structure of this layout, alive during the call, and touches no
    // memory of this process.
    let outcome = unsafe { libc::ioctl(faults.as_raw_fd(), request, &raw const range) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Takes ownership of an inherited fd. The caller does so before anything in this process opened
/// one, and at most once a number.
pub(crate) fn claim(fd: i32) -> Option<OwnedFd> {
    // SAFETY: F_GETFD takes no pointer; on a closed number it fails.
    if fd <= 2 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return None;
    }
    // SAFETY: it is open (checked above) and nobody else owns it: it came by inheritance, and the
    // caller claims each number once.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

//! File I/O straight into and out of guest memory, for which no safe wrapper exists: Rust slices
//! may not be made over memory that a guest changes meanwhile.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use vm_memory::bitmap::Bitmap;

use super::chain::Buffer;
use crate::limits::blk::PIECES_MAX;

/// Reads from `file` at `offset` into the front of `target`. Returns the bytes read; 0 is the end
/// of the file.
pub(super) fn read_at(file: BorrowedFd<'_>, target: &Buffer<'_>, offset: u64) -> io::Result<usize> {
    read_with(file, target, offset, 0)
}

/// As [`read_at`], of what the host has in memory. `WouldBlock`: it has not, and reads it now.
/// `Unsupported`: the file system cannot tell.
pub(super) fn read_cached_at(
    file: BorrowedFd<'_>,
    target: &Buffer<'_>,
    offset: u64,
) -> io::Result<usize> {
    read_with(file, target, offset, libc::RWF_NOWAIT)
}

fn read_with(
    file: BorrowedFd<'_>,
    target: &Buffer<'_>,
    offset: u64,
    flags: libc::c_int,
) -> io::Result<usize> {
    let offset = file_offset(offset)?;
    let guards: Vec<_> = target.slices().take(PIECES_MAX).map(|s| s.ptr_guard_mut()).collect();
    let pieces: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() })
        .collect();
    // SAFETY: each iovec is one slice of guest memory, whose bounds vm-memory checked when it made
    // the slice and whose mapping the slice borrows, held by `target` until after the call. No Rust
    // reference to guest memory exists, so the kernel writing to it invalidates none. `pieces`
    // lives through the call and holds at most PIECES_MAX entries, which fits a c_int.
    let count = unsafe {
        libc::preadv2(file.as_raw_fd(), pieces.as_ptr(), piece_count(&pieces), offset, flags)
    };
    let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
    mark_written(target, count);
    Ok(count)
}

/// Writes the front of `source` to `file` at `offset`. Returns the bytes written.
pub(super) fn write_at(
    file: BorrowedFd<'_>,
    source: &Buffer<'_>,
    offset: u64,
) -> io::Result<usize> {
    let offset = file_offset(offset)?;
    let guards: Vec<_> = source.slices().take(PIECES_MAX).map(|s| s.ptr_guard_mut()).collect();
    let pieces: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() })
        .collect();
    // SAFETY: as in `read_with`; here the kernel only reads the slices. What the guest changes while
    // it does ends up in the guest's own file in one form or the other.
    let count =
        unsafe { libc::pwritev(file.as_raw_fd(), pieces.as_ptr(), piece_count(&pieces), offset) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

fn file_offset(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn piece_count(pieces: &[libc::iovec]) -> libc::c_int {
    // At most PIECES_MAX.
    libc::c_int::try_from(pieces.len()).unwrap_or(0)
}

/// The kernel wrote behind the back of vm-memory, which keeps account of changed pages.
fn mark_written(target: &Buffer<'_>, mut count: usize) {
    for slice in target.slices() {
        let here = slice.len().min(count);
        slice.bitmap().mark_dirty(0, here);
        count -= here;
    }
}

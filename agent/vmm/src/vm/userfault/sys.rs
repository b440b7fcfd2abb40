//! The calls of userfaultfd(2), for which no safe wrapper exists.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::vm::Memory;

/// `ioctl(2)` requests of `linux/userfaultfd.h`.
const NEW: u64 = 0xaa00;
const API: u64 = 0xc018_aa3f;
const REGISTER: u64 = 0xc020_aa00;

const API_VERSION: u64 = 0xaa;
/// Pages missing of a memfd are told.
const MISSING_SHARED: u64 = 1 << 5;
const MODE_MISSING: u64 = 1;

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    version: u64,
    features: u64,
    requests: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    start: u64,
    bytes: u64,
    mode: u64,
    requests: u64,
}

/// Has every page of `memory` that is not there yet waited for until somebody puts it. `device`:
/// `/dev/userfaultfd`, which, unlike the system call, lets the kernel's own accesses wait too.
pub(crate) fn watch(device: &OwnedFd, memory: &Memory) -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the request takes flags and gives a new descriptor.
    let made = unsafe { libc::ioctl(device.as_raw_fd(), NEW, flags) };
    if made < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made it, so nobody else owns it.
    let faults = unsafe { OwnedFd::from_raw_fd(made) };
    let mut api = Api { version: API_VERSION, features: MISSING_SHARED, requests: 0 };
    // SAFETY: the request reads and writes one structure of this layout, alive during the call.
    checked(unsafe { libc::ioctl(faults.as_raw_fd(), API, &raw mut api) })?;
    for region in memory.iter() {
        let start = memory.get_host_address(region.start_addr()).map_err(io::Error::other)?;
        let start = start.expose_provenance() as u64;
        let mut it = Register { start, bytes: region.len(), mode: MODE_MISSING, requests: 0 };
        // SAFETY: as above. What the request does to the mapping, one of `memory`'s own, is that
        // the first access to a page waits: no byte that was there changes.
        checked(unsafe { libc::ioctl(faults.as_raw_fd(), REGISTER, &raw mut it) })?;
    }
    Ok(faults)
}

fn checked(outcome: libc::c_int) -> io::Result<()> {
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

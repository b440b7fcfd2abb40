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
/// Writes to pages that are protected are noted by the kernel alone (Linux 6.7 on).
const WRITES_NOTED: u64 = 1 << 15;
const MODE_WRITES: u64 = 2;

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
    register(device, memory, MISSING_SHARED, MODE_MISSING)
}

/// Has every page of `memory` come by itself when it is touched, and not 15 neighbours with it: the
/// kernel does so where it may have to note writes to a page. Nothing here is protected from writes,
/// so nobody is ever told of one.
pub(crate) fn one_by_one(device: &OwnedFd, memory: &Memory) -> io::Result<OwnedFd> {
    register(device, memory, WRITES_NOTED, MODE_WRITES)
}

/// Until the descriptor is closed.
fn register(device: &OwnedFd, memory: &Memory, features: u64, mode: u64) -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the request takes flags and gives a new descriptor.
    let made = unsafe { libc::ioctl(device.as_raw_fd(), NEW, flags) };
    if made < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made it, so nobody else owns it.
    let faults = unsafe { OwnedFd::from_raw_fd(made) };
    let mut api = Api { version: API_VERSION, features, requests: 0 };
    // SAFETY: the request reads and writes one structure of this layout, alive during the call.
    checked(unsafe { libc::ioctl(faults.as_raw_fd(), API, &raw mut api) })?;
    for region in memory.iter() {
        let start = memory.get_host_address(region.start_addr()).map_err(io::Error::other)?;
        let start = start.expose_provenance() as u64;
        let mut it = Register { start, bytes: region.len(), mode, requests: 0 };
        // SAFETY: as above. What the request does to the mapping, one of `memory`'s own, is that
        // the first access to a page waits, or that pages come one by one: no byte that was there
        // changes.
        checked(unsafe { libc::ioctl(faults.as_raw_fd(), REGISTER, &raw mut it) })?;
    }
    Ok(faults)
}

fn checked(outcome: libc::c_int) -> io::Result<()> {
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

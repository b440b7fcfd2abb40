//! What the machine is and how full it is.

use std::path::Path;

use holdfast_wire::{
    WIRE_VERSION,
    guest::{Exited, Info},
};

use crate::limits::Memory;

/// `disk` is any path on the sandbox's disk. What cannot be learned is zero.
pub(crate) fn info(
    disk: &Path,
    ready_ns: u64,
    entrypoint_exited: Option<Exited>,
    execs: u32,
) -> Info {
    let memory = Memory::read();
    let mut info = Info {
        version: WIRE_VERSION,
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        ready_ns,
        memory_total_bytes: memory.total,
        memory_available_bytes: memory.available,
        entrypoint_exited,
        execs,
        ..Info::default()
    };
    if let Ok(disk) = rustix::fs::statvfs(disk) {
        info.disk_total_bytes = disk.f_blocks.saturating_mul(disk.f_frsize);
        info.disk_available_bytes = disk.f_bavail.saturating_mul(disk.f_frsize);
    }
    info
}

//! Memory handed to a VMM by descriptor.

use std::{io, os::fd::OwnedFd};

use holdfast_model::Mib;
use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create},
    io::{pwrite, retry_on_intr},
};

use crate::JailError;

const FLAGS: MemfdFlags = MemfdFlags::CLOEXEC.union(MemfdFlags::ALLOW_SEALING);

/// Guest memory: a memfd that can neither grow nor shrink. Nothing of it is there until the VMM
/// touches it, so it is charged to the VMM's cgroup.
pub fn guest_memory(size: Mib) -> Result<OwnedFd, JailError> {
    make(size).map_err(|source| JailError::Memory { mib: size.0, source })
}

fn make(size: Mib) -> io::Result<OwnedFd> {
    let memory = memfd_create("holdfast-guest", FLAGS)?;
    ftruncate(&memory, size.bytes())?;
    fcntl_add_seals(&memory, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(memory)
}

/// A memfd that holds `bytes` and cannot be changed any more.
pub fn sealed_bytes(bytes: &[u8]) -> io::Result<OwnedFd> {
    let file = memfd_create("holdfast-config", FLAGS)?;
    let mut written = 0;
    while written < bytes.len() {
        let at = u64::try_from(written).map_err(io::Error::other)?;
        written += retry_on_intr(|| pwrite(&file, &bytes[written..], at))?;
    }
    let all = SealFlags::GROW | SealFlags::SHRINK | SealFlags::WRITE | SealFlags::SEAL;
    fcntl_add_seals(&file, all)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn guest_memory_has_its_size_and_keeps_it() {
        let memory = guest_memory(Mib(3)).unwrap();
        assert_eq!(rustix::fs::fstat(&memory).unwrap().st_size, 3 * 1024 * 1024);
        assert!(ftruncate(&memory, 0).is_err());
    }

    #[test]
    fn sealed_bytes_read_from_their_beginning_and_refuse_a_write() {
        let file = sealed_bytes(b"config").unwrap();
        assert!(pwrite(&file, b"x", 0).is_err());
        let mut text = String::new();
        fs_err::File::from_parts(file.into(), "memfd").read_to_string(&mut text).unwrap();
        assert_eq!(text, "config");
    }
}

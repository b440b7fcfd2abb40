//! What a snapshot keeps of one machine beside its memory and its disks, as bytes: a head with
//! version and checksum, then the parts. Whoever reads it takes it for what anybody may have written.

use std::{io, os::fd::OwnedFd};

use holdfast_wire::frame;
use serde::{Deserialize, Serialize};

use crate::{
    devices::DeviceState,
    inherited,
    legacy::serial::SerialState,
    limits::state::STATE_BYTES_MAX,
    vm::saved::{SharedState, VcpuState},
};

const MAGIC: [u8; 4] = *b"HFST";
/// Of the parts' form. A newer VMM reads those of older ones; what it does not know it refuses.
const VERSION: u16 = 1;
/// Magic, version, checksum.
const HEAD_BYTES: usize = 4 + 2 + 4;

#[derive(Debug, thiserror::Error)]
pub(crate) enum StateError {
    #[error("the saved state cannot be read")]
    Read(#[source] io::Error),
    #[error("the saved state has over {STATE_BYTES_MAX} bytes")]
    TooLong,
    #[error("these {bytes} bytes are no saved state")]
    NotOne { bytes: usize },
    #[error("the saved state is of version {found}, this VMM knows {VERSION}")]
    Version { found: u16 },
    #[error("the saved state was changed or cut since it was told")]
    Checksum,
    #[error("the saved state is not of the form of its version")]
    Malformed(#[source] frame::FrameError),
    #[error("the saved state is of {found} MiB of memory, the machine has {wanted}")]
    Memory { found: u32, wanted: u32 },
}

/// All of it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct MachineState {
    pub(crate) memory_mib: u32,
    /// PID 1 had reported.
    pub(crate) ready: bool,
    pub(crate) shared: SharedState,
    pub(crate) vcpus: Vec<VcpuState>,
    pub(crate) devices: Vec<DeviceState>,
    pub(crate) serial: SerialState,
}

/// Encoded parts behind their head.
pub(crate) fn with_head(parts: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEAD_BYTES + parts.len());
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(crc32fast::hash(parts).to_le_bytes());
    bytes.extend(parts);
    bytes
}

impl MachineState {
    pub(crate) fn encode(&self) -> Result<Vec<u8>, StateError> {
        // A frame of its own inside: its length and its limit are as good here.
        let parts = frame::encode(self).map_err(StateError::Malformed)?;
        let bytes = with_head(&parts);
        if bytes.len() > STATE_BYTES_MAX { Err(StateError::TooLong) } else { Ok(bytes) }
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let not_one = StateError::NotOne { bytes: bytes.len() };
        let Some((head, parts)) = bytes.split_at_checked(HEAD_BYTES) else { return Err(not_one) };
        let [m0, m1, m2, m3, v0, v1, sum @ ..] = head else { return Err(not_one) };
        if [*m0, *m1, *m2, *m3] != MAGIC {
            return Err(not_one);
        }
        let found = u16::from_le_bytes([*v0, *v1]);
        if found != VERSION {
            return Err(StateError::Version { found });
        }
        if crc32fast::hash(parts).to_le_bytes() != sum {
            return Err(StateError::Checksum);
        }
        let split = frame::split_frame(parts).map_err(StateError::Malformed)?;
        match split {
            Some(split) if split.rest.is_empty() => {
                frame::decode(split.frame).map_err(StateError::Malformed)
            }
            _ => Err(StateError::Checksum),
        }
    }

    /// From the start of a file, of which no more than the limit is read.
    pub(crate) fn read(file: OwnedFd) -> Result<Self, StateError> {
        let file = fs_err::File::from_parts(file.into(), "saved state");
        // One more than there may be shows that there is too much.
        let bytes = inherited::read_start(&file, STATE_BYTES_MAX + 1).map_err(StateError::Read)?;
        if bytes.len() > STATE_BYTES_MAX {
            return Err(StateError::TooLong);
        }
        Self::decode(&bytes)
    }
}

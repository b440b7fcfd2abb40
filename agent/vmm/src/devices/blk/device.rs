//! What the driver sees of a disk: its configuration space and features.

use std::{sync::Arc, time::Instant};

use holdfast_wire::vmm::Disk;
use virtio_bindings::{virtio_blk::*, virtio_ids::VIRTIO_ID_BLOCK};

use super::{
    backing::{Backing, SECTOR_BYTES},
    counters::DiskCounters,
    state::State,
    worker::DiskWorker,
};
use crate::{
    devices::{Device, DeviceError, configuration::Configuration, mmio::Identity, rate::Throttle},
    inherited::InheritedFds,
    limits::blk::{QUEUE_SIZES, RANGE_SECTORS_MAX, RANGES_MAX, SEGMENTS_MAX},
};

/// 2^3 sectors are 4 KiB, the block of the files below and of the file systems above.
const BLOCK_EXPONENT: u8 = 3;
const BLOCK_SECTORS: u32 = 1 << BLOCK_EXPONENT;

pub(in crate::devices) fn device(
    disk: &Disk,
    fds: &mut InheritedFds,
    counters: Arc<DiskCounters>,
) -> Result<Device, DeviceError> {
    let mut parts = Vec::new();
    for segment in &disk.segments {
        parts.push((fds.take(segment.fd)?, segment.bytes));
    }
    let failed = |source| DeviceError::Disk { name: disk.name.clone(), source };
    let backing = Backing::new(&disk.name, parts, disk.read_only).map_err(failed)?;
    let state = State {
        name: disk.name.clone(),
        sectors: backing.bytes() / SECTOR_BYTES,
        read_only: disk.read_only,
    };
    let throttle = Throttle::new(disk.limits, Instant::now());
    Ok(Device {
        name: format!("disk-{}", disk.name),
        identity: Identity {
            kind: VIRTIO_ID_BLOCK,
            features: features(&state),
            needed: 0,
            config: Configuration::fixed(configuration(&state)),
            queue_sizes: QUEUE_SIZES,
        },
        worker: Box::new(DiskWorker::new(backing, state, counters, throttle)),
    })
}

fn features(state: &State) -> u64 {
    let always =
        1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_TOPOLOGY;
    if state.read_only {
        always | 1 << VIRTIO_BLK_F_RO
    } else {
        always
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_DISCARD
            | 1 << VIRTIO_BLK_F_WRITE_ZEROES
    }
}

/// `struct virtio_blk_config`.
fn configuration(state: &State) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(60);
    bytes.extend(state.sectors.to_le_bytes());
    bytes.extend(0u32.to_le_bytes()); // size_max: not offered
    bytes.extend(u32::from(SEGMENTS_MAX).to_le_bytes());
    bytes.extend([0; 4]); // geometry: not offered
    bytes.extend(512u32.to_le_bytes()); // blk_size
    bytes.extend([BLOCK_EXPONENT, 0]); // physical_block_exp, alignment_offset
    bytes.extend(1u16.to_le_bytes()); // min_io_size
    bytes.extend(0u32.to_le_bytes()); // opt_io_size: no opinion
    bytes.extend([0, 0, 1, 0]); // writeback, unused, num_queues: not offered
    bytes.extend(RANGE_SECTORS_MAX.to_le_bytes()); // max_discard_sectors
    bytes.extend(RANGES_MAX.to_le_bytes()); // max_discard_seg
    bytes.extend(BLOCK_SECTORS.to_le_bytes()); // discard_sector_alignment
    bytes.extend(RANGE_SECTORS_MAX.to_le_bytes()); // max_write_zeroes_sectors
    bytes.extend(RANGES_MAX.to_le_bytes()); // max_write_zeroes_seg
    bytes.extend([1, 0, 0, 0]); // write_zeroes_may_unmap, unused
    bytes
}

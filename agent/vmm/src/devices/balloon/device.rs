//! What the driver sees of a balloon, and the handle by which others set it.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use holdfast_wire::vmm::BalloonStats;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use super::{state::State, worker::BalloonWorker};
use crate::{
    devices::{Device, configuration::Configuration, mmio::Identity},
    limits::balloon::QUEUE_SIZES,
};

/// The guest may take pages back when it runs out of memory.
const DEFLATE_ON_OOM: u64 = 1 << 2;
/// The guest reports pages that are free.
const REPORTING: u64 = 1 << 5;

/// `struct virtio_balloon_config`: target and actual size in pages, the second written by the
/// driver.
pub(super) const TARGET_AT: u32 = 0;
pub(super) const ACTUAL_AT: u32 = 4;
const PAGES_PER_MIB: u32 = 256;

/// Sets the balloon and tells how it is doing.
pub(in crate::devices) struct Balloon {
    index: usize,
    configuration: Configuration,
    given_back_bytes: Arc<AtomicU64>,
}

impl Balloon {
    /// Its place among the devices.
    pub(in crate::devices) fn index(&self) -> usize {
        self.index
    }

    /// The driver is to be told.
    pub(in crate::devices) fn set_target(&self, target_mib: u32) {
        let pages = target_mib.saturating_mul(PAGES_PER_MIB);
        self.configuration.set_number(TARGET_AT, pages);
    }

    pub(in crate::devices) fn read(&self) -> BalloonStats {
        let State { target_pages, actual_pages } = state(&self.configuration);
        BalloonStats {
            target_mib: target_pages / PAGES_PER_MIB,
            actual_mib: actual_pages / PAGES_PER_MIB,
            given_back_bytes: self.given_back_bytes.load(Ordering::Relaxed),
        }
    }
}

pub(super) fn state(configuration: &Configuration) -> State {
    State {
        target_pages: configuration.number(TARGET_AT),
        actual_pages: configuration.number(ACTUAL_AT),
    }
}

/// `index` is its place among the devices.
pub(in crate::devices) fn device(index: usize) -> (Device, Balloon) {
    let State { target_pages, actual_pages } = State::default();
    let bytes = [target_pages.to_le_bytes(), actual_pages.to_le_bytes()].concat();
    let configuration = Configuration::with_writable(bytes, 4..8);
    let given_back_bytes = Arc::new(AtomicU64::new(0));
    let worker = BalloonWorker::new(configuration.clone(), Arc::clone(&given_back_bytes));
    let device = Device {
        name: "balloon".to_owned(),
        identity: Identity {
            kind: VIRTIO_ID_BALLOON,
            features: DEFLATE_ON_OOM | REPORTING,
            // Without it the third queue would be another one.
            needed: REPORTING,
            config: configuration.clone(),
            queue_sizes: QUEUE_SIZES,
        },
        worker: Box::new(worker),
    };
    (device, Balloon { index, configuration, given_back_bytes })
}

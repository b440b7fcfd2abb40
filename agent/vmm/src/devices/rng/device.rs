//! What the driver sees: no configuration, one queue.

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::{state::State, worker::RngWorker};
use crate::{
    devices::{Device, configuration::Configuration, mmio::Identity},
    limits::rng::QUEUE_SIZES,
};

pub(in crate::devices) fn device() -> Device {
    Device {
        name: "rng".to_owned(),
        identity: Identity {
            kind: VIRTIO_ID_RNG,
            features: 0,
            needed: 0,
            config: Configuration::fixed(Vec::new()),
            queue_sizes: QUEUE_SIZES,
        },
        worker: Box::new(RngWorker::new(State::default())),
    }
}

//! What the driver sees of the socket device: the guest's address and three queues.

use std::{os::unix::net::UnixListener, sync::Arc};

use holdfast_wire::vmm::GUEST_CID;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::{counters::VsockCounters, state::State, worker::VsockWorker};
use crate::{
    devices::{Device, configuration::Configuration, mmio::Identity},
    event::EventSender,
    limits::vsock::QUEUE_SIZES,
};

pub(in crate::devices) fn device(
    listener: UnixListener,
    counters: Arc<VsockCounters>,
    events: EventSender,
) -> Device {
    Device {
        name: "vsock".to_owned(),
        identity: Identity {
            kind: VIRTIO_ID_VSOCK,
            // Streams need no feature bit.
            features: 0,
            needed: 0,
            config: Configuration::fixed(GUEST_CID.to_le_bytes().to_vec()),
            queue_sizes: QUEUE_SIZES,
        },
        worker: Box::new(VsockWorker::new(listener, State::default(), counters, events)),
    }
}

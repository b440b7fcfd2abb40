//! What the driver sees of a network: its configuration space and features.

use std::{sync::Arc, time::Instant};

use holdfast_wire::vmm::Network;
use virtio_bindings::{virtio_ids::VIRTIO_ID_NET, virtio_net::*};

use super::{
    counters::NetworkCounters,
    state::State,
    tap::Tap,
    worker::{NetworkWorker, Parts},
};
use crate::{
    devices::{Device, DeviceError, configuration::Configuration, mmio::Identity, rate::Throttle},
    inherited::InheritedFds,
    limits::net::QUEUE_SIZES,
};

/// `index` counts the networks of one machine.
pub(in crate::devices) fn device(
    index: usize,
    network: &Network,
    fds: &mut InheritedFds,
    counters: Arc<NetworkCounters>,
) -> Result<Device, DeviceError> {
    let tap = Tap::new(fds.take(network.tap_fd)?)
        .map_err(|source| DeviceError::Network { index, source })?;
    let offered = tap.features()
        | 1 << VIRTIO_NET_F_MAC
        | 1 << VIRTIO_NET_F_MTU
        | 1 << VIRTIO_NET_F_MRG_RXBUF;
    let state = State { mac: network.mac, mtu: network.mtu, offered };
    let now = Instant::now();
    Ok(Device {
        name: format!("net{index}"),
        identity: Identity {
            kind: VIRTIO_ID_NET,
            features: state.offered,
            needed: 0,
            config: Configuration::fixed(configuration(&state)),
            queue_sizes: QUEUE_SIZES,
        },
        worker: Box::new(NetworkWorker::new(Parts {
            tap,
            state,
            counters,
            to_guest: Throttle::new(network.to_guest, now),
            from_guest: Throttle::new(network.from_guest, now),
        })),
    })
}

/// `struct virtio_net_config`, as far as it was offered.
fn configuration(state: &State) -> Vec<u8> {
    let mut bytes = state.mac.to_vec();
    bytes.extend([0; 4]); // status, max_virtqueue_pairs: not offered
    bytes.extend(state.mtu.to_le_bytes());
    bytes
}

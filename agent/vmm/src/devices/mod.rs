//! The virtio devices of one microVM, on their event thread.

use holdfast_wire::vmm::{Config, DiskStats};

use crate::{
    event::EventSender,
    inherited::{FdError, InheritedFds},
    vm::{
        Memory,
        wiring::{Wiring, WiringError},
    },
};

#[derive(Debug, thiserror::Error)]
pub(crate) enum DeviceError {
    #[error(transparent)]
    Fd(#[from] FdError),
    #[error("device {device} cannot be connected")]
    Wiring {
        device: String,
        #[source]
        source: WiringError,
    },
}

/// Where one device is found, as ACPI tells the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Window {
    pub(crate) base: u64,
    pub(crate) len: u64,
    pub(crate) gsi: u32,
}

/// All devices.
pub(crate) struct DeviceSet {
    windows: Vec<Window>,
}

impl DeviceSet {
    pub(crate) fn new(
        _config: &Config,
        _fds: &mut InheritedFds,
        _memory: Memory,
        _wiring: &mut dyn Wiring,
        _events: EventSender,
    ) -> Result<Self, DeviceError> {
        Ok(Self { windows: Vec::new() })
    }

    pub(crate) fn windows(&self) -> &[Window] {
        &self.windows
    }

    pub(crate) fn read(&self, _base: u64, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    pub(crate) fn write(&self, _base: u64, _offset: u64, _data: &[u8]) {}

    pub(crate) fn pause(&self) {}

    pub(crate) fn resume(&self) {}

    /// Per disk, then vsock bytes received from and sent to the guest.
    pub(crate) fn stats(&self) -> (Vec<DiskStats>, u64, u64) {
        (Vec::new(), 0, 0)
    }
}

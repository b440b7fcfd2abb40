//! The virtio devices of one microVM: each behind a window of registers, with a thread of its own.

mod balloon;
mod blk;
mod chain;
mod configuration;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod interrupt;
mod mmio;
mod net;
mod queue;
mod rate;
mod rng;
mod runner;
mod saved;
mod sys;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod vsock;

use std::{io, sync::Arc};

use holdfast_wire::vmm::{Config, Stats};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY;

pub(crate) use self::saved::{DeviceState, Unfit};
use self::{
    balloon::Balloon,
    blk::{DiskCounters, DiskError},
    interrupt::Interrupt,
    mmio::{Identity, Parts, Transport},
    net::{NetworkCounters, TapError},
    runner::{Runner, Setting, Worker},
    vsock::VsockCounters,
};
use crate::{
    event::EventSender,
    inherited::{FdError, InheritedFds},
    vm::{
        Memory,
        wiring::{DEVICE_WINDOW_BYTES, DEVICE_WINDOWS_BASE, Wiring, WiringError},
    },
};

#[derive(Debug, thiserror::Error)]
pub(crate) enum DeviceError {
    #[error(transparent)]
    Fd(#[from] FdError),
    #[error("disk {name} cannot be used")]
    Disk {
        name: String,
        #[source]
        source: DiskError,
    },
    #[error("network {index} cannot be used")]
    Network {
        index: usize,
        #[source]
        source: TapError,
    },
    #[error("device {device} cannot be connected")]
    Wiring {
        device: String,
        #[source]
        source: WiringError,
    },
    #[error("device {device} has no thread")]
    Thread {
        device: String,
        #[source]
        source: io::Error,
    },
}

impl DeviceError {
    /// What the operator can do next.
    pub(crate) fn hint(&self) -> &'static str {
        match self {
            Self::Fd(_) => "the agent passed wrong fds; see its log",
            Self::Disk { .. } => {
                "see whether the files of this disk are whole, and who changed them"
            }
            Self::Network { .. } => "see how the tap of this network was made",
            Self::Wiring { .. } => "attach fewer devices",
            Self::Thread { .. } => "see this sandbox's limit of processes",
        }
    }
}

/// Where one device is found, as ACPI tells the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Window {
    pub(crate) base: u64,
    pub(crate) len: u64,
    pub(crate) gsi: u32,
}

/// One device before it is connected.
struct Device {
    name: String,
    identity: Identity,
    worker: Box<dyn Worker>,
}

/// All devices: the disks in the order of the configuration, then rng, then vsock, then the
/// networks and the balloon, if there are any.
pub(crate) struct DeviceSet {
    windows: Vec<Window>,
    /// In the order of `windows`.
    transports: Vec<Transport>,
    disks: Vec<Arc<DiskCounters>>,
    vsock: Arc<VsockCounters>,
    networks: Vec<Arc<NetworkCounters>>,
    balloon: Option<Balloon>,
}

impl DeviceSet {
    pub(crate) fn new(
        config: &Config,
        fds: &mut InheritedFds,
        memory: Memory,
        wiring: &mut dyn Wiring,
        events: EventSender,
    ) -> Result<Self, DeviceError> {
        let mut devices = Vec::new();
        let mut disks = Vec::new();
        for disk in &config.disks {
            let counters = Arc::new(DiskCounters::default());
            devices.push(blk::device(disk, fds, Arc::clone(&counters))?);
            disks.push(counters);
        }
        devices.push(rng::device());
        let counters = Arc::new(VsockCounters::default());
        let listener = fds.take(config.vsock_fd)?.into();
        devices.push(vsock::device(listener, Arc::clone(&counters), events.clone()));

        let mut networks = Vec::new();
        for (index, network) in config.networks.iter().enumerate() {
            let counters = Arc::new(NetworkCounters::default());
            devices.push(net::device(index, network, fds, Arc::clone(&counters))?);
            networks.push(counters);
        }
        let mut balloon = None;
        if config.balloon {
            let (device, handle) = balloon::device(devices.len());
            devices.push(device);
            balloon = Some(handle);
        }

        let mut set = Self {
            windows: Vec::new(),
            transports: Vec::new(),
            disks,
            vsock: counters,
            networks,
            balloon,
        };
        for device in devices {
            set.connect(device, &memory, wiring, &events)?;
        }
        Ok(set)
    }

    fn connect(
        &mut self,
        device: Device,
        memory: &Memory,
        wiring: &mut dyn Wiring,
        events: &EventSender,
    ) -> Result<(), DeviceError> {
        let Device { name, identity, worker } = device;
        let unwired = |source| DeviceError::Wiring { device: name.clone(), source };
        let base = DEVICE_WINDOWS_BASE + DEVICE_WINDOW_BYTES * self.windows.len() as u64;
        let line = wiring.interrupt().map_err(unwired)?;
        let doorbell = base + u64::from(VIRTIO_MMIO_QUEUE_NOTIFY);
        let kicks = (0..)
            .zip(identity.queue_sizes)
            .map(|(queue, _)| wiring.doorbell(doorbell, queue).map(Arc::new))
            .collect::<Result<Vec<_>, _>>()
            .map_err(unwired)?;
        let interrupt = Arc::new(Interrupt::new(line.irqfd));
        let setting = Setting {
            name: name.clone(),
            kicks: kicks.clone(),
            interrupt: Arc::clone(&interrupt),
            memory: memory.clone(),
            events: events.clone(),
        };
        let runner = Runner::spawn(setting, worker)
            .map_err(|source| DeviceError::Thread { device: name.clone(), source })?;
        self.windows.push(Window { base, len: DEVICE_WINDOW_BYTES, gsi: line.gsi });
        let parts = Parts { name, identity, interrupt, kicks, memory: memory.clone(), runner };
        self.transports.push(Transport::new(parts));
        Ok(())
    }

    pub(crate) fn windows(&self) -> &[Window] {
        &self.windows
    }

    /// A load by a vCPU from the window at `base`.
    pub(crate) fn read(&self, base: u64, offset: u64, data: &mut [u8]) {
        match self.at(base) {
            Some(transport) => transport.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// A store by a vCPU into the window at `base`.
    pub(crate) fn write(&self, base: u64, offset: u64, data: &[u8]) {
        if let Some(transport) = self.at(base) {
            transport.write(offset, data);
        }
    }

    fn at(&self, base: u64) -> Option<&Transport> {
        let index = base.checked_sub(DEVICE_WINDOWS_BASE)? / DEVICE_WINDOW_BYTES;
        self.transports.get(usize::try_from(index).ok()?)
    }

    /// On return every device's thread is under its filter. The guest has not run yet.
    pub(crate) fn await_threads(&self) {
        self.transports.iter().for_each(|transport| transport.runner().await_thread());
    }

    /// On return no request is in flight, and none is begun before [`Self::resume`].
    pub(crate) fn pause(&self) {
        self.transports.iter().for_each(|transport| transport.runner().pause());
    }

    pub(crate) fn resume(&self) {
        self.transports.iter().for_each(|transport| transport.runner().resume());
    }

    /// What a snapshot keeps of them. They must be paused.
    pub(crate) fn save(&self) -> Result<Vec<DeviceState>, Unfit> {
        self.transports.iter().map(Transport::save).collect()
    }

    /// Takes up what was saved: afterwards they are paused, and go on where they were when they are
    /// resumed. Nothing has used them yet. After an error they are of no use.
    pub(crate) fn restore(&self, states: &[DeviceState]) -> Result<(), Unfit> {
        let (found, wanted) = (states.len(), self.transports.len());
        if found != wanted {
            return Err(Unfit::Count { found, wanted });
        }
        self.pause();
        let mut each = self.transports.iter().zip(states);
        each.try_for_each(|(transport, state)| transport.restore(state))
    }

    /// Sets how much the guest shall give up. False: there is no balloon.
    pub(crate) fn set_balloon(&self, target_mib: u32) -> bool {
        let Some(balloon) = &self.balloon else { return false };
        balloon.set_target(target_mib);
        if let Some(transport) = self.transports.get(balloon.index()) {
            transport.announce_configuration();
        }
        true
    }

    /// What the devices have counted; everything else in it is for others to fill in.
    pub(crate) fn stats(&self) -> Stats {
        Stats {
            disks: self.disks.iter().map(|disk| disk.read()).collect(),
            networks: self.networks.iter().map(|network| network.read()).collect(),
            balloon: self.balloon.as_ref().map(Balloon::read),
            vsock_rx_bytes: self.vsock.received(),
            vsock_tx_bytes: self.vsock.sent(),
            ..Stats::default()
        }
    }
}

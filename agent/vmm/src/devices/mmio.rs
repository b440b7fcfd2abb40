//! virtio over MMIO, version 2 (virtio 1.2, section 4.2): the registers through which the driver
//! finds a device, agrees on features, sets up queues and starts it. Called by vCPU threads.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::{
    virtio_config::{
        VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
        VIRTIO_F_VERSION_1,
    },
    virtio_mmio::*,
    virtio_ring::VIRTIO_RING_F_EVENT_IDX,
};
use vmm_sys_util::eventfd::EventFd;

use super::{
    configuration::Configuration,
    interrupt::Interrupt,
    queue::{Broken, Ring, RingSetup},
    runner::{Runner, Started, reason},
    saved::{DeviceState, RegistersState, RunState, Unfit},
};
use crate::vm::Memory;

/// "virt", as every device of this transport says.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "HOLD"; drivers only show it.
const VENDOR: u32 = 0x444c_4f48;
/// Length of a shared memory region that is not there.
const NO_REGION: u32 = u32::MAX;

/// Features of the transport and the rings, offered by every device.
pub(super) const COMMON_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX;

/// What a device is to the driver. Only the configuration's bytes may change.
pub(super) struct Identity {
    pub(super) kind: u32,
    /// Beside [`COMMON_FEATURES`].
    pub(super) features: u64,
    /// Those of `features` without which no driver is taken.
    pub(super) needed: u64,
    pub(super) config: Configuration,
    /// The largest size of each queue.
    pub(super) queue_sizes: &'static [u16],
}

/// One device's window.
pub(super) struct Transport {
    name: String,
    identity: Identity,
    registers: Mutex<Registers>,
    interrupt: Arc<Interrupt>,
    kicks: Vec<Arc<EventFd>>,
    memory: Memory,
    runner: Runner,
}

/// What the driver wrote.
#[derive(Default)]
struct Registers {
    status: u32,
    device_features_page: u32,
    driver_features_page: u32,
    driver_features: u64,
    queue: usize,
    queues: Vec<RingSetup>,
}

impl Registers {
    fn after_reset(identity: &Identity) -> Self {
        let queues = vec![RingSetup::default(); identity.queue_sizes.len()];
        Self { queues, ..Self::default() }
    }

    fn has(&self, status: u32) -> bool {
        self.status & status != 0
    }

    /// The selected queue, while the driver may set it up.
    fn queue_in_setup(&mut self) -> Option<&mut RingSetup> {
        if self.has(VIRTIO_CONFIG_S_DRIVER_OK) {
            return None;
        }
        self.queues.get_mut(self.queue)
    }
}

/// What [`Transport::new`] joins.
pub(super) struct Parts {
    pub(super) name: String,
    pub(super) identity: Identity,
    pub(super) interrupt: Arc<Interrupt>,
    pub(super) kicks: Vec<Arc<EventFd>>,
    pub(super) memory: Memory,
    pub(super) runner: Runner,
}

impl Transport {
    pub(super) fn new(parts: Parts) -> Self {
        let Parts { name, identity, interrupt, kicks, memory, runner } = parts;
        let registers = Mutex::new(Registers::after_reset(&identity));
        Self { name, identity, registers, interrupt, kicks, memory, runner }
    }

    pub(super) fn runner(&self) -> &Runner {
        &self.runner
    }

    /// A load by the guest. What is not there reads as zeros.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Ok(offset) = u32::try_from(offset) else { return };
        if let Some(at) = offset.checked_sub(VIRTIO_MMIO_CONFIG) {
            self.identity.config.read(at, data);
        } else if let Ok(word) = <&mut [u8; 4]>::try_from(data) {
            *word = self.register(offset).to_le_bytes();
        }
    }

    /// A store by the guest. What makes no sense is ignored, as the specification has it.
    pub(super) fn write(&self, offset: u64, data: &[u8]) {
        let Ok(offset) = u32::try_from(offset) else { return };
        if let Some(at) = offset.checked_sub(VIRTIO_MMIO_CONFIG) {
            self.identity.config.driver_writes(at, data);
        } else if let Ok(word) = <[u8; 4]>::try_from(data) {
            self.set_register(offset, u32::from_le_bytes(word));
        }
    }

    /// Tells a driver that has started the device that its configuration changed. One that has not
    /// reads it when it does.
    pub(super) fn announce_configuration(&self) {
        if self.registers().has(VIRTIO_CONFIG_S_DRIVER_OK) {
            self.interrupt.changed_configuration();
        }
    }

    /// What a snapshot keeps; the device must be paused.
    pub(super) fn save(&self) -> Result<DeviceState, Unfit> {
        let run = self.runner.save().ok_or_else(|| Unfit::Ended { device: self.name.clone() })?;
        let registers = self.registers();
        let registers = RegistersState {
            status: registers.status,
            device_features_page: registers.device_features_page,
            driver_features_page: registers.driver_features_page,
            driver_features: registers.driver_features,
            // No queue has such a number, so that any other will do.
            queue: u32::try_from(registers.queue).unwrap_or(u32::MAX),
            queues: registers.queues.clone(),
            interrupt_reasons: self.interrupt.reasons(),
            needs_reset: self.interrupt.needs_reset(),
        };
        Ok(DeviceState { name: self.name.clone(), registers, run })
    }

    /// Takes up what was saved, while paused and before any driver has used the device.
    pub(super) fn restore(&self, state: &DeviceState) -> Result<(), Unfit> {
        let device = || self.name.clone();
        if state.name != self.name {
            return Err(Unfit::Name { found: state.name.clone(), wanted: device() });
        }
        let RegistersState { status, driver_features, interrupt_reasons, needs_reset, .. } =
            state.registers;
        // Until it is agreed on, a driver may have written anything.
        let agreed = status & VIRTIO_CONFIG_S_FEATURES_OK != 0;
        let missing = if agreed { driver_features & !self.offered() } else { 0 };
        if missing != 0 {
            return Err(Unfit::Features { device: device(), missing });
        }
        let started = self.restore_registers(&state.registers, &state.run)?;
        // Raised while the device's thread stands still.
        self.runner.restore(started, state.run.worker.clone(), &self.name)?;
        self.interrupt.restore(interrupt_reasons, needs_reset);
        Ok(())
    }

    /// The queues, if the device was running.
    fn restore_registers(
        &self,
        state: &RegistersState,
        run: &RunState,
    ) -> Result<Option<Started>, Unfit> {
        let mut registers = self.registers();
        let agreed = state.status & VIRTIO_CONFIG_S_FEATURES_OK != 0;
        let started = state.status & VIRTIO_CONFIG_S_DRIVER_OK != 0;
        let sound = state.queues.len() == self.identity.queue_sizes.len()
            && (!agreed || self.accepts(state.driver_features))
            && (!started || agreed)
            && (run.rings.is_empty() || started && run.rings.len() == state.queues.len());
        if !sound {
            return Err(Unfit::Registers { device: self.name.clone() });
        }
        *registers = Registers {
            status: state.status,
            device_features_page: state.device_features_page,
            driver_features_page: state.driver_features_page,
            driver_features: state.driver_features,
            queue: usize::try_from(state.queue).unwrap_or(usize::MAX),
            queues: state.queues.clone(),
        };
        if run.rings.is_empty() {
            return Ok(None);
        }
        let broken = |broken| Unfit::Broken { device: self.name.clone(), reason: reason(&broken) };
        let mut started = self.started(&registers).map_err(broken)?;
        let rings = started.rings.iter_mut().zip(&run.rings);
        rings.for_each(|(ring, state)| ring.restore(*state));
        Ok(Some(started))
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        // A panic elsewhere left plain numbers behind; they are as good as the guest's own.
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn offered(&self) -> u64 {
        self.identity.features | COMMON_FEATURES
    }

    fn register(&self, offset: u32) -> u32 {
        let registers = self.registers();
        let queue_size_max = || self.identity.queue_sizes.get(registers.queue).copied();
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.identity.kind,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => match registers.device_features_page {
                0 => low(self.offered()),
                1 => high(self.offered()),
                _ => 0,
            },
            VIRTIO_MMIO_QUEUE_NUM_MAX => u32::from(queue_size_max().unwrap_or(0)),
            VIRTIO_MMIO_QUEUE_READY => {
                registers.queues.get(registers.queue).map_or(0, |queue| u32::from(queue.ready))
            }
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.reasons(),
            VIRTIO_MMIO_STATUS if self.interrupt.needs_reset() => {
                registers.status | VIRTIO_CONFIG_S_NEEDS_RESET
            }
            VIRTIO_MMIO_STATUS => registers.status,
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => NO_REGION,
            VIRTIO_MMIO_CONFIG_GENERATION => self.identity.config.generation(),
            _ => 0,
        }
    }

    fn set_register(&self, offset: u32, value: u32) {
        let mut registers = self.registers();
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => registers.device_features_page = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => registers.driver_features_page = value,
            VIRTIO_MMIO_DRIVER_FEATURES => {
                // Agreed features stay as they are until a reset.
                let agreed = registers.has(VIRTIO_CONFIG_S_FEATURES_OK);
                match registers.driver_features_page {
                    0 if !agreed => set_low(&mut registers.driver_features, value),
                    1 if !agreed => set_high(&mut registers.driver_features, value),
                    _ => {}
                }
            }
            VIRTIO_MMIO_QUEUE_SEL => {
                registers.queue = usize::try_from(value).unwrap_or(usize::MAX);
            }
            VIRTIO_MMIO_QUEUE_NOTIFY => {
                // Kicks come by doorbell; only one that missed it ends here.
                let kick = usize::try_from(value).ok().and_then(|queue| self.kicks.get(queue));
                let _ = kick.map(|kick| kick.write(1));
            }
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            VIRTIO_MMIO_STATUS if value == 0 => self.reset(&mut registers),
            VIRTIO_MMIO_STATUS => self.set_status(&mut registers, value),
            _ => {
                if let Some(queue) = registers.queue_in_setup() {
                    set_up(queue, offset, value);
                }
            }
        }
    }

    fn reset(&self, registers: &mut Registers) {
        self.runner.reset();
        // Only now can the thread raise nothing for the time before.
        self.interrupt.reset();
        *registers = Registers::after_reset(&self.identity);
    }

    fn set_status(&self, registers: &mut Registers, value: u32) {
        let value = value & !VIRTIO_CONFIG_S_NEEDS_RESET;
        // A driver adds bits; taking one back is what a reset is for.
        let mut added = value & !registers.status;
        if added & VIRTIO_CONFIG_S_FEATURES_OK != 0 && !self.accepts(registers.driver_features) {
            added &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        let agreed = (registers.status | added) & VIRTIO_CONFIG_S_FEATURES_OK != 0;
        if !agreed {
            added &= !VIRTIO_CONFIG_S_DRIVER_OK;
        }
        registers.status |= added;
        if added & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.runner.start(self.started(registers));
        }
    }

    fn accepts(&self, features: u64) -> bool {
        let needed = self.identity.needed | 1 << VIRTIO_F_VERSION_1;
        features & !self.offered() == 0 && features & needed == needed
    }

    fn started(&self, registers: &Registers) -> Result<Started, Broken> {
        let event_idx = registers.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let queues = registers.queues.iter().zip(self.identity.queue_sizes).enumerate();
        queues
            .map(|(index, (setup, max))| {
                let interrupt = Arc::clone(&self.interrupt);
                Ring::new(index, setup, *max, event_idx, &self.memory, interrupt)
            })
            .collect::<Result<_, _>>()
            .map(|rings| Started { rings, features: registers.driver_features })
    }
}

/// Stores into the registers of one queue. Once ready it keeps what it has.
fn set_up(queue: &mut RingSetup, offset: u32, value: u32) {
    if offset == VIRTIO_MMIO_QUEUE_READY {
        queue.ready = value == 1;
    } else if !queue.ready {
        match offset {
            VIRTIO_MMIO_QUEUE_NUM => queue.size = value,
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.available, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.available, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.used, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.used, value),
            _ => {}
        }
    }
}

const LOW: u64 = 0xffff_ffff;

fn low(value: u64) -> u32 {
    u32::try_from(value & LOW).unwrap_or(0)
}

fn high(value: u64) -> u32 {
    low(value >> 32)
}

fn set_low(target: &mut u64, value: u32) {
    *target = *target & !LOW | u64::from(value);
}

fn set_high(target: &mut u64, value: u32) {
    *target = *target & LOW | u64::from(value) << 32;
}

#[cfg(test)]
mod tests;

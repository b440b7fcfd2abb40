//! Where a guest's accesses go: ports to the legacy devices, memory windows to the virtio devices.
//! Nobody there: reads give all ones and writes go nowhere, as on a bus without a device.

use std::sync::Mutex;

use holdfast_wire::vmm::Exit;

use crate::{
    devices::DeviceSet,
    layout::{
        I8042_COMMAND_PORT, I8042_RESET, PANIC_PORT, SERIAL_PORT, SERIAL_PORTS, SLEEP_CONTROL_PORT,
        SLEEP_STATUS_PORT,
    },
    legacy::{
        panic, power,
        serial::{SerialPort, SerialState},
    },
    vm::wiring::DEVICE_WINDOW_BYTES,
};

/// What a read gives where nothing is.
const NOBODY: u8 = 0xff;

/// Shared by all vCPUs.
pub(crate) struct Bus {
    pub(crate) devices: DeviceSet,
    pub(crate) serial: Mutex<SerialPort>,
}

impl Bus {
    pub(crate) fn read_memory(&self, address: u64, data: &mut [u8]) {
        match self.window_of(address) {
            Some((base, offset)) => self.devices.read(base, offset, data),
            None => data.fill(NOBODY),
        }
    }

    pub(crate) fn write_memory(&self, address: u64, data: &[u8]) {
        if let Some((base, offset)) = self.window_of(address) {
            self.devices.write(base, offset, data);
        }
    }

    /// The device's window that `address` lies in, and the offset into it.
    fn window_of(&self, address: u64) -> Option<(u64, u64)> {
        let base = address & !(DEVICE_WINDOW_BYTES - 1);
        let there = self.devices.windows().iter().any(|window| window.base == base);
        there.then_some((base, address - base))
    }

    /// A string instruction brings several bytes for one port.
    pub(crate) fn read_port(&self, port: u16, data: &mut [u8]) {
        match port {
            port if let Some(register) = serial_register(port) => {
                let mut serial = self.lock_serial();
                data.iter_mut().for_each(|byte| *byte = serial.read(register));
            }
            // Nothing pending: the kernel may write its command.
            I8042_COMMAND_PORT => data.fill(0),
            PANIC_PORT => data.fill(panic::SUPPORTED),
            SLEEP_CONTROL_PORT | SLEEP_STATUS_PORT => data.fill(0),
            _ => data.fill(NOBODY),
        }
    }

    /// `Some` when this write ends the microVM.
    pub(crate) fn write_port(&self, port: u16, data: &[u8]) -> Option<Exit> {
        let first = *data.first()?;
        match port {
            port if let Some(register) = serial_register(port) => {
                let mut serial = self.lock_serial();
                data.iter().for_each(|&byte| serial.write(register, byte));
                None
            }
            I8042_COMMAND_PORT => (first == I8042_RESET).then_some(Exit::Reset),
            PANIC_PORT => panic::written(first),
            SLEEP_CONTROL_PORT => power::sleep_control_written(first),
            _ => None,
        }
    }

    fn lock_serial(&self) -> std::sync::MutexGuard<'_, SerialPort> {
        // A panic there cannot leave the port's registers in a state the guest could not set.
        self.serial.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(crate) fn save_serial(&self) -> SerialState {
        self.lock_serial().save()
    }

    pub(crate) fn restore_serial(&self, state: &SerialState) {
        self.lock_serial().restore(state);
    }

    /// Writes out what the serial port still holds, and tells how much it was given in all.
    pub(crate) fn flush_serial(&self) -> u64 {
        self.lock_serial().flush()
    }
}

fn serial_register(port: u16) -> Option<u8> {
    let register = port.checked_sub(SERIAL_PORT).filter(|&register| register < SERIAL_PORTS)?;
    u8::try_from(register).ok()
}

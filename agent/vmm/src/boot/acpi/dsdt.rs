//! The DSDT: the devices a kernel cannot find by itself.

use acpi_tables::{
    Aml,
    aml::{
        AmlStr, Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name,
        Notify, Package, Path, ResourceTemplate, Scope, ZERO,
    },
    sdt::Sdt,
};

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::{
    devices::Window,
    layout::{GENERATION_GSI, GENERATION_ID, PANIC_PORT, SERIAL_GSI, SERIAL_PORT, SERIAL_PORTS},
    legacy::power::SLEEP_TYPE_OFF,
};

/// Bytes of a table's header.
const HEADER_BYTES: u32 = 36;
/// Revision from which integers have 64 bits.
const REVISION: u8 = 2;
/// What a generation counter's notification means: the id has changed.
const GENERATION_CHANGED: u8 = 0x80;
/// `_STA`: present, enabled, shown, working.
const PRESENT: u8 = 0xf;

pub(super) fn table(windows: &[Window]) -> Sdt {
    let mut bytes = Vec::new();
    serial(&mut bytes);
    generation(&mut bytes);
    panic_port(&mut bytes);
    for (index, window) in (0..).zip(windows) {
        virtio(index, *window, &mut bytes);
    }
    let mut aml = Vec::new();
    Scope::raw(Path::new("\\_SB_"), bytes).iter().for_each(|byte| aml.push(*byte));
    let off = Package::new(vec![&SLEEP_TYPE_OFF, &ZERO, &ZERO, &ZERO]);
    Name::new(Path::new("\\_S5_"), &off).to_aml_bytes(&mut aml);
    let mut table = Sdt::new(*b"DSDT", HEADER_BYTES, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&aml);
    table
}

/// An edge-triggered line, active high, of the device alone.
fn line(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// `_HID` and `_UID` by names as the kernel's drivers know them.
fn text(path: &str, value: &'static str) -> Name {
    Name::new(Path::new(path), &AmlStr::from(value))
}

fn serial(out: &mut Vec<u8>) {
    let ports = u8::try_from(SERIAL_PORTS).unwrap_or(u8::MAX);
    let io = IO::new(SERIAL_PORT, SERIAL_PORT, 1, ports);
    let interrupt = line(SERIAL_GSI);
    let resources = ResourceTemplate::new(vec![&io, &interrupt]);
    Device::new(
        Path::new("COM1"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_CRS"), &resources),
        ],
    )
    .to_aml_bytes(out);
}

/// The generation id, and the event device whose line says that it changed.
fn generation(out: &mut Vec<u8>) {
    let [low, high] = [GENERATION_ID & 0xffff_ffff, GENERATION_ID >> 32];
    Device::new(
        Path::new("VGEN"),
        vec![
            &text("_HID", "VMGENCTR"),
            &text("_CID", "VM_Gen_Counter"),
            &text("_DDN", "VM_Gen_Counter"),
            &Name::new(Path::new("ADDR"), &Package::new(vec![&low, &high])),
        ],
    )
    .to_aml_bytes(out);
    let interrupt = line(GENERATION_GSI);
    let target = Path::new("\\_SB_.VGEN");
    let notify = Notify::new(&target, &GENERATION_CHANGED);
    let ours = Equal::new(&Arg(0), &GENERATION_GSI);
    Device::new(
        Path::new("GEDV"),
        vec![
            &text("_HID", "ACPI0013"),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&interrupt])),
            &Method::new(Path::new("_EVT"), 1, true, vec![&If::new(&ours, vec![&notify])]),
        ],
    )
    .to_aml_bytes(out);
}

fn panic_port(out: &mut Vec<u8>) {
    let io = IO::new(PANIC_PORT, PANIC_PORT, 1, 1);
    Device::new(
        Path::new("PEVT"),
        vec![
            &text("_HID", "QEMU0001"),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&io])),
            &Name::new(Path::new("_STA"), &PRESENT),
        ],
    )
    .to_aml_bytes(out);
}

/// One virtio device over MMIO. Its accesses are coherent (`_CCA`), as KVM's are.
fn virtio(index: u32, window: Window, out: &mut Vec<u8>) {
    // Windows lie below 4 GiB (layout), so both fit.
    let base = u32::try_from(window.base).unwrap_or(u32::MAX);
    let length = u32::try_from(window.len).unwrap_or(u32::MAX);
    let memory = Memory32Fixed::new(true, base, length);
    let interrupt = line(window.gsi);
    let resources = ResourceTemplate::new(vec![&memory, &interrupt]);
    Device::new(
        Path::new(&format!("V{index:03}")),
        vec![
            &text("_HID", "LNRO0005"),
            &Name::new(Path::new("_UID"), &index),
            &Name::new(Path::new("_CCA"), &1u8),
            &Name::new(Path::new("_CRS"), &resources),
        ],
    )
    .to_aml_bytes(out);
}

//! Our guest kernel on the built VMM: boots, ends in each way, and leaves the guest seldom.
//!
//! Behind the feature `microvm`, because it needs KVM that runs Linux and the kernel named in
//! HOLDFAST_VMLINUX.

mod init;
#[path = "../../examples/launch/sys.rs"]
mod sys;
#[expect(dead_code, reason = "the tests do not need all that the program does")]
#[path = "../../examples/launch/vmm.rs"]
mod vmm;

use std::env;

use holdfast_wire::vmm::{Event, Exit, Exits, Reply, ToVmm};
use init::End;
use tempfile::NamedTempFile;
use vmm::{Launch, Vmm};

const COMMAND_LINE: &str = "console=ttyS0 quiet loglevel=1 panic=-1 reboot=k pci=off";
/// VM exits to user space of a boot up to PID 1's line: 200 are measured, most of them the serial
/// port's probe. Twice as many is a regression to be looked at.
const BOOT_EXITS_MAX: u64 = 400;
/// The VMM's memory beyond the guest's, in KiB: of a debug build, which has several times the code
/// (a release's 4 MiB are `scripts/bench boot`'s), and of it what no file holds, as promised.
const OVERHEAD_KIB_MAX: u64 = 8 * 1024;
const ANONYMOUS_KIB_MAX: u64 = 500;

/// Boots our kernel with a PID 1 that ends in the way given.
fn booted(end: End, change: impl FnOnce(&mut Launch)) -> Vmm {
    let initramfs = NamedTempFile::new().unwrap();
    fs_err::write(initramfs.path(), init::initramfs(end)).unwrap();
    let mut launch = Launch {
        vmm: env!("CARGO_BIN_EXE_holdfast-vmm").into(),
        kernel: env::var_os("HOLDFAST_VMLINUX").expect("HOLDFAST_VMLINUX names the kernel").into(),
        initramfs: Some(initramfs.path().to_owned()),
        command_line: COMMAND_LINE.to_owned(),
        memory_mib: 128,
        vcpus: 1,
        disks: Vec::new(),
        serial_bytes_max: 1 << 20,
        stream_serial: false,
    };
    change(&mut launch);
    let mut vmm = launch.start().unwrap();
    assert_eq!(vmm.ask(&ToVmm::Boot).unwrap(), Reply::Done);
    vmm
}

/// Waits for the end: what the agent heard, the exit code, the serial log.
fn ended(vmm: &mut Vmm) -> (Exit, i32, String) {
    let event = vmm.next_event().unwrap();
    let Event::Exited(exit) = event else { panic!("{event:?} before the end") };
    (exit, vmm.wait().unwrap().code().unwrap(), vmm.serial().unwrap())
}

fn exits(vmm: &mut Vmm) -> Exits {
    match vmm.ask(&ToVmm::Stats).unwrap() {
        Reply::Stats(stats) => stats.exits,
        other => panic!("{other:?}"),
    }
}

#[test]
fn linux_boots_prints_and_switches_off() {
    let (exit, code, log) = ended(&mut booted(End::PowerOff, |_| {}));
    assert_eq!((exit, code), (Exit::PowerOff, 0));
    assert!(log.contains(init::HELLO.trim()), "{log}");
}

#[test]
fn a_restart_is_told_from_a_power_off() {
    let (exit, code, _) = ended(&mut booted(End::Restart, |_| {}));
    assert_eq!((exit, code), (Exit::Reset, 10));
}

#[test]
fn a_kernel_panic_is_told_from_a_restart_and_its_reason_is_in_the_log() {
    let (exit, code, log) = ended(&mut booted(End::Exit, |_| {}));
    assert_eq!((exit, code), (Exit::GuestPanic, 11));
    assert!(log.contains("Attempted to kill init"), "{log}");
}

#[test]
fn four_vcpus_and_memory_on_both_sides_of_the_gap_are_found() {
    let mut vmm = booted(End::PowerOff, |launch| {
        launch.vcpus = 4;
        launch.memory_mib = 3 * 1024 + 256;
        // Everything the kernel says.
        launch.command_line = "console=ttyS0 panic=-1 reboot=k pci=off".to_owned();
    });
    let (exit, _, log) = ended(&mut vmm);
    assert_eq!(exit, Exit::PowerOff, "{log}");
    assert!(log.contains("Brought up 1 node, 4 CPUs"), "{log}");
    assert!(log.contains("[mem 0x0000000100000000-0x000000010fffffff] usable"), "{log}");
    assert!(log.contains("Using ACPI (MADT) for SMP configuration"), "{log}");
}

#[test]
fn a_boot_takes_few_exits_and_little_memory_and_survives_pauses() {
    let mut vmm = booted(End::PowerOff, |_| {});
    let mut pauses = 0;
    let (mut most, mut overhead_kib, mut anonymous_kib) = (Exits::default(), 0, 0);
    while vmm.event_within(std::time::Duration::from_millis(20)).unwrap().is_none() {
        // Refused once the guest has ended meanwhile; the loop then finds the event.
        let Ok(Reply::Done) = vmm.ask(&ToVmm::Pause) else { break };
        most = exits(&mut vmm);
        overhead_kib = vmm.overhead_kib().unwrap();
        anonymous_kib = vmm.anonymous_kib().unwrap();
        assert_eq!(vmm.ask(&ToVmm::Resume).unwrap(), Reply::Done);
        pauses += 1;
    }
    assert_eq!(vmm.wait().unwrap().code(), Some(0));
    assert!(vmm.serial().unwrap().contains(init::HELLO.trim()));
    assert!(pauses > 0, "the boot was over before the first pause");
    assert!((1..=BOOT_EXITS_MAX).contains(&most.total()), "{most:?}");
    assert!((1..=OVERHEAD_KIB_MAX).contains(&overhead_kib), "{overhead_kib} KiB");
    assert!((1..=ANONYMOUS_KIB_MAX).contains(&anonymous_kib), "{anonymous_kib} KiB");
}

//! A machine that runs: what it says, and how its guest is spoken to.

use std::{
    env,
    io::{Read, Write},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use holdfast_wire::vmm::{Event, Exit, Reply, Stats, ToVmm};

use crate::{
    guest::STOP,
    initramfs,
    vmm::{Launch, Vmm},
};

/// Longer than a boot and all tests in it take under emulation.
pub(crate) const LONG: Duration = Duration::from_secs(300);

/// Boots a machine whose guest plays `role` of `crate::guest`, and waits until it does.
pub(crate) fn booted(role: &str, change: impl FnOnce(&mut Launch)) -> Vmm {
    let folder = tempfile::tempdir().unwrap();
    let archive = folder.path().join("initramfs");
    let init = include_str!("init-role").replace("@PART@", role);
    initramfs::make(&archive, &init);
    let kernel = env::var_os("HOLDFAST_VMLINUX").expect("HOLDFAST_VMLINUX names the kernel");
    let mut launch = Launch {
        initramfs: Some(archive),
        command_line: "console=ttyS0 quiet panic=-1 reboot=k pci=off".to_owned(),
        memory_mib: 256,
        vcpus: 2,
        ..Launch::new(env!("CARGO_BIN_EXE_holdfast-vmm").into(), kernel.into())
    };
    change(&mut launch);
    let mut vmm = launch.start().unwrap();
    assert_eq!(vmm.ask(&ToVmm::Boot).unwrap(), Reply::Done);
    assert_eq!(within(&mut vmm), Event::GuestReady, "{}", vmm.serial().unwrap());
    vmm
}

/// Tells the guest to switch off, and waits until it has.
pub(crate) fn switch_off(vmm: &mut Vmm) {
    connect(vmm, STOP);
    assert_eq!(within(vmm), Event::Exited(Exit::PowerOff), "{}", vmm.serial().unwrap());
}

/// Waits until `holds`.
pub(crate) fn wait_until(vmm: &mut Vmm, what: &str, mut holds: impl FnMut(&mut Vmm) -> bool) {
    let start = Instant::now();
    while !holds(vmm) {
        assert!(start.elapsed() < LONG, "{what}; serial:\n{}", vmm.serial().unwrap());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// All that the guest says at `port` until it hangs up.
pub(crate) fn told(vmm: &Vmm, port: u32) -> String {
    let mut text = String::new();
    connect(vmm, port).read_to_string(&mut text).unwrap();
    text
}

pub(crate) fn stats(vmm: &mut Vmm) -> Stats {
    match vmm.ask(&ToVmm::Stats).unwrap() {
        Reply::Stats(stats) => stats,
        other => panic!("{other:?}"),
    }
}

pub(crate) fn within(vmm: &mut Vmm) -> Event {
    let start = Instant::now();
    loop {
        if let Some(event) = vmm.event_within(Duration::from_millis(100)).unwrap() {
            return event;
        }
        assert!(start.elapsed() < LONG, "no event; serial:\n{}", vmm.serial().unwrap());
    }
}

/// A client of the guest's `port`, past the greeting.
pub(crate) fn connect(vmm: &Vmm, port: u32) -> UnixStream {
    let mut client = UnixStream::connect(vmm.vsock_path()).unwrap();
    client.set_read_timeout(Some(LONG)).unwrap();
    client.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    assert!(line.starts_with(b"OK "), "{line:?}");
    client
}

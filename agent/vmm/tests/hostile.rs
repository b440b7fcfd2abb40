//! Guests that break every rule of their devices, on the built VMM. Whatever they do, they live on
//! or end alone, with a reason that names it; the VMM answers, keeps to its memory, and a guest
//! beside them notices nothing. Needs /dev/kvm of any kind.

#[expect(dead_code, reason = "the tests do not need all of it")]
#[path = "bare/code.rs"]
mod code;
#[expect(dead_code, reason = "the tests do not need all of it")]
#[path = "bare/elf.rs"]
mod elf;
#[path = "bare/script.rs"]
mod script;
#[path = "../examples/launch/sys.rs"]
mod sys;
#[expect(dead_code, reason = "the tests do not need all that the program does")]
#[path = "../examples/launch/vmm.rs"]
mod vmm;

use std::{
    io::Write,
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use holdfast_wire::vmm::{Event, Exit, Reply, ToVmm};
use script::*;
use tempfile::NamedTempFile;
use vmm::{DiskFiles, Launch, Vmm};

const VMM: &str = env!("CARGO_BIN_EXE_holdfast-vmm");
const LONG: Duration = Duration::from_secs(60);
/// Of the VMM beyond its guest, in KiB.
const ANONYMOUS_KIB_MAX: u64 = 4096;
const SERIAL_BYTES_MAX: u64 = 64 * 1024;

/// In the order of the machine below.
const DISK: u32 = 0;
const RNG: u32 = 1;
const VSOCK: u32 = 2;
const BALLOON: u32 = 3;
const DEVICES: u32 = 4;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const EVENT_INDEX: u32 = 1 << 29;
const REPORTING: u32 = 1 << 5;

/// How an attack ends.
#[derive(Debug, Default)]
struct Outcome {
    stopped: Vec<(String, String)>,
    exit: Option<Exit>,
    serial: String,
}

/// A machine with every device, whose guest carries out the script.
fn machine(script: &Script, disk: &NamedTempFile) -> Vmm {
    let file = NamedTempFile::new().unwrap();
    fs_err::write(file.path(), elf::kernel(&script.code())).unwrap();
    let mut launch = Launch::new(VMM.into(), file.path().to_owned());
    let files = vec![disk.path().to_owned()];
    launch.disks = vec![DiskFiles { files, read_only: false, limits: Default::default() }];
    launch.balloon = true;
    launch.serial_bytes_max = SERIAL_BYTES_MAX;
    let mut vmm = launch.start().unwrap();
    assert_eq!(vmm.ask(&ToVmm::Boot).unwrap(), Reply::Done);
    vmm
}

fn disk() -> NamedTempFile {
    let disk = NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    disk
}

/// Carries it out to its end, asking the VMM all the while.
fn carry_out(name: &str, mut script: Script) -> Outcome {
    let disk = disk();
    let mut vmm = machine(script.end(), &disk);
    let mut outcome = Outcome::default();
    let began = Instant::now();
    while outcome.exit.is_none() {
        assert!(began.elapsed() < LONG, "{name} does not come to its end");
        match vmm.event_within(Duration::from_millis(5)).unwrap() {
            Some(Event::Exited(exit)) => outcome.exit = Some(exit),
            Some(Event::DeviceStopped { device, reason }) => outcome.stopped.push((device, reason)),
            Some(Event::GuestReady) => {}
            // It may have ended meanwhile, and then there is nobody to ask.
            None => {
                let asked = vmm.ask(&ToVmm::Stats);
                assert!(!matches!(asked, Ok(Reply::Refused { .. })), "{name}: {asked:?}");
                let anonymous = vmm.anonymous_kib().unwrap_or_default();
                assert!(anonymous < ANONYMOUS_KIB_MAX, "{name}: {anonymous} KiB");
            }
        }
    }
    outcome.serial = vmm.serial().unwrap();
    let status = vmm.wait().unwrap();
    let exit = outcome.exit.clone().unwrap();
    assert_eq!(status.code(), Some(exit.code().into()), "{name}: {status}");
    outcome
}

/// An attack, and what the VMM is to say of the device it stops, if it stops one.
type Attack = (&'static str, Script, Option<&'static str>);

fn script(write: impl FnOnce(&mut Script)) -> Script {
    let mut script = Script::default();
    write(&mut script);
    script
}

/// Chains that no driver may offer, each to the first queue of a device.
fn chains(device: u32, queues: u32) -> Vec<Attack> {
    // Of the sockets the queue that is read without a need.
    let ring = Ring { device, queue: u32::from(device == VSOCK) };
    let features = if device == BALLOON { EVENT_INDEX | REPORTING } else { EVENT_INDEX };
    let one = |address: u64, what: (u32, u16, u16)| {
        script(|it| {
            it.start(device, features, queues).descriptor(ring, 0, address, what).offer(ring, 0, 0);
            // What a table says is a matter of the device; the rest breaks every one.
            if what.1 & INDIRECT == 0 {
                it.wait_until_broken(device);
            }
            it.start(device, features, queues);
        })
    };
    let inside = u64::from(BUFFERS);
    let flags = if device == RNG { WRITE } else { 0 };
    let end = "descriptor that does not exist, loops or is too long";
    vec![
        ("a chain that is its own end", one(inside, (64, flags | NEXT, 0)), Some(end)),
        ("a chain that leads out of the table", one(inside, (64, flags | NEXT, 999)), Some(end)),
        ("a table that was not agreed on", one(inside, (64, INDIRECT, 0)), Some("")),
        ("a buffer beyond memory", one(1 << 40, (64, flags, 0)), Some("outside of memory")),
        (
            "a buffer around the end of addresses",
            one(u64::MAX - 8, (64, flags, 0)),
            Some("outside of memory"),
        ),
        (
            "a buffer in the hole of devices",
            one(0xd000_0000, (64, flags, 0)),
            Some("outside of memory"),
        ),
        (
            "a buffer longer than memory",
            one(inside, (u32::MAX, flags, 0)),
            Some("outside of memory"),
        ),
        (
            "a head that is none",
            script(|it| _ = it.start(device, features, queues).offer(ring, 0, 777)),
            Some(""),
        ),
        (
            "an index far ahead",
            script(|it| {
                it.start(device, features, queues).store16(ring.available() + 2, 0x8000);
                it.register(device, NOTIFY, 0)
                    .repeat(2000, |it| _ = it.read_register(device, STATUS));
            }),
            Some(""),
        ),
    ]
}

/// Queues set up as none may be.
fn queues(device: u32) -> Vec<Attack> {
    let ring = Ring { device, queue: 0 };
    let features = if device == BALLOON { REPORTING } else { 0 };
    let set = |register: u32, value: u32| {
        script(|it| {
            it.begin(device, features).queue(ring).register(device, QUEUE_READY, 0);
            it.register(device, register, value);
            if register != QUEUE_READY {
                it.register(device, QUEUE_READY, 1);
            }
            it.register(device, STATUS, STARTED).wait_until_broken(device);
            it.start(device, features, 3);
        })
    };
    vec![
        ("a queue of no entries", set(QUEUE_SIZE, 0), Some("size 0")),
        ("a queue of three entries", set(QUEUE_SIZE, 3), Some("size 3")),
        ("a queue of too many entries", set(QUEUE_SIZE, 1 << 20), Some("size 1048576")),
        ("descriptors at an odd place", set(DESCRIPTORS, 0x20_0001), Some("descriptor table")),
        ("a ring beyond memory", set(AVAILABLE + 4, 7), Some("available ring")),
        ("a ring at the end of memory", set(USED, (64 << 20) - 4), Some("used ring")),
        ("a queue that is not ready", set(QUEUE_READY, 0), Some("was not set up")),
    ]
}

fn registers() -> Vec<Attack> {
    vec![
        (
            "every register written and read in every state",
            script(|it| {
                for status in [0, 1, 3, 11, 15, 0x80] {
                    for device in 0..DEVICES {
                        it.register(device, STATUS, status);
                        for register in (0..0x110).step_by(4).filter(|it| *it != STATUS) {
                            it.register(device, register, 0xffff_ffff);
                            it.read_register(device, register);
                        }
                    }
                }
            }),
            None,
        ),
        (
            "accesses of odd sizes and places",
            script(|it| {
                for at in (0xd000_0000_u32..0xd000_5000).step_by(0x3f1) {
                    it.store8(at, 1).store16(at + 1, 2).store(at + 2, 3).load(at + 3);
                }
            }),
            None,
        ),
        (
            "resets in mid-flight",
            script(|it| {
                let ring = Ring { device: DISK, queue: 0 };
                it.store(BUFFERS, 0)
                    .store(BUFFERS + 4, 0)
                    .store(BUFFERS + 8, 0)
                    .store(BUFFERS + 12, 0);
                it.repeat(500, |it| {
                    it.start(DISK, 0, 1);
                    it.descriptor(ring, 0, BUFFERS.into(), (16, NEXT, 1));
                    it.descriptor(ring, 1, (BUFFERS + 4096).into(), (1 << 16, WRITE | NEXT, 2));
                    it.descriptor(ring, 2, (BUFFERS + 16).into(), (1, WRITE, 0));
                    it.offer(ring, 0, 0).register(DISK, STATUS, 0);
                });
            }),
            None,
        ),
        (
            "rings moved while the device runs",
            script(|it| {
                let ring = Ring { device: RNG, queue: 0 };
                it.start(RNG, 0, 1);
                it.repeat(500, |it| {
                    it.register(RNG, QUEUE, 0).register(RNG, DESCRIPTORS, 0xffff_f000);
                    it.register(RNG, QUEUE_READY, 0).register(RNG, QUEUE_SIZE, 0);
                    it.descriptor(ring, 0, BUFFERS.into(), (64, WRITE, 0)).offer(ring, 0, 0);
                });
            }),
            None,
        ),
    ]
}

fn floods() -> Vec<Attack> {
    vec![
        (
            "descriptors and buffers changed under the device",
            script(|it| {
                let ring = Ring { device: DISK, queue: 0 };
                it.start(DISK, 0, 1);
                it.repeat(800, |it| {
                    it.store(BUFFERS, 0).descriptor(ring, 0, BUFFERS.into(), (16, NEXT, 1));
                    it.descriptor(ring, 1, (BUFFERS + 4096).into(), (1 << 20, WRITE | NEXT, 2));
                    it.descriptor(ring, 2, (BUFFERS + 16).into(), (1, WRITE, 0));
                    it.store16(ring.available() + 4, 0).store16(ring.available() + 2, 1);
                    it.register(DISK, NOTIFY, 0);
                    // The device is at it now, on another CPU.
                    it.store(BUFFERS, 99).descriptor(ring, 1, 1 << 50, (u32::MAX, NEXT, 0));
                    it.descriptor(ring, 2, 0, (0, NEXT | WRITE, 2))
                        .store16(ring.available() + 2, 7);
                    it.register(DISK, STATUS, 0).start(DISK, 0, 1);
                });
            }),
            Some(""),
        ),
        (
            "the used ring over descriptors and the guest's own code",
            script(|it| {
                let ring = Ring { device: RNG, queue: 0 };
                it.begin(RNG, 0).queue(ring).register(RNG, USED, ring.base());
                it.register(RNG, STATUS, STARTED);
                for number in 0..64 {
                    it.descriptor(ring, number % ENTRIES, BUFFERS.into(), (64, WRITE, 0));
                    it.offer(ring, number, u16::try_from(number % ENTRIES).unwrap());
                }
            }),
            Some(""),
        ),
        (
            "a flood of packets to nowhere, whose answers are not taken",
            script(|it| {
                let send = Ring { device: VSOCK, queue: 1 };
                it.start(VSOCK, 0, 3).bytes(BUFFERS, &packet(1, 7, 0));
                it.descriptor(send, 0, BUFFERS.into(), (44, 0, 0));
                it.repeat(16, |it| (0..1000).for_each(|number| _ = it.offer(send, number, 0)));
            }),
            Some(""),
        ),
        (
            "packets that lie about their length and their sender",
            script(|it| {
                let send = Ring { device: VSOCK, queue: 1 };
                it.start(VSOCK, 0, 3).bytes(BUFFERS, &packet(5, 7, u32::MAX));
                it.descriptor(send, 0, BUFFERS.into(), (44, 0, 0)).offer(send, 0, 0);
                it.wait_until_broken(VSOCK);
            }),
            Some("the data its packet announces"),
        ),
        (
            "pages of others and of nobody given away",
            script(|it| {
                let inflate = Ring { device: BALLOON, queue: 0 };
                it.start(BALLOON, REPORTING, 3);
                it.store(BUFFERS, 0xffff_ffff).store(BUFFERS + 4, 0xd_0000);
                it.descriptor(inflate, 0, BUFFERS.into(), (8, 0, 0)).offer(inflate, 0, 0);
                it.wait_until_broken(BALLOON);
            }),
            Some("is not one of the guest's memory"),
        ),
    ]
}

/// Far more output than is kept.
fn loud() -> Script {
    script(|it| _ = it.repeat(100_000, |it| _ = it.out(0x3f8, b'x')))
}

/// A packet of the guest's to a port of the host's.
fn packet(op: u16, port: u32, len: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(3u64.to_le_bytes());
    bytes.extend(2u64.to_le_bytes());
    bytes.extend([9u32, port, len].into_iter().flat_map(u32::to_le_bytes));
    bytes.extend([1, op].into_iter().flat_map(u16::to_le_bytes));
    bytes.extend([0, 65536, 0u32].into_iter().flat_map(u32::to_le_bytes));
    bytes
}

/// Carries the attacks out: each guest says that it lives, and nothing was stopped but what the
/// attack is about.
fn all(attacks: Vec<Attack>) {
    for (name, script, wanted) in attacks {
        let outcome = carry_out(name, script);
        assert_eq!(outcome.exit, Some(Exit::PowerOff), "{name}: {outcome:?}");
        assert!(outcome.serial.ends_with("alive"), "{name}: {outcome:?}");
        match wanted {
            // Stopped or not, as the race goes; what is said has a reason.
            Some("") => assert!(outcome.stopped.iter().all(|(_, reason)| !reason.is_empty())),
            Some(wanted) => assert!(
                outcome.stopped.iter().any(|(_, reason)| reason.contains(wanted)),
                "{name}: {outcome:?}"
            ),
            None => assert_eq!(outcome.stopped, [], "{name}"),
        }
    }
}

#[test]
fn chains_that_no_driver_may_offer_stop_their_device_and_nothing_else() {
    for (device, queues) in [(DISK, 1), (RNG, 1), (VSOCK, 3), (BALLOON, 3)] {
        println!("device {device}");
        all(chains(device, queues));
    }
}

#[test]
fn queues_that_no_driver_may_set_up_stop_their_device_and_nothing_else() {
    for device in 0..DEVICES {
        println!("device {device}");
        all(queues(device));
    }
}

#[test]
fn registers_take_whatever_is_written_whenever() {
    all(registers());
}

#[test]
fn floods_and_changes_under_the_device_end_nothing() {
    all(floods());
}

#[test]
fn a_guest_that_is_never_quiet_fills_its_log_and_nothing_more() {
    let outcome = carry_out("output without end", loud());
    assert_eq!((outcome.exit, outcome.stopped), (Some(Exit::PowerOff), Vec::new()));
    // And a line that says so.
    let bytes = outcome.serial.len() as u64;
    assert!((SERIAL_BYTES_MAX..SERIAL_BYTES_MAX + 100).contains(&bytes), "{bytes} bytes");
}

#[test]
fn a_client_that_does_not_read_costs_the_guest_that_floods_it_and_nobody_else() {
    let disk = disk();
    let (receive, send) = (Ring { device: VSOCK, queue: 0 }, Ring { device: VSOCK, queue: 1 });
    let flood = script(|it| {
        it.start(VSOCK, 0, 3).print("up");
        for slot in 0..8 {
            let at = u64::from(BUFFERS + 0x10_0000 + slot * 4096);
            it.descriptor(receive, slot, at, (4096, WRITE, 0));
            it.offer(receive, slot, u16::try_from(slot).unwrap());
        }
        // The client's request is answered, and then far more is said than it has room for.
        it.wait16(receive.used() + 2, 1);
        it.bytes(BUFFERS, &packet(2, 1 << 30, 0)).descriptor(send, 0, BUFFERS.into(), (44, 0, 0));
        it.offer(send, 0, 0).wait16(send.used() + 2, 1);
        it.bytes(BUFFERS + 4096, &packet(5, 1 << 30, 4000));
        it.descriptor(send, 1, (BUFFERS + 4096).into(), (4044, 0, 0));
        it.repeat(8, |it| (1..1000).for_each(|number| _ = it.offer(send, number, 1)));
        it.end();
    });
    let mut vmm = machine(&flood, &disk);
    let began = Instant::now();
    // Before that nobody could answer it.
    loop {
        assert!(began.elapsed() < LONG, "it does not come up");
        match vmm.ask(&ToVmm::Stats).unwrap() {
            Reply::Stats(stats) if stats.serial_bytes >= 2 => break,
            _ => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    let mut client = UnixStream::connect(vmm.vsock_path()).unwrap();
    client.write_all(b"CONNECT 9\n").unwrap();
    loop {
        let serial = || vmm.serial();
        assert!(began.elapsed() < LONG, "it does not come to its end: {:?}", serial());
        match vmm.event_within(Duration::from_millis(5)).unwrap() {
            Some(Event::Exited(exit)) => break assert_eq!(exit, Exit::PowerOff),
            // In the end it offers more than its ring holds.
            Some(Event::DeviceStopped { device, .. }) => assert_eq!(device, "vsock"),
            Some(event) => panic!("{event:?}"),
            None => {
                let anonymous = vmm.anonymous_kib().unwrap_or_default();
                assert!(anonymous < ANONYMOUS_KIB_MAX, "{anonymous} KiB");
            }
        }
    }
    assert!(vmm.serial().unwrap().ends_with("alive"));
}

#[test]
fn a_quiet_guest_beside_all_of_it_goes_on_and_its_vmm_answers() {
    let file = NamedTempFile::new().unwrap();
    fs_err::write(file.path(), elf::kernel(&code::count_for_ever(0))).unwrap();
    let mut quiet = Launch::new(VMM.into(), file.path().to_owned()).start().unwrap();
    assert_eq!(quiet.ask(&ToVmm::Boot).unwrap(), Reply::Done);
    let mut said = 0;
    let loud = vec![("output without end", loud(), None)];
    let attacks = [chains(DISK, 1), queues(VSOCK), registers(), floods(), loud].concat();
    for (name, script, _) in attacks {
        carry_out(name, script);
        let Reply::Stats(stats) = quiet.ask(&ToVmm::Stats).unwrap() else { panic!("after {name}") };
        assert!(stats.serial_bytes > said, "the quiet guest stands still after {name}");
        said = stats.serial_bytes;
        assert_eq!(quiet.event_within(Duration::from_millis(1)).unwrap(), None, "after {name}");
    }
}

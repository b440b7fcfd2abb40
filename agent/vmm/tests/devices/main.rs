//! A real Linux kernel drives every device: disks, entropy, sockets. The guest's initramfs holds
//! busybox and this program, which is the other end of the sockets.
//!
//! Behind the feature `microvm`, because it needs KVM that runs Linux and the kernel named in
//! HOLDFAST_VMLINUX.

mod guest;
mod initramfs;
mod memory;
mod network;
mod processors;
mod running;
mod saved;
#[path = "../../examples/launch/sys.rs"]
mod sys;
#[path = "../../src/devices/net/stand/sys.rs"]
mod tap;
mod trace;
#[expect(dead_code, reason = "the tests do not need all that the program does")]
#[path = "../../examples/launch/vmm.rs"]
mod vmm;

use std::{
    env,
    io::{Read, Write},
    net::Shutdown,
    os::unix::{fs::MetadataExt, net::UnixStream},
    path::PathBuf,
    thread,
    time::Duration,
};

use guest::{COUNT, ECHO, POUR, POURED_BYTES, STOP, pattern, rest};
use holdfast_vmm::seccomp::ThreadKind;
use holdfast_wire::{
    WIRE_VERSION,
    vmm::{Event, Exit, IoLimits, Reply, ToVmm},
};
use running::{LONG, booted, connect, stats, switch_off, within};
use rustix::fs::{Advice, fadvise};
use tempfile::TempDir;
use vmm::{DiskFiles, Launch, Vmm};

const MIB: usize = 1 << 20;

#[test]
fn a_linux_guest_uses_every_device() {
    let files = Files::new();
    let mut vmm = files.launch(env!("CARGO_BIN_EXE_holdfast-vmm").into()).start().unwrap();
    use_every_device(&files, &mut vmm);
}

#[test]
fn a_vmm_makes_each_call_that_its_filters_allow_and_no_other() {
    let program = env::var_os("HOLDFAST_VMM")
        .map_or(env!("CARGO_BIN_EXE_holdfast-vmm").into(), PathBuf::from);
    let files = Files::new();
    let mut vmm = files.launch(trace::traced(&program, &files.path("trace"))).start().unwrap();
    use_every_device(&files, &mut vmm);
    vmm.wait().unwrap();

    let again = Files::new();
    let mut vmm = again.launch(trace::traced(&program, &again.path("trace"))).start().unwrap();
    assert_eq!(vmm.ask(&ToVmm::Boot).unwrap(), Reply::Done);
    assert_eq!(within(&mut vmm), Event::GuestReady, "{}", vmm.serial().unwrap());
    // As a new agent does.
    vmm.control = UnixStream::connect(vmm.control_path()).unwrap();
    vmm.ask(&ToVmm::Hello { version: WIRE_VERSION }).unwrap();
    assert_eq!(vmm.ask(&ToVmm::Kill).unwrap(), Reply::Done);
    vmm.wait().unwrap();

    // The devices that not every machine has.
    let more = Files::new();
    let networked = network::on_a_tap();
    let mut vmm = booted("network", |launch| {
        launch.vmm = trace::traced(&program, &more.path("trace"));
        launch.networks.push(networked);
        launch.balloon = true;
    });
    network::a_small_echo_comes_back();
    assert_eq!(vmm.ask(&ToVmm::RenewGeneration).unwrap(), Reply::Done);
    assert_eq!(vmm.ask(&ToVmm::Pause).unwrap(), Reply::Done);
    assert!(matches!(vmm.ask(&ToVmm::Save).unwrap(), Reply::Saved { .. }));
    assert_eq!(vmm.ask(&ToVmm::Resume).unwrap(), Reply::Done);
    assert_eq!(vmm.ask(&ToVmm::Balloon { target_mib: 16 }).unwrap(), Reply::Done);
    running::wait_until(&mut vmm, "the balloon did not fill", |vmm| {
        stats(vmm).balloon.is_some_and(|balloon| balloon.actual_mib == 16)
    });
    switch_off(&mut vmm);
    vmm.wait().unwrap();

    let (mut needed, mut missing) = (Vec::new(), Vec::new());
    for files in [&files, &again, &more] {
        trace::judge(&files.path("trace"), &mut needed, &mut missing);
    }
    assert!(missing.is_empty(), "no rule for: {missing:#?}");
    let unneeded = trace::unneeded(&ThreadKind::ALL, &needed);
    assert!(unneeded.is_empty(), "nothing needs: {unneeded:#?}");
}

/// Boots, and uses everything until the guest switches itself off.
fn use_every_device(files: &Files, vmm: &mut Vmm) {
    assert_eq!(vmm.ask(&ToVmm::Boot).unwrap(), Reply::Done);
    assert_eq!(within(vmm), Event::GuestReady, "{}", vmm.serial().unwrap());

    a_small_echo_comes_back(vmm);
    many_bytes_arrive_whole_and_the_end_is_passed_on(vmm);
    a_slow_reader_gets_every_byte(vmm);
    many_clients_at_once_are_kept_apart(vmm);
    a_port_without_a_listener_ends_the_client(vmm);
    a_pause_in_the_middle_loses_nothing(vmm);

    let stats = stats(vmm);
    assert!(stats.vsock_rx_bytes > 4 * MIB as u64, "{stats:?}");
    assert_eq!(stats.disks.len(), 3);
    assert_eq!(stats.disks[1].written_bytes, files.image.len() as u64);

    connect(vmm, STOP);
    assert_eq!(within(vmm), Event::Exited(Exit::PowerOff), "{}", vmm.serial().unwrap());
    let told = vmm.serial().unwrap();
    for line in [
        "vda is disk0, 48 sectors, read-only 1",
        "vdb is disk1, 64 sectors, read-only 0",
        "vdc is disk2, 32768 sectors, read-only 0",
        "vda copied to vdb",
        "vdb reads the same",
        "vda refuses writes",
        "vdc discarded",
        "vdc reads zeros",
        "vdc holds a file system",
        "hwrng gives bytes",
        "another port of the host was refused",
    ] {
        assert!(told.contains(line), "{line:?} is missing in:\n{told}");
    }
    files.check();
}

fn a_small_echo_comes_back(vmm: &Vmm) {
    let mut client = connect(vmm, ECHO);
    client.write_all(b"hello").unwrap();
    let mut answer = [0; 5];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"hello");
}

fn many_bytes_arrive_whole_and_the_end_is_passed_on(vmm: &Vmm) {
    let mut client = connect(vmm, COUNT);
    client.write_all(&pattern(POURED_BYTES)).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rest(&mut client), format!("{POURED_BYTES} as expected").as_bytes());
}

fn a_slow_reader_gets_every_byte(vmm: &Vmm) {
    let mut client = connect(vmm, POUR);
    thread::sleep(Duration::from_secs(2));
    assert!(rest(&mut client) == pattern(POURED_BYTES));
}

fn many_clients_at_once_are_kept_apart(vmm: &Vmm) {
    let mut clients: Vec<_> = (0..20).map(|_| connect(vmm, ECHO)).collect();
    for (number, client) in (0u8..).zip(&mut clients) {
        client.write_all(&[number; 3000]).unwrap();
    }
    for (number, client) in (0u8..).zip(&mut clients) {
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(rest(client), [number; 3000]);
    }
}

fn a_port_without_a_listener_ends_the_client(vmm: &Vmm) {
    let mut client = UnixStream::connect(vmm.vsock_path()).unwrap();
    client.set_read_timeout(Some(LONG)).unwrap();
    client.write_all(b"CONNECT 9\n").unwrap();
    assert_eq!(rest(&mut client), b"");
}

fn a_pause_in_the_middle_loses_nothing(vmm: &mut Vmm) {
    let mut client = connect(vmm, POUR);
    let mut poured = vec![0; MIB];
    client.read_exact(&mut poured).unwrap();
    assert_eq!(vmm.ask(&ToVmm::Pause).unwrap(), Reply::Done);
    let before = stats(vmm);
    thread::sleep(Duration::from_millis(300));
    assert_eq!(stats(vmm), before);
    assert_eq!(vmm.ask(&ToVmm::Resume).unwrap(), Reply::Done);
    poured.extend(rest(&mut client));
    assert!(poured == pattern(POURED_BYTES));
}

/// What the guest is made of.
struct Files {
    folder: TempDir,
    image: Vec<u8>,
}

impl Files {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = pattern(6 * 4096);
        let files = Self { folder, image };
        // Three segments of different lengths.
        for (name, part) in [("a", 0..4096), ("b", 4096..16_384), ("c", 16_384..24_576)] {
            fs_err::write(files.path(name), &files.image[part]).unwrap();
            // As most of an image is at first: on the disk, and not in the host's memory.
            let file = fs_err::File::open(files.path(name)).unwrap();
            file.sync_all().unwrap();
            fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        }
        fs_err::write(files.path("copy"), vec![0xff; 8 * 4096]).unwrap();
        fs_err::write(files.path("scratch"), vec![0xff; 16 * MIB]).unwrap();
        initramfs::make(&files.path("initramfs"), include_str!("init"));
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn launch(&self, vmm: PathBuf) -> Launch {
        let kernel = env::var_os("HOLDFAST_VMLINUX").expect("HOLDFAST_VMLINUX names the kernel");
        let disk = |files: &[&str], read_only| DiskFiles {
            files: files.iter().map(|name| self.path(name)).collect(),
            read_only,
            limits: IoLimits::default(),
        };
        Launch {
            initramfs: Some(self.path("initramfs")),
            command_line: "console=ttyS0 quiet panic=-1 reboot=k pci=off".to_owned(),
            memory_mib: 256,
            vcpus: 2,
            disks: vec![
                disk(&["a", "b", "c"], true),
                disk(&["copy"], false),
                disk(&["scratch"], false),
            ],
            ..Launch::new(vmm, kernel.into())
        }
    }

    /// What the guest did to the disks is in the files.
    fn check(&self) {
        let copy = fs_err::read(self.path("copy")).unwrap();
        assert_eq!(copy[..self.image.len()], self.image);
        assert_eq!(copy[self.image.len()..], [0xff; 2 * 4096]);
        let scratch = fs_err::metadata(self.path("scratch")).unwrap();
        assert_eq!(scratch.len(), 16 * MIB as u64);
        assert!(scratch.blocks() * 512 < 8 * MIB as u64, "discarded space was not given back");
    }
}

//! A real Linux kernel drives every device: disks, entropy, sockets. The guest's initramfs holds
//! busybox and this program, which is the other end of the sockets.
//!
//! Behind the feature `microvm`, because it needs KVM that runs Linux and the kernel named in
//! HOLDFAST_VMLINUX.

mod guest;
#[path = "../../examples/launch/sys.rs"]
mod sys;
mod trace;
#[expect(dead_code, reason = "the tests do not need all that the program does")]
#[path = "../../examples/launch/vmm.rs"]
mod vmm;

use std::{
    env,
    io::{Read, Write},
    net::Shutdown,
    os::unix::{fs::MetadataExt, fs::PermissionsExt, net::UnixStream},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use guest::{COUNT, ECHO, POUR, POURED_BYTES, STOP, pattern, rest};
use holdfast_vmm::seccomp::ThreadKind;
use holdfast_wire::{
    WIRE_VERSION,
    vmm::{Event, Exit, Reply, Stats, ToVmm},
};
use tempfile::TempDir;
use vmm::{DiskFiles, Launch, Vmm};

/// Longer than a boot and all tests in it take under emulation.
const LONG: Duration = Duration::from_secs(300);
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

    let (mut needed, mut missing) = (Vec::new(), Vec::new());
    for files in [&files, &again] {
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

fn stats(vmm: &mut Vmm) -> Stats {
    match vmm.ask(&ToVmm::Stats).unwrap() {
        Reply::Stats(stats) => stats,
        other => panic!("{other:?}"),
    }
}

fn within(vmm: &mut Vmm) -> Event {
    let start = Instant::now();
    loop {
        if let Some(event) = vmm.event_within(Duration::from_millis(100)).unwrap() {
            return event;
        }
        assert!(start.elapsed() < LONG, "no event; serial:\n{}", vmm.serial().unwrap());
    }
}

/// A client of the guest's `port`, past the greeting.
fn connect(vmm: &Vmm, port: u32) -> UnixStream {
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
        }
        fs_err::write(files.path("copy"), vec![0xff; 8 * 4096]).unwrap();
        fs_err::write(files.path("scratch"), vec![0xff; 16 * MIB]).unwrap();
        files.make_initramfs();
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
        };
        Launch {
            vmm,
            kernel: kernel.into(),
            initramfs: Some(self.path("initramfs")),
            command_line: "console=ttyS0 quiet panic=-1 reboot=k pci=off".to_owned(),
            memory_mib: 256,
            vcpus: 2,
            disks: vec![
                disk(&["a", "b", "c"], true),
                disk(&["copy"], false),
                disk(&["scratch"], false),
            ],
            serial_bytes_max: 1 << 20,
            stream_serial: false,
        }
    }

    /// busybox, this program and its libraries, at the paths they have here.
    fn make_initramfs(&self) {
        let root = self.path("root");
        let put = |from: &Path, to: &str| {
            let target = root.join(to.trim_start_matches('/'));
            fs_err::create_dir_all(target.parent().unwrap()).unwrap();
            fs_err::copy(from, &target).unwrap();
            fs_err::set_permissions(&target, PermissionsExt::from_mode(0o755)).unwrap();
        };
        put(Path::new("/bin/busybox"), "bin/busybox");
        put(&env::current_exe().unwrap(), "probe");
        let maps = fs_err::read_to_string("/proc/self/maps").unwrap();
        for library in maps.lines().filter_map(|line| line.split_whitespace().nth(5)) {
            if library.contains(".so") {
                put(Path::new(library), library);
            }
        }
        // The loader is found by the one path written into every program.
        put(Path::new("/lib64/ld-linux-x86-64.so.2"), "lib64/ld-linux-x86-64.so.2");
        let init = root.join("init");
        fs_err::write(&init, include_str!("init")).unwrap();
        fs_err::set_permissions(&init, PermissionsExt::from_mode(0o755)).unwrap();
        let pack = "find . | cpio -o -H newc > ../initramfs";
        let mut packer = Command::new("/bin/busybox");
        assert!(packer.args(["sh", "-c", pack]).current_dir(&root).status().unwrap().success());
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

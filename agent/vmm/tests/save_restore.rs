//! The built VMM saved and restored with tiny guests of our own: they go on where they stood, in
//! registers and in memory, as often as one likes; what does not fit is refused. Needs /dev/kvm of
//! any kind.

#[expect(dead_code, reason = "the tests do not need all of it")]
#[path = "bare/code.rs"]
mod code;
#[expect(dead_code, reason = "the tests do not need all of it")]
#[path = "bare/elf.rs"]
mod elf;
#[path = "../examples/launch/sys.rs"]
mod sys;
#[expect(dead_code, reason = "the tests do not need all that the program does")]
#[path = "../examples/launch/vmm.rs"]
mod vmm;

use std::{
    path::Path,
    time::{Duration, Instant},
};

use holdfast_wire::vmm::{Phase, Reply, ToVmm};
use tempfile::TempDir;
use vmm::{Launch, Saved, Vmm};

const VMM: &str = env!("CARGO_BIN_EXE_holdfast-vmm");
/// Longer than anything here takes; only a hung VMM reaches it.
const LONG: Duration = Duration::from_secs(60);
/// Of guest memory, behind the tiny kernel.
const COUNTER: u32 = 0x20_0000;

/// What a test starts machines from.
struct Bench {
    folder: TempDir,
    launch: Launch,
}

impl Bench {
    fn new(code: &[u8]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let kernel = folder.path().join("kernel");
        fs_err::write(&kernel, elf::kernel(code)).unwrap();
        Self { launch: Launch::new(VMM.into(), kernel), folder }
    }

    fn booted(&self) -> Vmm {
        let mut vmm = self.launch.start().unwrap();
        assert_eq!(vmm.ask(&ToVmm::Boot).unwrap(), Reply::Done);
        vmm
    }

    fn waiting(&self, saved: &Saved) -> Vmm {
        Launch { saved: Some(saved.clone()), ..self.launch.clone() }.start().unwrap()
    }

    /// Restored and going on.
    fn restored(&self, saved: &Saved) -> Vmm {
        let mut vmm = self.waiting(saved);
        for request in [ToVmm::Restore, ToVmm::RenewGeneration, ToVmm::Resume] {
            assert_eq!(vmm.ask(&request).unwrap(), Reply::Done, "{request:?}");
        }
        vmm
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }
}

/// What the guest has written, once it is at least `count` bytes.
fn output(vmm: &mut Vmm, count: usize) -> Vec<u8> {
    let start = Instant::now();
    loop {
        // Writes out an unfinished line.
        vmm.ask(&ToVmm::Stats).unwrap();
        let bytes = vmm.serial_raw().unwrap();
        if bytes.len() >= count {
            return bytes;
        }
        assert!(start.elapsed() < LONG, "{} bytes of {count}", bytes.len());
    }
}

/// Asserts that each number is one more than that before it.
fn assert_counts(bytes: &[u8]) {
    for pair in bytes.windows(2) {
        assert_eq!(pair[1], pair[0].wrapping_add(1), "{bytes:?}");
    }
}

fn refusal(reply: Reply) -> String {
    match reply {
        Reply::Refused { reason } => reason,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn a_restored_guest_goes_on_with_the_registers_it_had_and_so_does_the_saved_one() {
    let bench = Bench::new(&code::count_for_ever(1));
    let mut first = bench.booted();
    output(&mut first, 10);
    let saved = first.save(&bench.path("memory")).unwrap();
    let before = output(&mut first, 10);
    let mut second = bench.restored(&saved);
    let after = output(&mut second, 10);
    assert_counts(&before);
    assert_counts(&[&before[..], &after[..]].concat());
    // The saved one was only paused.
    assert_eq!(first.ask(&ToVmm::Resume).unwrap(), Reply::Done);
    assert_counts(&output(&mut first, before.len() + 10));
}

#[test]
fn every_clone_goes_on_from_the_saved_memory_and_none_writes_to_it() {
    let bench = Bench::new(&code::count_in_memory(COUNTER));
    let mut first = bench.booted();
    output(&mut first, 10);
    let saved = first.save(&bench.path("memory")).unwrap();
    let before = output(&mut first, 10);
    let image = fs_err::read(&saved.memory).unwrap();
    let mut clones: Vec<_> = (0..3).map(|_| bench.restored(&saved)).collect();
    for clone in &mut clones {
        let after = output(clone, 20);
        assert_counts(&[&before[..], &after[..]].concat());
    }
    assert!(image == fs_err::read(&saved.memory).unwrap(), "a clone wrote to the image");
}

#[test]
fn a_restored_machine_can_be_saved_again_and_its_state_is_as_small() {
    let bench = Bench::new(&code::count_in_memory(COUNTER));
    let mut first = bench.booted();
    let saved = first.save(&bench.path("memory")).unwrap();
    let mut second = bench.restored(&saved);
    output(&mut second, 10);
    let again = second.save(&bench.path("again")).unwrap();
    let before = output(&mut second, 10);
    let mut third = bench.restored(&again);
    assert_counts(&[&before[..], &output(&mut third, 10)[..]].concat());
    assert!(again.state.len() < 16 * 1024, "{} bytes", again.state.len());
}

#[test]
fn several_vcpus_are_saved_and_restored_together() {
    let mut bench = Bench::new(&code::print_for_ever(b'.'));
    bench.launch.vcpus = 4;
    let mut first = bench.booted();
    output(&mut first, 1);
    let saved = first.save(&bench.path("memory")).unwrap();
    output(&mut bench.restored(&saved), 10);
    // With fewer they do not fit.
    bench.launch.vcpus = 2;
    let reason = refusal(bench.waiting(&saved).ask(&ToVmm::Restore).unwrap());
    assert_eq!(reason, "the state has 4 vCPUs, the machine 2");
}

#[test]
fn a_restored_machine_waits_to_be_resumed_and_knows_that_its_guest_is_ready_or_not() {
    let bench = Bench::new(&code::print_for_ever(b'.'));
    let saved = bench.booted().save(&bench.path("memory")).unwrap();
    let mut vmm = bench.waiting(&saved);
    assert_eq!(vmm.ask(&ToVmm::Restore).unwrap(), Reply::Done);
    let hello = vmm.ask(&ToVmm::Hello { version: holdfast_wire::WIRE_VERSION }).unwrap();
    assert_eq!(hello, Reply::Hello { version: holdfast_wire::WIRE_VERSION, phase: Phase::Paused });
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(vmm.serial_raw().unwrap(), b"");
    assert_eq!(vmm.ask(&ToVmm::Resume).unwrap(), Reply::Done);
    output(&mut vmm, 1);
}

#[test]
fn what_is_no_state_of_this_machine_is_refused_by_what_it_is_and_nothing_runs() {
    let bench = Bench::new(&code::print_for_ever(b'.'));
    let saved = bench.booted().save(&bench.path("memory")).unwrap();
    let mut flipped = saved.state.clone();
    let last = flipped.len() - 1;
    flipped[last] ^= 1;
    let mut newer = saved.state.clone();
    newer[4] += 1;
    let cut = saved.state[..saved.state.len() - 1].to_vec();
    let long = [&saved.state[..], &vec![0; 256 * 1024][..]].concat();
    for (state, told) in [
        (Vec::new(), "these 0 bytes are no saved state"),
        (b"something else".to_vec(), "these 14 bytes are no saved state"),
        (newer, "is of version 2, this VMM knows 1"),
        (flipped, "was changed or cut"),
        (cut, "was changed or cut"),
        (long, "has over 261120 bytes"),
    ] {
        let mut vmm = bench.waiting(&Saved { state, memory: saved.memory.clone() });
        let reason = refusal(vmm.ask(&ToVmm::Restore).unwrap());
        assert!(reason.contains(told), "{reason}");
        assert_eq!(vmm.ask(&ToVmm::Kill).unwrap(), Reply::Done);
        assert_eq!(vmm.serial_raw().unwrap(), b"");
    }
}

#[test]
fn a_machine_with_other_devices_does_not_take_the_state() {
    let bench = Bench::new(&code::print_for_ever(b'.'));
    let saved = bench.booted().save(&bench.path("memory")).unwrap();
    let launch = Launch { saved: Some(saved), balloon: true, ..bench.launch.clone() };
    let reason = refusal(launch.start().unwrap().ask(&ToVmm::Restore).unwrap());
    assert_eq!(reason, "the state has 2 devices, the machine 3");
}

#[test]
fn saving_and_restoring_are_refused_when_it_is_not_their_time() {
    let bench = Bench::new(&code::print_for_ever(b'.'));
    let mut vmm = bench.booted();
    assert_eq!(refusal(vmm.ask(&ToVmm::Save).unwrap()), "cannot save while Booting");
    assert_eq!(refusal(vmm.ask(&ToVmm::Restore).unwrap()), "cannot restore while Booting");
    let saved = vmm.save(&bench.path("memory")).unwrap();
    let mut without = bench.launch.start().unwrap();
    let reason = refusal(without.ask(&ToVmm::Restore).unwrap());
    assert_eq!(reason, "this machine was given no saved state");
    let mut twice = bench.restored(&saved);
    assert_eq!(refusal(twice.ask(&ToVmm::Boot).unwrap()), "cannot boot while Booting");
}

#[test]
fn an_image_that_is_not_as_long_as_the_memory_is_refused() {
    let bench = Bench::new(&code::print_for_ever(b'.'));
    let saved = bench.booted().save(&bench.path("memory")).unwrap();
    let short: &Path = &bench.path("short");
    fs_err::write(short, [0; 4096]).unwrap();
    let launch =
        Launch { saved: Some(Saved { memory: short.to_owned(), ..saved }), ..bench.launch.clone() };
    // It ends before it listens to anybody.
    assert!(launch.start().is_err());
}

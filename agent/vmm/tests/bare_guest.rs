//! The built VMM with tiny guests of our own: what comes out of the serial port, how an end is
//! reported, pausing, and the manners of the control socket. Needs /dev/kvm of any kind.

#[expect(dead_code, reason = "the tests do not need all of it")]
#[path = "bare/code.rs"]
mod code;
#[path = "bare/elf.rs"]
mod elf;
#[path = "../examples/launch/sys.rs"]
mod sys;
#[path = "devices/trace.rs"]
mod trace;
#[expect(dead_code, reason = "the tests do not need all that the program does")]
#[path = "../examples/launch/vmm.rs"]
mod vmm;

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use holdfast_vmm::seccomp::ThreadKind;
use holdfast_wire::{
    WIRE_VERSION, frame,
    vmm::{Event, Exit, Phase, Reply, ToAgent, ToVmm},
};
use tempfile::NamedTempFile;
use vmm::{Launch, Vmm};

const VMM: &str = env!("CARGO_BIN_EXE_holdfast-vmm");
const SLEEP_CONTROL: u16 = 0x600;
const SWITCH_OFF: u8 = 5 << 2 | 1 << 5;
/// Longer than anything here takes; only a hung VMM reaches it.
const LONG: Duration = Duration::from_secs(60);

/// A VMM that waits to boot `kernel`.
fn waiting_with(kernel: &[u8], change: impl FnOnce(&mut Launch)) -> Vmm {
    let file = NamedTempFile::new().unwrap();
    fs_err::write(file.path(), kernel).unwrap();
    let mut launch = Launch::new(VMM.into(), file.path().to_owned());
    change(&mut launch);
    launch.start().unwrap()
}

/// A VMM whose guest runs `code`.
fn running(code: &[u8]) -> Vmm {
    let mut vmm = waiting_with(&elf::kernel(code), |_| {});
    assert_eq!(vmm.ask(&ToVmm::Boot).unwrap(), Reply::Done);
    vmm
}

/// Runs `code` to its end: what the agent heard, the exit code, the serial log.
fn run(code: &[u8]) -> (Exit, i32, String) {
    let mut vmm = running(code);
    let Event::Exited(exit) = vmm.next_event().unwrap() else { panic!("not an end") };
    let status = vmm.wait().unwrap().code().unwrap();
    (exit, status, vmm.serial().unwrap())
}

fn serial_bytes(vmm: &mut Vmm) -> u64 {
    match vmm.ask(&ToVmm::Stats).unwrap() {
        Reply::Stats(stats) => stats.serial_bytes,
        other => panic!("{other:?}"),
    }
}

/// Waits until the guest has written more than `bytes`.
fn await_output(vmm: &mut Vmm, bytes: u64) {
    let start = Instant::now();
    while serial_bytes(vmm) <= bytes {
        assert!(start.elapsed() < LONG, "no output");
    }
}

fn refusal(reply: Reply) -> String {
    match reply {
        Reply::Refused { reason } => reason,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn output_is_logged_and_power_off_is_reported_as_such() {
    let code = code::all(&[code::print("one\ntwo"), code::out(SLEEP_CONTROL, SWITCH_OFF)]);
    assert_eq!(run(&code), (Exit::PowerOff, 0, "one\ntwo".to_owned()));
}

#[test]
fn the_guest_starts_with_ebx_at_the_start_info() {
    let check = code::if_start_info(&code::print("here"));
    let code = code::all(&[check, code::out(SLEEP_CONTROL, SWITCH_OFF)]);
    assert_eq!(run(&code).2, "here");
}

#[test]
fn reset_panic_and_triple_fault_are_told_apart() {
    let (exit, code, _) = run(&code::all(&[code::out(0x64, 0xfe), code::stay()]));
    assert_eq!((exit, code), (Exit::Reset, 10));
    let (exit, code, _) = run(&code::all(&[code::out(0x505, 1), code::stay()]));
    assert_eq!((exit, code), (Exit::GuestPanic, 11));
    let (exit, code, _) = run(&code::crash());
    assert_eq!((exit, code), (Exit::GuestFault("triple fault on vCPU 0".to_owned()), 12));
}

#[test]
fn accesses_where_nothing_is_do_no_harm() {
    // mov eax, [0xd0800000]; mov [0xd0800000], eax; in al, dx on a free port.
    let code = code::all(&[
        vec![0xa1, 0, 0, 0x80, 0xd0, 0xa3, 0, 0, 0x80, 0xd0],
        code::out(0x1234, 1),
        vec![0xec],
        code::print("alive"),
        code::out(SLEEP_CONTROL, SWITCH_OFF),
    ]);
    assert_eq!(run(&code), (Exit::PowerOff, 0, "alive".to_owned()));
}

#[test]
fn a_paused_guest_stands_still_and_a_resumed_one_goes_on() {
    let mut vmm = running(&code::print_for_ever(b'.'));
    await_output(&mut vmm, 0);
    for _ in 0..10 {
        assert_eq!(vmm.ask(&ToVmm::Pause).unwrap(), Reply::Done);
        let paused_at = serial_bytes(&mut vmm);
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(serial_bytes(&mut vmm), paused_at);
        assert_eq!(vmm.ask(&ToVmm::Resume).unwrap(), Reply::Done);
        await_output(&mut vmm, paused_at);
    }
}

/// What a VMM says that is asked for all of it at once, before it looks at what its guest does.
fn replies_at_once(vmm: &mut Vmm, requests: &[ToVmm]) -> Vec<Reply> {
    let frames = requests.iter().map(|request| frame::encode(request).unwrap());
    vmm.control.write_all(&frames.collect::<Vec<_>>().concat()).unwrap();
    let mut replies = Vec::new();
    while let Some(ToAgent::Reply(reply)) = frame::read_frame(&mut vmm.control).unwrap() {
        replies.push(reply);
    }
    replies
}

#[test]
fn a_guest_that_has_just_ended_is_neither_paused_nor_waited_for() {
    let guest = elf::kernel(&code::all(&[code::out(0x64, 0xfe), code::stay()]));
    let over = "cannot pause: the guest has just ended";
    // The many in between give it time to end; now and then it is not enough.
    let requests =
        [&[ToVmm::Boot][..], &vec![ToVmm::Stats; 150], &[ToVmm::Pause, ToVmm::Save, ToVmm::Resume]]
            .concat();
    for _ in 0..50 {
        let mut vmm = waiting_with(&guest, |_| {});
        let replies = replies_at_once(&mut vmm, &requests);
        let refused: Vec<_> = replies
            .into_iter()
            .filter_map(|reply| match reply {
                Reply::Refused { reason } => Some(reason),
                _ => None,
            })
            .collect();
        match refused.first() {
            None => {}
            Some(reason) => return assert_eq!(reason, over),
        }
    }
    panic!("it never ended in time");
}

#[test]
fn a_guest_that_never_leaves_can_be_paused_and_killed() {
    let mut vmm = running(&code::stay());
    assert_eq!(vmm.ask(&ToVmm::Pause).unwrap(), Reply::Done);
    assert_eq!(vmm.ask(&ToVmm::Resume).unwrap(), Reply::Done);
    assert_eq!(vmm.ask(&ToVmm::Kill).unwrap(), Reply::Done);
    assert_eq!(vmm.next_event().unwrap(), Event::Exited(Exit::Killed));
    assert_eq!(vmm.wait().unwrap().code(), Some(13));
}

#[test]
fn the_serial_log_ends_at_its_limit_and_says_so() {
    let mut vmm =
        waiting_with(&elf::kernel(&code::print_for_ever(b'x')), |it| it.serial_bytes_max = 100);
    vmm.ask(&ToVmm::Boot).unwrap();
    await_output(&mut vmm, 2000);
    let log = vmm.serial().unwrap();
    assert!(log.starts_with(&format!("{}\n[serial log is full", "x".repeat(100))), "{log}");
    assert!(log.len() < 200, "{} bytes", log.len());
}

#[test]
fn requests_that_do_not_fit_the_phase_are_refused_by_name() {
    let mut vmm = waiting_with(&elf::kernel(&code::stay()), |_| {});
    assert_eq!(refusal(vmm.ask(&ToVmm::Pause).unwrap()), "cannot pause while Waiting");
    assert_eq!(vmm.ask(&ToVmm::Boot).unwrap(), Reply::Done);
    assert_eq!(refusal(vmm.ask(&ToVmm::Boot).unwrap()), "cannot boot while Booting");
    assert_eq!(refusal(vmm.ask(&ToVmm::Resume).unwrap()), "cannot resume while Booting");
}

#[test]
fn a_kernel_that_cannot_be_booted_is_refused_and_the_vmm_lives() {
    for kernel in [elf::kernel_without_entry(&code::stay()), b"not ELF".to_vec(), Vec::new()] {
        let mut vmm = waiting_with(&kernel, |_| {});
        let reason = refusal(vmm.ask(&ToVmm::Boot).unwrap());
        assert!(reason.starts_with("kernel "), "{reason}");
        assert_eq!(vmm.ask(&ToVmm::Kill).unwrap(), Reply::Done);
    }
}

#[test]
fn a_new_connection_replaces_the_old_and_learns_the_phase() {
    let mut vmm = running(&code::stay());
    let fresh = UnixStream::connect(vmm.control_path()).unwrap();
    let mut old = std::mem::replace(&mut vmm.control, fresh);
    let hello = vmm.ask(&ToVmm::Hello { version: WIRE_VERSION }).unwrap();
    assert_eq!(hello, Reply::Hello { version: WIRE_VERSION, phase: Phase::Booting });
    assert_eq!(old.read(&mut [0; 1]).unwrap(), 0, "the old connection is still open");
    assert_eq!(vmm.ask(&ToVmm::Kill).unwrap(), Reply::Done);
}

#[test]
fn a_connection_that_does_not_greet_or_speaks_another_version_is_refused() {
    let vmm = running(&code::stay());
    for first in [ToVmm::Stats, ToVmm::Hello { version: WIRE_VERSION + 1 }] {
        let mut stranger = UnixStream::connect(vmm.control_path()).unwrap();
        frame::write_frame(&mut stranger, &first).unwrap();
        let told: Option<ToAgent> = frame::read_frame(&mut stranger).unwrap();
        assert!(matches!(told, Some(ToAgent::Reply(Reply::Refused { .. }))), "{told:?}");
        assert!(frame::read_frame::<ToAgent>(&mut stranger).unwrap().is_none());
    }
}

#[test]
fn several_vcpus_are_paused_and_ended_together() {
    let mut vmm = waiting_with(&elf::kernel(&code::print_for_ever(b'.')), |it| it.vcpus = 4);
    assert_eq!(vmm.ask(&ToVmm::Boot).unwrap(), Reply::Done);
    await_output(&mut vmm, 0);
    assert_eq!(vmm.ask(&ToVmm::Pause).unwrap(), Reply::Done);
    assert_eq!(vmm.ask(&ToVmm::Kill).unwrap(), Reply::Done);
    assert_eq!(vmm.wait().unwrap().code(), Some(13));
}

#[test]
fn every_thread_is_under_a_filter_once_the_guest_runs() {
    let mut vmm = waiting_with(&elf::kernel(&code::print_for_ever(b'.')), |it| it.vcpus = 2);
    assert_eq!(vmm.ask(&ToVmm::Boot).unwrap(), Reply::Done);
    await_output(&mut vmm, 0);
    let mut threads = Vec::new();
    for thread in fs_err::read_dir(format!("/proc/{}/task", vmm.pid())).unwrap() {
        let folder = thread.unwrap().path();
        let name = fs_err::read_to_string(folder.join("comm")).unwrap().trim().to_owned();
        // The kernel's own, which shows among ours.
        if name.starts_with("kvm-") {
            continue;
        }
        let status = fs_err::read_to_string(folder.join("status")).unwrap();
        assert!(status.contains("Seccomp:\t2\nSeccomp_filters:\t1\n"), "{status}");
        threads.push(name);
    }
    threads.sort();
    assert_eq!(threads, ["holdfast-vmm", "rng", "vcpu0", "vcpu1", "vsock"]);
}

#[test]
fn main_and_vcpu_threads_make_each_call_their_filters_allow_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace");
    let wrapper = trace::traced(VMM.as_ref(), &path);
    let mut vmm = waiting_with(&elf::kernel(&code::print_for_ever(b'.')), |it| {
        it.vmm = wrapper;
        it.vcpus = 2;
    });
    assert_eq!(vmm.ask(&ToVmm::Boot).unwrap(), Reply::Done);
    await_output(&mut vmm, 0);
    assert_eq!(vmm.ask(&ToVmm::Pause).unwrap(), Reply::Done);
    assert!(matches!(vmm.ask(&ToVmm::Save).unwrap(), Reply::Saved { .. }));
    assert_eq!(vmm.ask(&ToVmm::Resume).unwrap(), Reply::Done);
    assert_eq!(vmm.ask(&ToVmm::RenewGeneration).unwrap(), Reply::Done);
    // As a new agent does.
    vmm.control = UnixStream::connect(vmm.control_path()).unwrap();
    vmm.ask(&ToVmm::Hello { version: WIRE_VERSION }).unwrap();
    assert_eq!(vmm.ask(&ToVmm::Kill).unwrap(), Reply::Done);
    assert_eq!(vmm.wait().unwrap().code(), Some(13));

    let (mut needed, mut missing) = (Vec::new(), Vec::new());
    trace::judge(&path, &mut needed, &mut missing);
    assert!(missing.is_empty(), "no rule for: {missing:#?}");
    let unneeded = trace::unneeded(&[ThreadKind::Main, ThreadKind::Vcpu], &needed);
    assert!(unneeded.is_empty(), "nothing needs: {unneeded:#?}");
}

#[test]
fn without_a_configuration_the_vmm_ends_at_once_and_says_why() {
    // The shell closes fd 3, whatever this process has there.
    let output = Command::new("/bin/sh")
        .args(["-c", "exec \"$0\" 3<&-", VMM])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(log.contains("configuration cannot be read from fd 3"), "{log}");
    assert!(log.contains("hint="), "{log}");
}

//! The shim with stand-ins for a VMM: what they are handed, how their end is told, and adoption.
//! Needs root. A plain folder stands in for the cgroup: real ones are in `cgroup.rs`.

mod stand_in;

use std::{
    io::{Read, Seek, Write},
    os::unix::ffi::OsStrExt,
};

use holdfast_jail::{Adopted, Handover, JailError, RunFolder, VmmProcess, in_words};
use rustix::process::{Pid, Signal, kill_process};
use stand_in::{Place, ended, is_alive};

#[test]
fn an_exit_code_and_a_signal_are_told_as_they_were() {
    let place = Place::new();
    let mut code = place.spawn("one", "exit 7", Handover::default());
    assert_eq!(in_words(ended(&mut code)), "exit code 7");
    let mut killed = place.spawn_waiting("two");
    assert_eq!(killed.ended(), None);
    killed.kill();
    assert_eq!(in_words(ended(&mut killed)), "signal 9");
}

#[test]
fn a_vmm_whose_shim_is_killed_ends_by_the_same_signal() {
    let place = Place::new();
    let mut vmm = place.spawn_waiting("one");
    let (pid, shim) = (vmm.pid(), place.shim_pid("one"));
    kill_process(Pid::from_raw(shim).unwrap(), Signal::KILL).unwrap();
    assert_eq!(in_words(ended(&mut vmm)), "signal 9");
    assert!(!is_alive(pid));
}

#[test]
fn a_dropped_vmm_is_gone_with_its_shim() {
    let place = Place::new();
    let vmm = place.spawn_waiting("one");
    let (pid, shim) = (vmm.pid(), place.shim_pid("one"));
    drop(vmm);
    assert!(!is_alive(pid) && !is_alive(shim.unsigned_abs()));
}

#[test]
fn a_detached_vmm_goes_on_and_its_end_is_told_to_who_adopts_it() {
    let place = Place::new();
    let ((from, mut to), mut handover) = (std::io::pipe().unwrap(), Handover::default());
    let script = format!("read x <&{}; exit 5", handover.give(from).unwrap());
    let vmm = place.spawn("one", &script, handover);
    let pid = vmm.pid();
    vmm.detach();
    assert!(is_alive(pid));
    let (run, cgroup) = place.adopt("one");
    let adopted = VmmProcess::adopt(&run, &cgroup).unwrap();
    let Adopted::Running(mut vmm) = adopted else { panic!("{adopted:?}") };
    assert_eq!((vmm.pid(), vmm.ended()), (pid, None));
    to.write_all(b"go\n").unwrap();
    assert_eq!(in_words(ended(&mut vmm)), "exit code 5");
    let again = VmmProcess::adopt(&run, &cgroup).unwrap();
    let Adopted::Ended(Some(status)) = again else { panic!("{again:?}") };
    assert_eq!(in_words(status), "exit code 5");
}

#[test]
fn an_adopted_vmm_is_killed_by_its_guard_and_one_without_a_trace_has_ended() {
    let place = Place::new();
    let vmm = place.spawn_waiting("one");
    let pid = vmm.pid();
    vmm.detach();
    let (run, cgroup) = place.adopt("one");
    let adopted = VmmProcess::adopt(&run, &cgroup).unwrap();
    let Adopted::Running(vmm) = adopted else { panic!("{adopted:?}") };
    drop(vmm);
    assert!(!is_alive(pid));
    let empty = RunFolder::create(&place.runs(), "empty").unwrap();
    let none = VmmProcess::adopt(&empty, &cgroup).unwrap();
    assert!(matches!(none, Adopted::Ended(None)), "{none:?}");
}

#[test]
fn a_vmm_has_what_it_was_handed_and_no_other_descriptor_and_no_environment() {
    let place = Place::new();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"ok\n").unwrap();
    file.rewind().unwrap();
    // One that survives exec, as a careless library would leave it.
    let leaked = tempfile::tempfile().unwrap();
    rustix::io::fcntl_setfd(&leaked, rustix::io::FdFlags::empty()).unwrap();
    let (from, _to) = std::io::pipe().unwrap();
    let (mut ready, tell) = std::io::pipe().unwrap();
    let mut handover = Handover::default();
    let mut numbers: Vec<i32> = (0..40).map(|_| handover.give(&file).unwrap()).collect();
    let (word, hold) = (numbers[17], handover.give(from).unwrap());
    let tell = handover.give(tell).unwrap();
    // `exec`, for good: for one command alone the shell keeps its own output on a spare number,
    // which it may still hold when its descriptors are counted.
    let script = format!(
        "read -u 3 config; read -u {word} word; exec >&{tell}; echo \"$config $word\"; read -u {hold} x"
    );
    numbers.extend([hold, tell]);
    let mut vmm = place.spawn("one", &script, handover);
    let mut text = [0; "the configuration ok\n".len()];
    ready.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"the configuration ok\n");
    let folder = format!("/proc/{}", vmm.pid());
    let mut found: Vec<i32> = fs_err::read_dir(format!("{folder}/fd"))
        .unwrap()
        .map(|entry| {
            str::from_utf8(entry.unwrap().file_name().as_bytes()).unwrap().parse().unwrap()
        })
        .collect();
    found.sort_unstable();
    let mut wanted = [&[0, 1, 2, 3], numbers.as_slice()].concat();
    wanted.sort_unstable();
    assert_eq!(found, wanted);
    assert_eq!(fs_err::read(format!("{folder}/environ")).unwrap(), b"");
    assert_eq!(fs_err::read_link(format!("{folder}/fd/0")).unwrap().as_os_str(), "/dev/null");
    assert_eq!(vmm.ended(), None);
    drop(leaked);
}

#[test]
fn what_cannot_be_started_is_an_error_that_leaves_no_process() {
    let place = Place::new();
    let (run, cgroup) = place.lend("one");
    let mut plan = place.plan(&run, &cgroup, &[]);
    plan.program = "/nonexistent/vmm".as_ref();
    let error = VmmProcess::spawn(plan).unwrap_err();
    assert!(matches!(&error, JailError::Spawn { .. }), "{error:?}");

    let (run, cgroup) = place.lend("two");
    let mut plan = place.plan(&run, &cgroup, &[]);
    plan.program = "/etc/passwd".as_ref();
    let error = VmmProcess::spawn(plan).unwrap_err();
    assert_eq!(error.to_string(), "the shim of a VMM cannot execute the program");
}

/// The one that forked a shim.
fn nursery_of(place: &Place, name: &str) -> i32 {
    let stat = fs_err::read_to_string(format!("/proc/{}/stat", place.shim_pid(name))).unwrap();
    stat.rsplit_once(") ").unwrap().1.split(' ').nth(1).unwrap().parse().unwrap()
}

/// Shims of this nursery that wait for orders.
fn waiting(nursery: i32) -> Vec<i32> {
    let children = fs_err::read_to_string(format!("/proc/{nursery}/task/{nursery}/children"));
    let children = children.unwrap_or_default();
    let pids = children.split_whitespace().map(|pid| pid.parse::<i32>().unwrap());
    let name = |pid: &i32| fs_err::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    pids.filter(|pid| name(pid).trim_end() == "shim-waiting").collect()
}

#[test]
fn a_killed_nursery_takes_no_vmm_with_it_and_is_replaced() {
    let place = Place::new();
    let mut one = place.spawn_waiting("one");
    kill_process(Pid::from_raw(nursery_of(&place, "one")).unwrap(), Signal::KILL).unwrap();
    // More than were made ahead.
    for number in 0..10 {
        let other = place.spawn_waiting(&format!("other-{number}"));
        assert!(is_alive(other.pid()));
    }
    assert_eq!(one.ended(), None);
}

#[test]
fn shims_that_are_killed_while_they_wait_are_passed_over() {
    let place = Place::new();
    let _one = place.spawn_waiting("one");
    let nursery = nursery_of(&place, "one");
    wait_until(|| waiting(nursery).len() > 2);
    for pid in waiting(nursery) {
        kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    }
    let two = place.spawn_waiting("two");
    assert!(is_alive(two.pid()));
}

#[test]
fn shims_that_wait_end_with_who_would_give_them_orders() {
    let place = Place::new();
    let one = place.spawn_waiting("one");
    let nursery = nursery_of(&place, "one");
    wait_until(|| !waiting(nursery).is_empty());
    let pids = waiting(nursery);
    drop((one, place));
    wait_until(|| pids.iter().all(|pid| !is_alive(pid.unsigned_abs())));
}

fn wait_until(check: impl Fn() -> bool) {
    let began = std::time::Instant::now();
    while !check() {
        assert!(began.elapsed() < std::time::Duration::from_secs(20), "it does not come about");
        std::thread::yield_now();
    }
}

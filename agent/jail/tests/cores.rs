//! Core scheduling on the kernel that is there, which may have none. It matters only where cores
//! have several threads: `scripts/test-kvm cgroup` runs this in an L1 with such a core. Needs root.

use std::process::{Child, Command, Stdio};

use holdfast_jail::{cores_can_be_kept_apart, keep_cores_apart};
use rustix::{
    process::Pid,
    thread::{CoreSchedulingScope, core_scheduling_cookie},
};

/// A process of another user, as a VMM is.
fn spawn() -> Child {
    use std::os::unix::process::CommandExt;
    Command::new("/bin/sleep").arg("600").uid(200_017).stdin(Stdio::null()).spawn().unwrap()
}

/// 0: none, or no core has several threads.
fn cookie(child: &Child) -> u64 {
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    core_scheduling_cookie(pid, CoreSchedulingScope::Thread).unwrap_or(0)
}

fn cores_have_threads() -> bool {
    let active = fs_err::read_to_string("/sys/devices/system/cpu/smt/active");
    active.is_ok_and(|active| active.trim() == "1")
}

#[test]
fn each_process_has_a_cookie_of_its_own_or_it_is_said_that_the_kernel_cannot() {
    let mut children = [spawn(), spawn(), spawn()];
    let [first, second, other] = &children;
    let outcomes = [first, second].map(|child| keep_cores_apart(child.id()).is_ok());
    let cookies = [first, second, other].map(cookie);
    let (threads, able) = (cores_have_threads(), cores_can_be_kept_apart());
    println!("threads: {threads}, core scheduling: {able}, {outcomes:?}, cookies {cookies:x?}");
    // Where it would be needed and cannot be had, the launch must not go on.
    assert_eq!(outcomes, [!threads || able; 2]);
    assert_eq!([cookies[0] != 0, cookies[0] != cookies[1]], [threads && able; 2]);
    assert_eq!(cookies[2], 0);
    for child in &mut children {
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

//! Core scheduling on the kernel that is there. It has cookies only where cores have several
//! threads: `scripts/test-kvm cgroup` runs this in an L1 that has such cores. Needs root.

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
fn each_process_that_is_kept_apart_has_a_cookie_of_its_own_where_cores_have_threads() {
    let mut children = [spawn(), spawn(), spawn()];
    let [first, second, other] = &children;
    keep_cores_apart(first.id()).unwrap();
    keep_cores_apart(second.id()).unwrap();
    let cookies = (cookie(first), cookie(second), cookie(other));
    println!("threads: {}, cookies: {cookies:x?}", cores_have_threads());
    assert_eq!(cookies.0 != 0, cores_have_threads());
    assert_eq!(cookies.0 != cookies.1, cores_have_threads());
    assert_eq!(cookies.2, 0);
    for child in &mut children {
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

#[test]
fn this_kernel_has_core_scheduling_and_a_process_that_is_gone_is_an_error() {
    assert!(cores_can_be_kept_apart());
    let mut child = spawn();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(keep_cores_apart(child.id()).is_err(), cores_have_threads());
}

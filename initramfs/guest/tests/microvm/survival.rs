//! A workload at its limits does not take PID 1 with it.

use holdfast_wire::guest::{Exec, Exited};

use crate::{
    client::{Client, shell},
    machine::Disks,
};

#[test]
fn a_workload_out_of_memory_is_killed_and_the_sandbox_serves_on() {
    let machine = Disks::make().start(128);
    for round in 0..3 {
        let done = machine.shell("tail /dev/zero");
        assert_eq!(done.exited, Some(Exited::Signal(9)), "round {round}: {done:?}");
        assert_eq!(machine.shell("echo alive").stdout, "alive\n", "round {round}");
    }
}

#[test]
fn a_shell_sees_its_child_killed_and_lives() {
    let machine = Disks::make().start(128);
    let done = machine.shell("tail /dev/zero; echo $?");
    assert_eq!((done.stdout.as_str(), done.exited), ("137\n", Some(Exited::Code(0))));
}

#[test]
fn a_fork_bomb_is_held_and_killed_as_a_whole() {
    let machine = Disks::make().start(128);
    let bomb =
        Exec { timeout_ms: Some(5000), ..shell("bomb() { bomb | bomb & }; bomb; wait; sleep 100") };
    let running = machine.begin(bomb).unwrap();
    // PID 1 itself answers while the workload can start nothing more.
    for _ in 0..20 {
        assert!(machine.info().memory_total_bytes > 0);
    }
    assert_eq!(running.finish().unwrap().exited, Some(Exited::TimedOut));
    assert_eq!(machine.shell("echo alive").stdout, "alive\n");
}

#[test]
fn root_of_the_sandbox_cannot_lift_its_limits() {
    let machine = Disks::make().start(128);
    let script = "cd /sys/fs/cgroup; echo max > memory.max; echo max > pids.max; \
                  mkdir own && echo $$ > own/cgroup.procs && cat /proc/self/cgroup";
    let done = machine.shell(script);
    assert_eq!(done.stdout, "0::/own\n", "{done:?}");
    assert_eq!(done.stderr.matches("not permitted").count(), 2, "{done:?}");
}

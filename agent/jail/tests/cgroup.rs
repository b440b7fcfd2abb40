//! Real cgroups with real processes in them. Needs cgroup v2 with cpu, memory and pids at
//! /sys/fs/cgroup, and root.

use std::{
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use holdfast_jail::{
    Cgroup, CgroupTree, Confinement, Handover, Limits, cgroup_usage, confine, in_words,
};
use holdfast_model::{Mib, MilliCpu};

const ROOMY: Limits = Limits { cpu: MilliCpu(1000), memory: Mib(64), pids: 16 };

/// A tree of the test's own, removed with what is in it.
struct Tree {
    tree: CgroupTree,
    path: std::path::PathBuf,
}

impl Tree {
    fn new(name: &str) -> Self {
        let path = format!("/sys/fs/cgroup/holdfast-test-{name}-{}", std::process::id());
        let tree = CgroupTree::new(&path);
        tree.prepare().unwrap();
        Self { tree, path: path.into() }
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        self.tree.sweep(|_| true).unwrap();
        fs_err::remove_dir(&self.path).unwrap();
    }
}

fn spawn(cgroup: &Cgroup, script: &str) -> Child {
    let mut command = Command::new("/bin/sh");
    let confinement = Confinement::new(Handover::default(), None).in_cgroup(cgroup).unwrap();
    confine(&mut command, confinement);
    command.args(["-c", script]).stdin(Stdio::null()).spawn().unwrap()
}

#[test]
fn a_dropped_cgroup_takes_every_process_in_it_along() {
    let tree = Tree::new("drop");
    let cgroup = tree.tree.create("one", ROOMY).unwrap();
    let path = cgroup.path().to_owned();
    let mut child = spawn(&cgroup, "sleep 600 & sleep 600 & wait");
    drop(cgroup);
    assert!(!path.exists());
    assert_eq!(in_words(child.wait().unwrap()), "signal 9");
}

#[test]
fn the_sweep_takes_the_cgroups_it_was_told_and_no_other() {
    let tree = Tree::new("sweep");
    let left = tree.tree.create("left", ROOMY).unwrap();
    let mut child = spawn(&left, "sleep 600");
    let mut other = spawn(
        &tree.tree.create("other", ROOMY).map(std::mem::ManuallyDrop::new).unwrap(),
        "sleep 600",
    );
    std::mem::forget(left);
    assert_eq!(tree.tree.sweep(|name| name == "left").unwrap(), ["left"]);
    assert_eq!(in_words(child.wait().unwrap()), "signal 9");
    assert!(other.try_wait().unwrap().is_none());
    tree.tree.sweep(|_| true).unwrap();
    other.wait().unwrap();
}

#[test]
fn what_asks_for_more_memory_than_it_has_is_killed_and_known() {
    let tree = Tree::new("memory");
    let cgroup = tree.tree.create("greedy", Limits { memory: Mib(8), ..ROOMY }).unwrap();
    let mut child = spawn(&cgroup, "x=x; while :; do x=$x$x; done");
    assert_eq!(in_words(child.wait().unwrap()), "signal 9");
    assert!(cgroup.ran_out_of_memory());
}

#[test]
fn what_loops_gets_no_more_than_its_share_of_a_cpu() {
    let tree = Tree::new("cpu");
    let cgroup = tree.tree.create("busy", Limits { cpu: MilliCpu(200), ..ROOMY }).unwrap();
    let mut child = spawn(&cgroup, "while :; do :; done");
    let began = Instant::now();
    std::thread::sleep(Duration::from_secs(2));
    let used = Duration::from_micros(cgroup_usage(cgroup.path()).cpu_us);
    assert!(used > Duration::from_millis(100) && used < began.elapsed() / 3, "{used:?}");
    cgroup.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_fork_bomb_stays_within_its_count() {
    let tree = Tree::new("pids");
    let cgroup = tree.tree.create("bomb", Limits { pids: 5, ..ROOMY }).unwrap();
    let mut child = spawn(&cgroup, "while :; do sleep 600 & done");
    let events = || fs_err::read_to_string(cgroup.path().join("pids.events")).unwrap();
    while events().starts_with("max 0") {
        std::thread::sleep(Duration::from_millis(20));
    }
    let count = fs_err::read_to_string(cgroup.path().join("pids.current")).unwrap();
    assert!(count.trim().parse::<u32>().unwrap() <= 5, "{count}");
    cgroup.kill().unwrap();
    child.wait().unwrap();
}

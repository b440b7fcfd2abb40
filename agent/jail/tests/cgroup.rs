//! Real cgroups with real processes in them. Needs cgroup v2 with cpu, memory, pids and io at
//! /sys/fs/cgroup, root, and a file system on a disk as TMPDIR.

use std::{
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use holdfast_jail::{
    BlockDevice, Cgroup, CgroupTree, Confinement, Handover, IoLimits, Limits, cgroup_usage,
    confine, guest_memory, in_words,
};
use holdfast_model::{Mib, MilliCpu};

const ROOMY: Limits =
    Limits { cpu: MilliCpu(1000), cpu_weight: 100, memory: Mib(64), pids: 16, io: None };

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
    spawn_with(cgroup, Handover::default(), script)
}

fn spawn_with(cgroup: &Cgroup, handover: Handover, script: &str) -> Child {
    let mut command = Command::new("/bin/sh");
    let confinement = Confinement::new(handover, None).in_cgroup(cgroup).unwrap();
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

#[test]
fn guest_memory_is_charged_to_whoever_touches_it_and_all_of_its_machine_goes_at_the_limit() {
    let tree = Tree::new("shmem");
    let cgroup = tree.tree.create("guest", Limits { memory: Mib(16), ..ROOMY }).unwrap();
    let mut handover = Handover::default();
    let memory = handover.give(guest_memory(Mib(64)).unwrap()).unwrap();
    let script = format!(
        "sleep 600 & dd if=/dev/zero of=/proc/self/fd/{memory} bs=65536 conv=notrunc; wait"
    );
    let mut child = spawn_with(&cgroup, handover, &script);
    // `sleep` touched nothing: it goes because one thread less is a machine of no use.
    assert_eq!(in_words(child.wait().unwrap()), "signal 9");
    assert!(cgroup.ran_out_of_memory());
    let peak = cgroup_usage(cgroup.path()).memory_peak_bytes;
    assert!((8 << 20..=16 << 20).contains(&peak), "{peak}");
}

#[test]
fn what_a_sandbox_holds_is_never_written_to_swap() {
    let folder = tempfile::tempdir().unwrap();
    let swap = folder.path().join("swap");
    let shell = |script: &str| {
        Command::new("/bin/sh").args(["-c", script, "sh"]).arg(&swap).status().unwrap()
    };
    let made = shell("dd if=/dev/zero of=$1 bs=1048576 count=64 && mkswap $1 && swapon $1");
    assert!(made.success());
    let tree = Tree::new("swap");
    let cgroup = tree.tree.create("greedy", Limits { memory: Mib(8), ..ROOMY }).unwrap();
    let mut child = spawn(&cgroup, "x=x; while :; do x=$x$x; done");
    assert_eq!(in_words(child.wait().unwrap()), "signal 9");
    assert!(cgroup.ran_out_of_memory());
    let peak = fs_err::read_to_string(cgroup.path().join("memory.swap.peak")).unwrap();
    assert!(shell("swapoff $1").success());
    assert_eq!(peak.trim(), "0");
}

#[test]
fn of_a_cpu_that_two_want_each_gets_by_its_weight() {
    let tree = Tree::new("weight");
    let small = tree.tree.create("small", Limits { cpu_weight: 25, ..ROOMY }).unwrap();
    let large = tree.tree.create("large", Limits { cpu_weight: 100, ..ROOMY }).unwrap();
    let busy = "exec taskset 1 sh -c 'while :; do :; done'";
    let mut children = [spawn(&small, busy), spawn(&large, busy)];
    let used = |cgroup: &Cgroup| cgroup_usage(cgroup.path()).cpu_us;
    while used(&small) == 0 || used(&large) == 0 {
        std::thread::sleep(Duration::from_millis(10));
    }
    let began = (used(&small), used(&large));
    while used(&large) - began.1 < 2_000_000 {
        std::thread::sleep(Duration::from_millis(20));
    }
    let (small_us, large_us) = (used(&small) - began.0, used(&large) - began.1);
    println!("weight 25: {small_us} us, weight 100: {large_us} us");
    // A quarter by the weights, and it is not starved.
    assert!(small_us < large_us / 2 && small_us > large_us / 10, "{small_us} of {large_us}");
    small.kill().unwrap();
    large.kill().unwrap();
    for child in &mut children {
        child.wait().unwrap();
    }
}

/// Writes `pieces` pieces of `piece_bytes` past the page cache, under `io`. How long it took, and
/// what the cgroup counted.
fn write_under(io: IoLimits, name: &str, piece_bytes: u32, pieces: u32) -> (Duration, u64) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    let tree = Tree::new(name);
    assert!(tree.tree.bounds_io(), "no io controller");
    let cgroup = tree.tree.create("writer", Limits { io: Some(io), ..ROOMY }).unwrap();
    let file = file.display();
    let began = Instant::now();
    let script = format!("dd if=/dev/zero of={file} bs={piece_bytes} count={pieces} oflag=direct");
    assert!(spawn(&cgroup, &script).wait().unwrap().success());
    let took = began.elapsed();
    let written = cgroup_usage(cgroup.path()).io_written_bytes;
    assert!(written >= u64::from(piece_bytes * pieces), "{written}");
    (took, written)
}

fn device() -> BlockDevice {
    let folder = tempfile::tempdir().unwrap();
    BlockDevice::below(folder.path()).unwrap().expect("TMPDIR lies on a disk")
}

#[test]
fn what_writes_gets_no_more_bytes_a_second_than_its_share() {
    let io = IoLimits { device: device(), bytes_per_second: 1 << 20, operations_per_second: 0 };
    // 3 MiB at 1 MiB a second.
    let (took, written) = write_under(io, "bytes", 1 << 17, 24);
    println!("{written} bytes in {took:?}");
    assert!(took > Duration::from_secs(2), "{took:?}");
}

#[test]
fn what_writes_gets_no_more_operations_a_second_than_its_share() {
    let io = IoLimits { device: device(), bytes_per_second: 0, operations_per_second: 20 };
    let (took, written) = write_under(io, "operations", 4096, 60);
    println!("60 operations, {written} bytes in {took:?}");
    assert!(took > Duration::from_secs(2), "{took:?}");
}

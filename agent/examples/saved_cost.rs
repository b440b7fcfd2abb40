//! What it costs to suspend a sandbox, to have it go on, and to make sandboxes of it: in virtual
//! microseconds, where the machine counts instructions (`scripts/bench resume`).
//!
//! The node's state lies in memory, so that no figure is the disk's. Prints lines `name: value`, one for each round.
#![expect(clippy::print_stdout, reason = "it prints its figures")]

#[path = "../tests/microvm/node.rs"]
#[allow(dead_code)]
mod node;

use std::{
    os::unix::fs::MetadataExt,
    path::Path,
    time::{Duration, Instant},
};

use fs_err as fs;
use holdfast_model::SandboxId;
use holdfast_wire::guest::Output;
use node::{Node, own_kib, shell, spec};
use rustix::mount::{MountFlags, mount};

const MEMORY_MIB: u32 = 256;
const DIRTY_MIB: u32 = 96;

/// A larger guest, and how much of it is in use.
const LARGE_MIB: u32 = 1024;
const LARGE_DIRTY_MIB: u32 = 300;

/// After a resume: what is resident then is what the guest needed of it.
const SETTLE: Duration = Duration::from_millis(300);

const TICK: Duration = Duration::from_millis(20);

/// Clones of one snapshot.
const CLONES: u32 = 4;

async fn exec(node: &Node, id: &SandboxId, script: &str) -> String {
    let mut session = node.registry.exec(id, shell(script)).await.unwrap();
    let mut text = String::new();
    // The first output is what somebody waits for.
    while let Some(output) = session.next().await.unwrap() {
        if let Output::Stdout(bytes) = output {
            text += std::str::from_utf8(&bytes).unwrap();
            break;
        }
    }
    text
}

fn say(name: &str, value: impl std::fmt::Display) {
    println!("{name}: {value}");
}

fn us(began: Instant) -> u128 {
    began.elapsed().as_micros()
}

/// Bytes on disk of all files below.
fn disk_bytes(folder: &Path, wanted: &dyn Fn(&Path) -> bool) -> u64 {
    fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| match path.metadata().unwrap() {
            metadata if metadata.is_dir() => disk_bytes(&path, wanted),
            _ if !wanted(&path) => 0,
            metadata => metadata.blocks() * 512,
        })
        .sum()
}

fn is_memory(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("memory-"))
}

/// The plain memory files, whose holes are pages of zeros.
fn memory_bytes(node: &Node) -> u64 {
    disk_bytes(&node.state().join("saved"), &is_memory)
}

fn piece_bytes(node: &Node) -> u64 {
    disk_bytes(&node.state().join("snapshots"), &|_| true)
}

/// What of a VMM is in memory: the guest's, its own.
fn resident_kib(pid: u32) -> u64 {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let rest = smaps.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap();
    rest.trim().trim_end_matches(" kB").parse().unwrap()
}

async fn suspend(node: &Node, id: &SandboxId, name: &str) {
    let before = piece_bytes(node);
    let began = Instant::now();
    node.registry.suspend(id, None).await.unwrap();
    say(&format!("{name}_suspend_us"), us(began));
    // What the suspend before stored is gone if nothing stands on it.
    say(&format!("{name}_stored_kib"), piece_bytes(node).abs_diff(before) / 1024);
}

async fn resume(node: &Node, id: &SandboxId, name: &str) {
    let began = Instant::now();
    node.registry.resume(id).await.unwrap();
    say(&format!("{name}_resume_us"), us(began));
    assert_eq!(exec(node, id, "echo on").await, "on\n");
    say(&format!("{name}_first_output_us"), us(began));
    let phases = node.registry.phases(id).unwrap();
    for (phase, us) in phases.list() {
        say(&format!("{name}_{phase}_us"), us);
    }
    // From the call to the VMM until PID 1 has answered over vsock.
    say(&format!("{name}_restore_to_answer_us"), phases.boot_us + phases.start_us);
    if let Some(report) = node.registry.details(id).await.unwrap().report {
        for (phase, us) in report.phases.list() {
            say(&format!("{name}_report_{phase}_us"), us);
        }
    }
    tokio::time::sleep(SETTLE).await;
    let pid = node.registry.details(id).await.unwrap().vmm_pid;
    say(&format!("{name}_resident_kib"), resident_kib(pid));
    // Once all of it is there.
    let report = node.registry.details(id).await.unwrap().report;
    if let Some(faults) = report.and_then(|report| report.fetched.faults) {
        say(&format!("{name}_faults"), faults);
    }
}

#[tokio::main]
async fn main() {
    let rounds: u32 = std::env::var("HOLDFAST_ROUNDS").map_or(3, |text| text.parse().unwrap());
    // A machine that counts instructions was seen to sleep for ever in a resume from pieces, unless
    // some timer was near.
    std::thread::spawn(|| {
        loop {
            std::thread::sleep(TICK);
        }
    });
    // In memory: waiting for a disk is no work, and a clock that counts work does not know it.
    let folder = Path::new("/tmp/saved-cost");
    fs::create_dir_all(folder).unwrap();
    mount("none", folder, "tmpfs", MountFlags::empty(), None).unwrap();
    let node = Node::start_in(folder.to_owned()).await;
    let began = Instant::now();
    let id = node.running(spec(MEMORY_MIB)).await;
    assert_eq!(exec(&node, &id, "echo on").await, "on\n");
    say("create_us", us(began));
    // The second of its kind is kept, the third begins from it.
    for name in ["create_and_keep_us", "create_from_template_us"] {
        let began = Instant::now();
        let id = node.running(spec(MEMORY_MIB)).await;
        assert_eq!(exec(&node, &id, "echo on").await, "on\n");
        say(name, us(began));
        node.registry.delete(&id).await.unwrap();
    }
    tokio::time::sleep(Duration::from_secs(2)).await;

    // An idle guest.
    suspend(&node, &id, "idle").await;
    say("idle_used_kib", memory_bytes(&node) / 1024);
    node.registry.resume(&id).await.unwrap();
    // What it touches first is looked at before it works.
    tokio::time::sleep(SETTLE).await;
    let dirty = format!("dd if=/dev/urandom of=/dev/shm/x bs=1M count={DIRTY_MIB} 2>&1; sync");
    exec(&node, &id, &dirty).await;
    suspend(&node, &id, "dirty").await;
    for _ in 0..rounds {
        resume(&node, &id, "hot").await;
        suspend(&node, &id, "again").await;
        // As after a restart of the node.
        for saved in fs::read_dir(node.state().join("saved")).unwrap() {
            for file in fs::read_dir(saved.unwrap().path()).unwrap() {
                let path = file.unwrap().path();
                if is_memory(&path) {
                    fs::remove_file(path).unwrap();
                }
            }
        }
        resume(&node, &id, "cold").await;
        suspend(&node, &id, "whole").await;
    }

    let began = Instant::now();
    let clones = node.registry.fork(&id, CLONES, Default::default(), None).await.unwrap();
    for clone in &clones {
        assert_eq!(exec(&node, &clone.id, "echo on").await, "on\n");
    }
    say("clones_us_each", us(began) / u128::from(CLONES));
    tokio::time::sleep(SETTLE).await;
    let mut own = 0;
    for clone in &clones {
        let pid = node.registry.details(&clone.id).await.unwrap().vmm_pid;
        own += own_kib(pid);
    }
    say("clone_own_kib", own / u64::from(CLONES));
    for record in node.registry.list(&node::group()).unwrap() {
        node.registry.delete(&record.id).await.unwrap();
    }

    // A guest with more memory, most of it in use, which stands still for as long as it must.
    let id = node.running(spec(LARGE_MIB)).await;
    let fill = format!("yes | head -c {LARGE_DIRTY_MIB}m > /dev/shm/x");
    exec(&node, &id, &fill).await;
    let before = pauses_us(&node);
    let clones = node.registry.fork(&id, 1, Default::default(), None).await.unwrap();
    say("large_fork_pause_us", pauses_us(&node) - before);
    let length = exec(&node, &clones[0].id, "wc -c < /dev/shm/x").await;
    assert_eq!(length.trim(), (LARGE_DIRTY_MIB << 20).to_string());
    for record in node.registry.list(&node::group()).unwrap() {
        node.registry.delete(&record.id).await.unwrap();
    }
}

/// How long guests stood still to be forked, all of them together.
fn pauses_us(node: &Node) -> u128 {
    let text = node.metrics.text().unwrap();
    let name = "holdfast_snapshot_pause_seconds_sum ";
    let sum = text.lines().find_map(|line| line.strip_prefix(name));
    let seconds: f64 = sum.map_or(0.0, |sum| sum.parse().unwrap());
    Duration::from_secs_f64(seconds).as_micros()
}

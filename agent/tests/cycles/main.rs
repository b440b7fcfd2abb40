//! Slots that come and go, and what the host has afterwards. In a binary of its own, since it counts
//! what this process has; in a network namespace of its own, since it counts what is there. Needs
//! root. `scripts/soak slots` does it ten thousand times.

use std::{
    collections::BTreeMap,
    os::fd::AsFd,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use fs_err::{self as fs, File};
use holdfast_jail::{Slot, Slots};
use holdfast_model::link::{GATEWAY_MAC, GUEST_ADDRESS, GUEST_MAC};
use holdfast_netpolicy::SANDBOX_RULESET;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Cycles, where nobody says how many.
const CYCLES: u64 = 60;
/// Those before what is there is counted: allocators and caches have grown by then.
const WARM_UP: u64 = 20;
/// Slots that are there at a time, beside the stock: creates and deletes overlap.
const LIVE: usize = 3;
/// How long the kernel may take to clear namespaces away behind our back.
const PATIENCE: Duration = Duration::from_secs(60);

/// A namespace for the links that a host has, gone when it is dropped.
struct Host(String);

impl Host {
    fn new() -> Self {
        let name = format!("hf-cycles-{}", std::process::id());
        run("ip", &["netns", "add", &name]);
        Self(name)
    }

    fn enter(&self) {
        let file = File::open(format!("/run/netns/{}", self.0)).unwrap();
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {complaint}");
    String::from_utf8(output.stdout).unwrap()
}

fn entries(folder: &str) -> u64 {
    u64::try_from(fs::read_dir(folder).unwrap().count()).unwrap()
}

/// The number that follows a word at the beginning of a line.
fn number(file: &str, word: &str) -> u64 {
    let text = fs::read_to_string(file).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(word));
    let number =
        line.and_then(|line| line.split_whitespace().next()).and_then(|it| it.parse().ok());
    number.unwrap_or_else(|| panic!("{file} has no {word}"))
}

/// What there is, and how much more of it there may be afterwards.
fn count(cycles: u64) -> BTreeMap<&'static str, (u64, u64)> {
    let lines = |text: String| u64::try_from(text.lines().count()).unwrap();
    let children = || {
        let tasks = fs::read_dir("/proc/self/task").unwrap();
        let of = |task: std::io::Result<fs::DirEntry>| {
            let text = fs::read_to_string(task.unwrap().path().join("children"));
            text.unwrap_or_default().split_whitespace().count()
        };
        u64::try_from(tasks.map(of).sum::<usize>()).unwrap()
    };
    BTreeMap::from([
        ("descriptors", (entries("/proc/self/fd"), 0)),
        ("threads", (entries("/proc/self/task"), 0)),
        ("children", (children(), 0)),
        ("links", (lines(run("ip", &["-o", "link"])), 0)),
        ("routes and rules", (lines(run("ip", &["route", "show", "table", "all"])), 0)),
        ("lines of the ruleset", (lines(run("nft", &["list", "ruleset"])), 0)),
        // Of the whole machine, and others have some too.
        ("network namespaces", (number("/proc/slabinfo", "net_namespace"), 20.max(cycles / 200))),
        ("KiB of this process", (number("/proc/self/status", "VmRSS:"), 1024)),
        // What a namespace takes of the kernel is some 100 KiB.
        ("KiB of the kernel", (number("/proc/meminfo", "SUnreclaim:"), 16 * 1024 + 4 * cycles)),
    ])
}

/// What a guest does first: it asks for a name and begins a connection.
fn use_slot(slot: &Slot) {
    let question = [0x9c, 0x40, 0, 53, 0, 12, 0, 0, 1, 2, 3, 4];
    let begin = [0x9c, 0x41, 1, 187, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0];
    for (protocol, payload) in [(17, &question[..]), (6, &begin)] {
        let frame = frame(protocol, payload);
        assert_eq!(rustix::io::write(&slot.tap, &frame).unwrap(), frame.len());
    }
}

/// A frame of the guest's, behind a virtio-net header that says its checksum is right.
fn frame(protocol: u8, payload: &[u8]) -> Vec<u8> {
    const DATA_VALID: u8 = 2;
    let length = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
    let mut ip = vec![0x45, 0, length[0], length[1], 0, 0, 0x40, 0, 64, protocol, 0, 0];
    ip.extend(GUEST_ADDRESS.octets());
    ip.extend([198, 51, 100, 10]);
    let sum: u32 = ip.chunks(2).map(|it| u32::from(it[0]) << 8 | u32::from(it[1])).sum();
    let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut head = [0; 10];
    head[0] = DATA_VALID;
    [&head[..], &GATEWAY_MAC, &GUEST_MAC, &[8, 0], &ip, payload].concat()
}

fn cycle(count: u64) {
    let slots = Slots::start(SANDBOX_RULESET);
    let mut live = std::collections::VecDeque::new();
    for _ in 0..count {
        let slot = slots.take().unwrap();
        use_slot(&slot);
        live.push_back(slot);
        if live.len() > LIVE {
            live.pop_front();
        }
    }
}

#[test]
fn f13_slots_that_come_and_go_leave_nothing() {
    let cycles = std::env::var("HOLDFAST_SLOT_CYCLES").ok().map(|it| it.parse().unwrap());
    let cycles: u64 = cycles.unwrap_or(CYCLES);
    let host = Host::new();
    let work = || {
        host.enter();
        cycle(WARM_UP);
        settle();
        let before = count(cycles);
        let start = Instant::now();
        cycle(cycles);
        let took = start.elapsed();
        // The kernel clears away in its own time.
        let mut after = count(cycles);
        while start.elapsed() < took + PATIENCE && !more(&before, &after).is_empty() {
            thread::sleep(Duration::from_millis(100));
            after = count(cycles);
        }
        for (what, (now, _)) in &after {
            println!("{what}: {} before, {now} after", before[what].0);
        }
        println!("ms_per_cycle: {:.1}", took.as_secs_f64() * 1e3 / cycles.max(1) as f64);
        more(&before, &after)
    };
    let left = thread::scope(|scope| scope.spawn(work).join().unwrap());
    assert!(left.is_empty(), "left behind by {cycles} cycles: {left:#?}");
}

/// Waits until no namespace is on its way out.
fn settle() {
    let (start, mut before) = (Instant::now(), 0);
    while start.elapsed() < PATIENCE {
        let now = number("/proc/slabinfo", "net_namespace");
        if now == before {
            return;
        }
        before = now;
        thread::sleep(Duration::from_millis(500));
    }
}

/// What there is more of than there may be.
fn more(
    before: &BTreeMap<&'static str, (u64, u64)>,
    after: &BTreeMap<&'static str, (u64, u64)>,
) -> Vec<String> {
    let grown = before.iter().filter(|(what, (was, margin))| after[*what].0 > was + margin);
    grown.map(|(what, (was, _))| format!("{what}: {was}, then {}", after[what].0)).collect()
}

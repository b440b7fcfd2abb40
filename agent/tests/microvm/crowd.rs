//! Many sandboxes side by side: made at once, idle, deleted, and nothing left. A handful as a
//! sample; `HOLDFAST_CROWD` says how many else (`scripts/soak crowd`).
#![expect(clippy::print_stdout, reason = "the soak test shows its figures")]

use std::{
    collections::BTreeMap,
    env,
    path::Path,
    time::{Duration, Instant},
};

use fs_err as fs;
use holdfast_model::{Mib, MilliCpu, Resources, SandboxId, SandboxSpec, State};
use rustix::{
    io::Errno,
    mount::{MountFlags, mount},
    process::{Resource, Rlimit, setrlimit},
};

use super::{
    node::{Node, group, spec},
    run, shell,
};

/// A sample.
const CROWD: usize = 6;

/// After the last create: what a guest puts off at its boot is done by then.
const SETTLE: Duration = Duration::from_secs(30);
const WATCHED: Duration = Duration::from_secs(20);

/// Of an idle sandbox, each second.
const EXITS_MAX: f64 = 10.0;

/// Of each VMM beyond its guest's memory.
const OWN_KIB_MAX: u64 = 4 * 1024;

/// Of the process that plays the agent.
const DESCRIPTORS: u64 = 65_536;

/// KVM's own counters.
const DEBUGFS: &str = "/sys/kernel/debug";

/// What a VMM has done so far.
#[derive(Debug, Clone, Copy, Default)]
struct Counted {
    /// Exits of its guest, those that KVM answers itself among them.
    exits: u64,
    /// How often its threads other than vCPUs have slept and gone on.
    wakeups: u64,
    /// User and system time, in clock ticks (10 ms).
    ticks: u64,
    /// What is not its guest's memory: its own pages and its program's.
    own_kib: u64,
}

fn count(pid: u32) -> Counted {
    let mut counted = Counted::default();
    for entry in fs::read_dir(Path::new(DEBUGFS).join("kvm")).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name().to_string_lossy().starts_with(&format!("{pid}-")) {
            let exits = fs::read_to_string(entry.path().join("exits")).unwrap();
            counted.exits += exits.trim().parse::<u64>().unwrap();
        }
    }
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let task = task.unwrap().path();
        if !fs::read_to_string(task.join("comm")).unwrap().starts_with("vcpu") {
            counted.wakeups += field(&task.join("status"), "voluntary_ctxt_switches:");
        }
    }
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let after_name: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    counted.ticks = after_name[11..13].iter().map(|ticks| ticks.parse::<u64>().unwrap()).sum();
    counted.own_kib = beyond_guest_kib(pid);
    counted
}

/// What is resident of all mappings but those of guest memory: a file in memory, or, of a guest that
/// began as a clone, the memory file that it is a private view of. Of files a VMM has its program
/// besides these.
fn beyond_guest_kib(pid: u32) -> u64 {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut of_guest, mut sum) = (false, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("Rss:") if !of_guest => sum += words.next().unwrap().parse::<u64>().unwrap(),
            // Its range begins the lines of a mapping, and ends with its name, if it has one.
            Some(range) if !range.ends_with(':') => {
                let name = words.nth(4).unwrap_or_default();
                of_guest = name.starts_with('/') && !name.ends_with("/holdfast-vmm");
            }
            _ => {}
        }
    }
    sum
}

fn field(path: &Path, key: &str) -> u64 {
    let text = fs::read_to_string(path).unwrap();
    let rest = text.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    rest.trim().trim_end_matches(" kB").parse().unwrap()
}

/// A tier XS.
pub(crate) fn extra_small() -> SandboxSpec {
    let resources = Resources { cpu: MilliCpu(250), memory: Mib(512), disk: Mib(1024) };
    SandboxSpec { resources, ..spec(512) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_made_at_once_runs_idles_and_goes() {
    match mount("debugfs", DEBUGFS, "debugfs", MountFlags::empty(), None) {
        Ok(()) | Err(Errno::BUSY) => {}
        Err(error) => panic!("{error}"),
    }
    // As the agent's unit has it: each sandbox takes several.
    let many = Some(DESCRIPTORS);
    setrlimit(Resource::Nofile, Rlimit { current: many, maximum: many }).unwrap();
    let crowd = env::var("HOLDFAST_CROWD").map_or(CROWD, |count| count.parse().unwrap());
    // Idle guests use a fraction of what they are promised.
    let node = Node::start_as(|config| {
        config.capacity.memory_factor = 100.0;
        config.capacity.cpu_factor = 100.0;
    })
    .await;
    let began = Instant::now();
    let creates = (0..crowd).map(|_| node.registry.create(group(), extra_small(), None));
    let made = futures_util::future::join_all(creates).await;
    let ids: Vec<SandboxId> = made.into_iter().map(|record| record.unwrap().id).collect();
    for id in &ids {
        let among = u32::try_from(crowd).unwrap();
        let record = node.settled_among(id, among, |state| state != State::Creating).await;
        assert_eq!(record.state, State::Running, "{:?}", record.failure);
    }
    println!("{crowd} sandboxes run after {:?}", began.elapsed());
    for id in &ids {
        assert_eq!(run(&node, id, shell("hostname"), b"").await.stdout, format!("{id}\n"));
    }
    idle(&node, crowd).await;

    let deletes = ids.iter().map(|id| node.registry.delete(id));
    for outcome in futures_util::future::join_all(deletes).await {
        outcome.unwrap();
    }
    for id in &ids {
        assert_eq!(node.traces(id), Vec::<String>::new());
    }
    assert_eq!(node.registry.free(), node.registry.limits());
    println!("crowd: {crowd}");
}

/// Watches all of them while nobody asks anything of them.
async fn idle(node: &Node, crowd: usize) {
    tokio::time::sleep(SETTLE).await;
    let take = || -> BTreeMap<u32, Counted> {
        node.registry.vmm_pids().into_iter().map(|pid| (pid, count(pid))).collect()
    };
    let (before, began) = (take(), Instant::now());
    tokio::time::sleep(WATCHED).await;
    let (after, seconds) = (take(), began.elapsed().as_secs_f64());
    assert_eq!(after.len(), crowd);
    let rates = |part: fn(&Counted) -> u64| -> Vec<f64> {
        let each = after.iter().map(|(pid, now)| (part(now) - part(&before[pid])) as f64 / seconds);
        let mut each: Vec<f64> = each.collect();
        each.sort_by(f64::total_cmp);
        each
    };
    let exits = rates(|counted| counted.exits);
    let wakeups = rates(|counted| counted.wakeups);
    // Ticks are hundredths of a second.
    let cpu: f64 = rates(|counted| counted.ticks).iter().sum::<f64>() / crowd as f64;
    let own: u64 = after.values().map(|counted| counted.own_kib).sum();
    println!("idle_cpu_percent: {cpu:.3}");
    println!("idle_exits_per_second_median: {:.2}", exits[crowd / 2]);
    println!("idle_exits_per_second_max: {:.2}", exits[crowd - 1]);
    println!("idle_wakeups_per_second_max: {:.2}", wakeups[crowd - 1]);
    let own_max = after.values().map(|counted| counted.own_kib).max().unwrap();
    println!("vmm_own_kib_max: {own_max}");
    println!("vmm_own_kib_each: {}", own / crowd as u64);
    println!("agent_rss_kib: {}", field(Path::new("/proc/self/status"), "VmRSS:"));
    assert!(wakeups[crowd - 1] < 0.5, "{wakeups:?} wakeups a second");
    assert!(own_max <= OWN_KIB_MAX, "{own_max} KiB beyond a guest's memory");
    assert!(exits[crowd - 1] <= EXITS_MAX, "{exits:?} exits a second");
}

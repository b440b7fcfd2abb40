//! What a jail costs, made and taken away, by the number of those that run and of what the host has
//! mounted. For `scripts/bench jail`, in an L1 with one CPU that does nothing else: what the kernel
//! does for it afterwards, in threads of its own, counts too.

use std::{
    env,
    io::{self, Write},
    path::Path,
    time::Duration,
};

use holdfast_jail::{
    Cgroup, CgroupTree, Handover, Identity, JailError, Jailer, Limits, ProcessLimits, RunFolder,
    VmmPlan, VmmProcess,
};
use holdfast_model::{Mib, MilliCpu};
use rustix::mount::{MountFlags, mount};

/// A tmpfs, as run folders are in: another's writing back would be counted too.
const RUN: &str = "/run";
/// Jails that run while others are made and taken away.
const STANDING: [u32; 4] = [0, 10, 50, 200];
/// Mounts of the host in the last measurement.
const MOUNTS: u32 = 200;
/// Jails made and taken away for one figure.
const ROUNDS: u32 = 48;
/// Shims that wait for orders: so many jails find one made ahead.
const READY: u32 = 4;
/// For what the kernel puts off. Costs no instruction but for what goes on anyway.
const SETTLE: Duration = Duration::from_secs(3);
/// The same between parts of one jail's life; what goes on anyway is taken off. The shim that takes
/// a used one's place comes within it.
const PAUSE: Duration = Duration::from_millis(500);

/// In the order in which an agent gives them back.
struct Jail {
    process: VmmProcess,
    _cgroup: Cgroup,
    run: RunFolder,
}

struct Maker {
    tree: CgroupTree,
    jailer: Jailer,
    runs: tempfile::TempDir,
}

impl Maker {
    fn make(&self, number: u32) -> Result<Jail, JailError> {
        let name = format!("jail{number}");
        let limits =
            Limits { cpu: MilliCpu(1000), cpu_weight: 100, memory: Mib(64), pids: 16, io: None };
        let cgroup = self.tree.create(&name, limits)?;
        let run = RunFolder::create(self.runs.path(), &name)?;
        let uid = 200_000 + number;
        let process = VmmProcess::spawn(VmmPlan {
            jailer: &self.jailer,
            program: Path::new("/bin/busybox"),
            arguments: &["sleep", "1000000"],
            run: &run,
            cgroup: &cgroup,
            identity: Identity { uid, gid: uid },
            limits: ProcessLimits { descriptors: 100, threads: 16, file_bytes: 1 << 30 },
            handover: Handover::default(),
            config: b"",
            log: run.log("vmm.log")?,
        })?;
        Ok(Jail { process, _cgroup: cgroup, run })
    }

    /// Microseconds of CPU for one jail, of many in a row: most find no shim that waits.
    fn in_a_row_us(&self, first: u32) -> Result<u64, Box<dyn std::error::Error>> {
        std::thread::sleep(SETTLE);
        let before = busy_ns()?;
        for number in first..first + ROUNDS {
            drop(self.make(number)?);
        }
        std::thread::sleep(SETTLE);
        Ok(each_us(busy_ns()? - before))
    }

    /// The same of jails that all find a shim that waits.
    fn out_of_stock(&self, first: u32) -> Result<Parts, Box<dyn std::error::Error>> {
        let mut parts = Parts::default();
        std::thread::sleep(SETTLE);
        for batch in 0..ROUNDS / READY {
            let idle = busy_ns_during(PAUSE)?;
            let before = busy_ns()?;
            let jails: Result<Vec<_>, _> =
                (0..READY).map(|number| self.make(first + batch * READY + number)).collect();
            let jails = jails?;
            parts.create += busy_ns()? - before;
            parts.ahead += busy_ns_during(PAUSE)?.saturating_sub(idle);
            let before = busy_ns()?;
            drop(jails);
            std::thread::sleep(PAUSE);
            parts.end += (busy_ns()? - before).saturating_sub(idle);
        }
        Ok(Parts {
            create: each_us(parts.create),
            ahead: each_us(parts.ahead),
            end: each_us(parts.end),
        })
    }
}

/// What one jail costs, by who waits for it, in microseconds.
#[derive(Default)]
struct Parts {
    /// Until its program runs.
    create: u64,
    /// The shim that takes the place of the one that was used; and the start of the jail's program.
    ahead: u64,
    end: u64,
}

fn each_us(ns: u64) -> u64 {
    ns / 1000 / u64::from(ROUNDS)
}

/// Nanoseconds that the machine's one CPU was given to threads, since its start.
fn busy_ns() -> Result<u64, Box<dyn std::error::Error>> {
    // Ours counts once it has let the CPU go.
    std::thread::sleep(Duration::from_millis(1));
    let text = fs_err::read_to_string("/proc/schedstat")?;
    let cpu = text.lines().find_map(|line| line.strip_prefix("cpu0 ")).ok_or("no such CPU")?;
    Ok(cpu.split(' ').nth(6).ok_or("no such column")?.parse()?)
}

/// Of a pause of all that is measured.
fn busy_ns_during(pause: Duration) -> Result<u64, Box<dyn std::error::Error>> {
    let before = busy_ns()?;
    std::thread::sleep(pause);
    Ok(busy_ns()? - before)
}

fn status_kib(pid: &str, key: &str) -> Result<u64, Box<dyn std::error::Error>> {
    let status = fs_err::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(key)).ok_or("no such line")?;
    Ok(line.trim_matches([':', '\t', ' ', 'k', 'B']).parse()?)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let shim = env::var_os("HOLDFAST_SHIM").ok_or("HOLDFAST_SHIM names the shim")?;
    let tree = CgroupTree::new("/sys/fs/cgroup/holdfast-bench");
    tree.prepare()?;
    let maker = Maker { tree, jailer: Jailer::new(&shim), runs: tempfile::tempdir_in(RUN)? };
    let mut standing = Vec::new();
    let mut out = io::stdout().lock();
    // The first makes what all share.
    drop(maker.make(999)?);
    for count in STANDING {
        for number in u32::try_from(standing.len())?..count {
            standing.push(maker.make(number)?);
        }
        report(&mut out, &maker, 1000, &format!("at_{count}"))?;
    }
    if let Some(jail) = standing.first() {
        let pids = fs_err::read_to_string(jail.run.path().join("pids"))?;
        let shim_pid = pids.split_whitespace().nth(1).ok_or("no pid")?;
        writeln!(out, "shim_rss_kib: {}", status_kib(shim_pid, "VmRSS")?)?;
        writeln!(out, "shim_anon_kib: {}", status_kib(shim_pid, "RssAnon")?)?;
        writeln!(out, "shim_threads: {}", status_kib(shim_pid, "Threads")?)?;
        let mounts = fs_err::read_to_string(format!("/proc/{}/mounts", jail.process.pid()))?;
        writeln!(out, "mounts_seen: {}", mounts.lines().count())?;
    }
    writeln!(out, "shim_bytes: {}", fs_err::metadata(&shim)?.len())?;
    standing.clear();
    for number in 0..MOUNTS {
        let folder = maker.runs.path().join(format!("mount{number}"));
        fs_err::create_dir(&folder)?;
        mount("tmpfs", &folder, "tmpfs", MountFlags::empty(), None)?;
    }
    report(&mut out, &maker, 2000, &format!("with_{MOUNTS}_mounts"))
}

fn report(
    out: &mut impl Write,
    maker: &Maker,
    first: u32,
    when: &str,
) -> Result<(), Box<dyn std::error::Error>> {
    writeln!(out, "jail_cpu_us_in_a_row_{when}: {}", maker.in_a_row_us(first)?)?;
    let Parts { create, ahead, end } = maker.out_of_stock(first + ROUNDS)?;
    writeln!(out, "jail_cpu_us_{when}: {}", create + ahead + end)?;
    writeln!(out, "  create_us_{when}: {create}")?;
    writeln!(out, "  ahead_us_{when}: {ahead}")?;
    writeln!(out, "  end_us_{when}: {end}")?;
    Ok(())
}

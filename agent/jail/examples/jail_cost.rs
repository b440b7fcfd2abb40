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
/// Jails made and taken away for one figure. The clock of idle time has hundredths of a second.
const ROUNDS: u32 = 50;
/// For what the kernel puts off. Costs no instruction.
const SETTLE: Duration = Duration::from_secs(3);

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

    /// Microseconds of CPU for one jail.
    fn cost_us(&self, first: u32) -> Result<u64, Box<dyn std::error::Error>> {
        std::thread::sleep(SETTLE);
        let before = busy_us()?;
        for number in first..first + ROUNDS {
            drop(self.make(number)?);
        }
        std::thread::sleep(SETTLE);
        Ok((busy_us()? - before) / u64::from(ROUNDS))
    }
}

/// Microseconds that the machine's one CPU was not idle, since its start.
fn busy_us() -> Result<u64, Box<dyn std::error::Error>> {
    let text = fs_err::read_to_string("/proc/uptime")?;
    let mut hundredths =
        text.split_whitespace().map(|number| number.replace('.', "").parse::<u64>());
    let (Some(up), Some(idle)) = (hundredths.next(), hundredths.next()) else {
        return Err("no uptime".into());
    };
    Ok(up?.saturating_sub(idle?) * 10_000)
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
        writeln!(out, "jail_cpu_us_at_{count}: {}", maker.cost_us(1000)?)?;
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
    writeln!(out, "jail_cpu_us_with_{MOUNTS}_mounts: {}", maker.cost_us(2000)?)?;
    Ok(())
}

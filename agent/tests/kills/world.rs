//! What there is on the host of all sandboxes together, compared with what there should be.

use std::{collections::BTreeSet, path::Path};

use fs_err as fs;
use tokio::time::{Instant, sleep};

use crate::{
    agent::{Agent, LONG, Place},
    node::config_in,
};

/// CPU of one sandbox of the tests, and memory with what its VMM and the kernel's tables need.
const CORES_EACH: f64 = 0.5;
const MEMORY_MIB_EACH: f64 = 128.0 + 64.0 + 1.0;

/// Everything of sandboxes that can be seen.
#[derive(Debug, PartialEq)]
pub(crate) struct World {
    /// By the API, Running.
    running: BTreeSet<String>,
    /// By the API, Suspended.
    suspended: BTreeSet<String>,
    /// In any other state.
    others: usize,
    /// Snapshots with a folder, and with a manifest.
    saved: (usize, usize),
    cgroups: BTreeSet<String>,
    run_folders: BTreeSet<String>,
    disks: BTreeSet<String>,
    /// Listening sockets in run folders.
    sockets: usize,
    vmms: usize,
    /// In cgroups of sandboxes.
    shims: usize,
    /// Beside these, with a VMM or orders to make one: the nursery and the shims that wait for
    /// orders are the agent's.
    stray_shims: usize,
    /// Of VMMs, all different.
    uids: usize,
    cores: f64,
    memory_mib: f64,
}

impl World {
    /// Waits until the world has these sandboxes, running and suspended, so many snapshots and
    /// nothing else: what ends takes a moment.
    pub(crate) async fn settled(
        agent: &Agent,
        place: &Place,
        running: &[&str],
        suspended: &[&str],
        saved: usize,
    ) {
        let expected = Self::of(running, suspended, saved);
        let give_up = Instant::now() + LONG;
        loop {
            let found = Self::look(agent, place).await;
            if found == expected {
                return;
            }
            assert!(Instant::now() < give_up, "found {found:#?}, expected {expected:#?}");
            sleep(std::time::Duration::from_millis(50)).await;
        }
    }

    fn of(running: &[&str], suspended: &[&str], saved: usize) -> Self {
        let set = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect::<BTreeSet<_>>();
        let ids = set(running);
        let count = ids.len();
        let each = f64::from(u32::try_from(count).unwrap());
        Self {
            running: ids.clone(),
            suspended: set(suspended),
            others: 0,
            saved: (saved, saved),
            cgroups: ids.clone(),
            disks: &ids | &set(suspended),
            run_folders: ids,
            sockets: 2 * count,
            vmms: count,
            shims: count,
            stray_shims: 0,
            uids: count,
            cores: CORES_EACH * each,
            memory_mib: MEMORY_MIB_EACH * each,
        }
    }

    async fn look(agent: &Agent, place: &Place) -> Self {
        let paths = config_in(&place.folder).paths;
        let run = paths.run.join("sandboxes");
        let list = agent.get(&holdfast_api::path::sandboxes(&crate::node::group())).await.json();
        let of_state = |state: &str| {
            let sandboxes = list["value"].as_array().unwrap().iter();
            let wanted = sandboxes.filter(|sandbox| sandbox["state"] == state);
            wanted.map(|sandbox| sandbox["id"].as_str().unwrap().to_owned()).collect()
        };
        let (running, suspended): (BTreeSet<_>, BTreeSet<_>) =
            (of_state("Running"), of_state("Suspended"));
        let all = list["value"].as_array().unwrap().len();
        let node = agent.get(holdfast_api::path::NODE).await.json();
        let reserved = |of: &str| node[of]["reserved"].as_f64().unwrap();
        let vmms = processes("holdfast-vmm");
        // The egress process of the sandboxes' group lies beside them, and stays.
        let of_sandbox = |name: &String| !name.starts_with("egress-");
        let cgroups: BTreeSet<_> = folders(&paths.cgroups).into_iter().filter(of_sandbox).collect();
        let shims = processes("holdfast-shim");
        let (ours, others): (Vec<_>, Vec<_>) =
            shims.iter().partition(|shim| cgroups.contains(&shim.cgroup));
        Self {
            others: all - running.len() - suspended.len(),
            running,
            suspended,
            saved: (
                folders(&paths.state.join("saved")).len(),
                fs::read_dir(paths.state.join("snapshots/manifests")).unwrap().count(),
            ),
            cgroups,
            run_folders: folders(&run),
            disks: folders(&paths.sandboxes()),
            sockets: listening(&run),
            shims: ours.len(),
            stray_shims: others.iter().filter(|shim| shim.name == "holdfast-shim").count(),
            uids: vmms.iter().map(|vmm| &vmm.uid).collect::<BTreeSet<_>>().len(),
            vmms: vmms.len(),
            cores: reserved("cpus"),
            memory_mib: reserved("memoryMib"),
        }
    }
}

fn folders(path: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

fn listening(run: &Path) -> usize {
    const ACCEPTS: &str = "00010000";
    let sockets = fs::read_to_string("/proc/net/unix").unwrap();
    let run = run.display().to_string();
    sockets.lines().filter(|l| l.contains(ACCEPTS) && l.contains(&run)).count()
}

/// One process of a program of ours.
pub(crate) struct Process {
    /// As its status has it.
    uid: String,
    /// The last part of its cgroup's path.
    cgroup: String,
    /// What it calls itself.
    name: String,
}

/// The running processes of this program. A zombie has no program any more.
pub(crate) fn processes(name: &str) -> Vec<Process> {
    let runs = |folder: &Path| {
        let program = fs::read_link(folder.join("exe")).ok()?;
        let status = fs::read_to_string(folder.join("status")).ok()?;
        let uid = status.lines().find_map(|line| line.strip_prefix("Uid:").map(str::to_owned));
        let cgroup = fs::read_to_string(folder.join("cgroup")).ok()?;
        let cgroup = cgroup.trim_end().rsplit('/').next()?.to_owned();
        let own_name = fs::read_to_string(folder.join("comm")).ok()?.trim_end().to_owned();
        program.ends_with(name).then_some(Process { uid: uid?, cgroup, name: own_name })
    };
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|entry| runs(&entry.path())).collect()
}

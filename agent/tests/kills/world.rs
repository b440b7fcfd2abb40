//! What there is on the host of all sandboxes together, compared with what there should be.

use std::{collections::BTreeSet, path::Path};

use fs_err as fs;
use tokio::time::{Instant, sleep};

use crate::{
    agent::{Agent, LONG, Place},
    node::config_in,
};

/// CPU of one sandbox of the tests, and memory with what its VMM needs.
const CORES_EACH: f64 = 0.5;
const MEMORY_MIB_EACH: f64 = 128.0 + 64.0;

/// Everything of sandboxes that can be seen.
#[derive(Debug, PartialEq)]
pub(crate) struct World {
    /// By the API, Running.
    running: BTreeSet<String>,
    cgroups: BTreeSet<String>,
    run_folders: BTreeSet<String>,
    disks: BTreeSet<String>,
    /// Listening sockets in run folders.
    sockets: usize,
    vmms: usize,
    shims: usize,
    /// Of VMMs, all different.
    uids: usize,
    cores: f64,
    memory_mib: f64,
}

impl World {
    /// Waits until the world has these sandboxes and nothing else: what ends takes a moment.
    pub(crate) async fn settled(agent: &Agent, place: &Place, expected: &[&str]) {
        let expected = Self::of(expected);
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

    fn of(expected: &[&str]) -> Self {
        let ids: BTreeSet<String> = expected.iter().map(|id| (*id).to_owned()).collect();
        let count = ids.len();
        let each = f64::from(u32::try_from(count).unwrap());
        Self {
            running: ids.clone(),
            cgroups: ids.clone(),
            run_folders: ids.clone(),
            disks: ids,
            sockets: 2 * count,
            vmms: count,
            shims: count,
            uids: count,
            cores: CORES_EACH * each,
            memory_mib: MEMORY_MIB_EACH * each,
        }
    }

    async fn look(agent: &Agent, place: &Place) -> Self {
        let paths = config_in(&place.folder).paths;
        let run = paths.run.join("sandboxes");
        let list = agent.get(&holdfast_api::path::sandboxes(&crate::node::group())).await.json();
        let sandboxes = list["value"].as_array().unwrap().iter();
        let node = agent.get(holdfast_api::path::NODE).await.json();
        let reserved = |of: &str| node[of]["reserved"].as_f64().unwrap();
        let vmms = processes("holdfast-vmm");
        Self {
            running: sandboxes
                .map(|sandbox| match sandbox["state"].as_str() {
                    Some("Running") => sandbox["id"].as_str().unwrap().to_owned(),
                    _ => sandbox.to_string(),
                })
                .collect(),
            cgroups: folders(&paths.cgroups),
            run_folders: folders(&run),
            disks: folders(&paths.sandboxes()),
            sockets: listening(&run),
            shims: processes("holdfast-shim").len(),
            uids: vmms.iter().collect::<BTreeSet<_>>().len(),
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

/// Uids of the running processes of this program. A zombie has no program any more.
pub(crate) fn processes(name: &str) -> Vec<String> {
    let runs = |folder: &Path| {
        let program = fs::read_link(folder.join("exe")).ok()?;
        let status = fs::read_to_string(folder.join("status")).ok()?;
        let uid = status.lines().find_map(|line| line.strip_prefix("Uid:").map(str::to_owned));
        program.ends_with(name).then_some(uid).flatten()
    };
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|entry| runs(&entry.path())).collect()
}

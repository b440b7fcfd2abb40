//! The processes of the workload, read from PID 1's own `/proc`: the sandbox's could be anything.

use std::collections::HashMap;

use holdfast_wire::guest::{Failure, Process};
use rustix::process::Pid;

use crate::{entrypoint::ENTRYPOINT_CGROUP, failure::from_io, workload::Workload};

/// Most processes told to the host: what fits one frame with the longest names.
const PROCESSES_MAX: usize = 4096;

/// A process of the workload under both its numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    outer: u32,
    outer_parent: u32,
    inner: u32,
    of_entrypoint: bool,
    name: String,
}

/// The workload's processes with the numbers they have in the sandbox, its first one included.
pub(crate) fn list(workload: &Workload) -> Result<Vec<Process>, Failure> {
    let mut entries = entries(workload)?;
    let inner: HashMap<u32, u32> = entries.iter().map(|entry| (entry.outer, entry.inner)).collect();
    entries.sort_by_key(|entry| entry.inner);
    entries.truncate(PROCESSES_MAX);
    Ok(entries
        .into_iter()
        .map(|entry| Process {
            pid: entry.inner,
            // What PID 1 started has no parent in the sandbox.
            parent: inner.get(&entry.outer_parent).copied().unwrap_or_default(),
            name: entry.name,
        })
        .collect())
}

/// A process of the workload for who wants to signal it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target {
    /// As PID 1 sees it.
    pub pid: Pid,
    /// The entrypoint or one of its children.
    pub of_entrypoint: bool,
}

/// All but the sandbox's first one.
pub(crate) fn targets(workload: &Workload) -> Result<Vec<Target>, Failure> {
    let holder = workload.holder_pid();
    let targets = entries(workload)?.into_iter().filter_map(|entry| {
        let pid = Pid::from_raw(i32::try_from(entry.outer).ok()?).filter(|pid| *pid != holder)?;
        Some(Target { pid, of_entrypoint: entry.of_entrypoint })
    });
    Ok(targets.collect())
}

fn entries(workload: &Workload) -> Result<Vec<Entry>, Failure> {
    let fail = |error| from_io("cannot list the sandbox's processes", &error);
    let holder = workload.holder_pid().as_raw_nonzero();
    let own = fs_err::read_to_string(format!("/proc/{holder}/cgroup")).map_err(fail)?;
    let Some(top) = cgroup_path(&own).and_then(|path| path.rsplit_once('/')) else {
        return Ok(Vec::new());
    };
    let below = format!("{}/", top.0);
    let mut found = Vec::new();
    for folder in fs_err::read_dir("/proc").map_err(fail)? {
        let folder = folder.map_err(fail)?;
        let Some(outer) = folder.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // A process that ends meanwhile has no files any more.
        let read = |file| fs_err::read(folder.path().join(file)).unwrap_or_default();
        let cgroup = String::from_utf8_lossy(&read("cgroup")).into_owned();
        let Some(place) = cgroup_path(&cgroup).and_then(|path| path.strip_prefix(&below)) else {
            continue;
        };
        let status = String::from_utf8_lossy(&read("status")).into_owned();
        found.extend(parse_status(outer, place, &status));
    }
    Ok(found)
}

/// Path in the one cgroup2 hierarchy.
fn cgroup_path(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("0::"))
}

/// Reads `/proc/N/status`. The names in it are the workload's choice; the kernel escapes new lines.
///
/// `place` is its cgroup below the workload's.
fn parse_status(outer: u32, place: &str, status: &str) -> Option<Entry> {
    let field = |name: &str| {
        status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
    };
    // The numbers in all namespaces, PID 1's first, then the sandbox's.
    let inner = field("NSpid")?.split_whitespace().nth(1)?.parse().ok()?;
    let outer_parent = field("PPid")?.parse().ok()?;
    let of_entrypoint = place.split('/').next() == Some(ENTRYPOINT_CGROUP);
    let name = field("Name")?.to_owned();
    Some(Entry { outer, outer_parent, inner, of_entrypoint, name })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_number_in_the_sandbox() {
        let status = "Name:\tsleep\nUmask:\t0022\nPid:\t120\nPPid:\t1\nNSpid:\t120\t7\t1\n";
        let entry = Entry {
            outer: 120,
            outer_parent: 1,
            inner: 7,
            of_entrypoint: true,
            name: "sleep".to_owned(),
        };
        assert_eq!(parse_status(120, "main/deeper", status), Some(entry));
        assert!(!parse_status(120, "mainly", status).unwrap().of_entrypoint);
    }

    #[test]
    fn a_process_outside_every_sandbox_or_gone_is_left_out() {
        assert_eq!(parse_status(5, "exec-1", "Name:\tkthreadd\nPPid:\t0\nNSpid:\t5\n"), None);
        assert_eq!(parse_status(5, "exec-1", ""), None);
    }

    #[test]
    fn the_cgroup_is_that_of_the_second_hierarchy() {
        assert_eq!(cgroup_path("2:cpu:/x\n0::/workload/init\n"), Some("/workload/init"));
    }
}

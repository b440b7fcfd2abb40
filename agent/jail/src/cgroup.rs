//! cgroup v2: the tree that holds the sandboxes, and one cgroup in it.

use std::{
    io::{self, Read, Seek},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use fs_err as fs;
use holdfast_model::{Mib, MilliCpu};
use log::{info, warn};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::JailError;

/// What a sandbox's cgroup cannot do without.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// Microseconds of one CPU accounting period: the kernel's default, short enough that a sandbox
/// held to a quarter of a CPU stutters by less than a tenth of a second.
const CPU_PERIOD_US: u64 = 100_000;

/// How long killed processes may take to go. Freeing gigabytes of guest memory takes most of it.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// What one cgroup may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub cpu: MilliCpu,
    /// Guest memory and what its VMM needs beside it. Swap is 0.
    pub memory: Mib,
    /// Processes and threads.
    pub pids: u32,
}

/// What one cgroup has used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub cpu_us: u64,
    pub memory_bytes: u64,
}

/// The folder whose sub-cgroups are the sandboxes.
#[derive(Debug, Clone)]
pub struct CgroupTree {
    root: PathBuf,
}

impl CgroupTree {
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Makes the folder if it is missing and turns the controllers on for what is under it.
    /// Harmless when done before.
    pub fn prepare(&self) -> Result<(), JailError> {
        let parent = self.root.parent().unwrap_or(&self.root);
        if !parent.join("cgroup.controllers").exists() {
            return Err(JailError::NotCgroup { path: self.root.clone() });
        }
        offer(parent);
        fs::create_dir_all(&self.root).map_err(self.failed("make"))?;
        offer(&self.root);
        let offered = fs::read_to_string(self.root.join("cgroup.subtree_control"))
            .map_err(self.failed("read"))?;
        match CONTROLLERS.iter().find(|wanted| !offered.split_whitespace().any(|c| c == **wanted)) {
            Some(controller) => {
                Err(JailError::NoController { path: self.root.clone(), controller })
            }
            None => Ok(()),
        }
    }

    /// Makes the cgroup `name`, empty and limited.
    pub fn create(&self, name: &str, limits: Limits) -> Result<Cgroup, JailError> {
        let path = self.root.join(name);
        fs::create_dir(&path).map_err(self.failed("make"))?;
        let cgroup = Cgroup { path };
        cgroup.limit(limits)?;
        Ok(cgroup)
    }

    /// The cgroup `name` that an earlier agent made. `None`: there is none.
    pub fn adopt(&self, name: &str) -> Result<Option<Cgroup>, JailError> {
        let path = self.root.join(name);
        match fs::symlink_metadata(&path) {
            Ok(facts) if facts.is_dir() => Ok(Some(Cgroup { path })),
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(self.failed("look at")(source)),
        }
    }

    /// Kills and removes every cgroup in the tree whose name is wanted. Gives their names.
    pub fn sweep(&self, wanted: impl Fn(&str) -> bool) -> Result<Vec<String>, JailError> {
        let entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(self.failed("read")(source)),
        };
        let mut swept = Vec::new();
        for entry in entries {
            let entry = entry.map_err(self.failed("read"))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) && wanted(&name) {
                let cgroup = Cgroup { path: entry.path() };
                cgroup.kill()?;
                drop(cgroup);
                swept.push(name);
            }
        }
        if !swept.is_empty() {
            info!(count = swept.len(); "cgroups left by an earlier agent removed");
        }
        Ok(swept)
    }

    fn failed(&self, action: &'static str) -> impl FnOnce(io::Error) -> JailError {
        let path = self.root.clone();
        move |source| JailError::Cgroup { action, path, source }
    }
}

/// Turns on each controller by itself: one that is not offered must not keep the others off. What
/// is missing in the end is the caller's to find.
fn offer(folder: &Path) {
    for controller in CONTROLLERS {
        let _ = fs::write(folder.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}

/// One sandbox's cgroup. Killed and removed on drop.
#[must_use = "dropping the guard kills and removes the cgroup"]
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves it, and what runs in it, for the next agent.
    pub fn detach(self) {
        std::mem::forget(self);
    }

    /// Opened by the parent with its rights; a child joins by writing `0` to it.
    pub(crate) fn door(&self) -> Result<fs::File, JailError> {
        fs::OpenOptions::new()
            .write(true)
            .open(self.path.join("cgroup.procs"))
            .map_err(self.failed("open"))
    }

    /// Holds it to another amount of CPU.
    pub fn limit_cpu(&self, cpu: MilliCpu) -> Result<(), JailError> {
        let quota = u64::from(cpu.0) * CPU_PERIOD_US / 1000;
        fs::write(self.path.join("cpu.max"), format!("{quota} {CPU_PERIOD_US}"))
            .map_err(self.failed("limit"))
    }

    fn limit(&self, limits: Limits) -> Result<(), JailError> {
        self.limit_cpu(limits.cpu)?;
        let settings = [
            ("memory.max", limits.memory.bytes().to_string()),
            // A microVM with one thread killed is of no use: all of it goes, or none.
            ("memory.oom.group", "1".to_owned()),
            ("pids.max", limits.pids.to_string()),
        ];
        for (file, value) in settings {
            fs::write(self.path.join(file), value).map_err(self.failed("limit"))?;
        }
        match fs::write(self.path.join("memory.swap.max"), "0") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()), // A kernel without swap.
            outcome => outcome.map_err(self.failed("limit")),
        }
    }

    /// Whether the kernel killed in this cgroup because its memory was used up.
    pub fn ran_out_of_memory(&self) -> bool {
        let events = fs::read_to_string(self.path.join("memory.events")).unwrap_or_default();
        field(&events, "oom_kill").is_some_and(|count| count > 0)
    }

    /// Kills everything in it and waits until nothing is left.
    pub fn kill(&self) -> Result<(), JailError> {
        fs::write(self.path.join("cgroup.kill"), "1").map_err(self.failed("kill"))?;
        let mut events =
            fs::File::open(self.path.join("cgroup.events")).map_err(self.failed("watch"))?;
        let deadline = Instant::now() + KILL_PATIENCE;
        loop {
            let mut text = String::new();
            events
                .rewind()
                .and_then(|()| events.read_to_string(&mut text))
                .map_err(self.failed("watch"))?;
            if field(&text, "populated") == Some(0) {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(JailError::Undead { path: self.path.clone() });
            }
            wait_for_change(&events, left).map_err(self.failed("watch"))?;
        }
    }

    fn failed(&self, action: &'static str) -> impl FnOnce(io::Error) -> JailError {
        let path = self.path.clone();
        move |source| JailError::Cgroup { action, path, source }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Left for the sweep at the next start, which finds it by its name.
        if let Err(error) = self.kill() {
            warn!(path:% = self.path.display(), error:%; "cgroup not emptied");
        }
        if let Err(error) = fs::remove_dir(&self.path) {
            warn!(path:% = self.path.display(), error:%; "cgroup not removed");
        }
    }
}

/// What the cgroup at `path` has used; zeros when it is gone.
pub fn cgroup_usage(path: &Path) -> Usage {
    let cpu = fs::read_to_string(path.join("cpu.stat")).unwrap_or_default();
    let memory = fs::read_to_string(path.join("memory.current")).unwrap_or_default();
    Usage {
        cpu_us: field(&cpu, "usage_usec").unwrap_or(0),
        memory_bytes: memory.trim().parse().unwrap_or(0),
    }
}

/// The kernel marks a change of `cgroup.events` as exceptional.
fn wait_for_change(events: &fs::File, patience: Duration) -> io::Result<()> {
    let patience = Timespec {
        tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: patience.subsec_nanos().into(),
    };
    match poll(&mut [PollFd::new(events, PollFlags::PRI)], Some(&patience)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// The number behind `name` in a file of `name number` lines.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(key, _)| *key == name)
        .and_then(|(_, value)| value.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        let text = "oom 3\noom_kill 2\npopulated 0\n";
        assert_eq!(field(text, "oom_kill"), Some(2));
        assert_eq!(field(text, "oom_"), None);
    }

    #[test]
    fn a_folder_outside_any_cgroup_file_system_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let error = CgroupTree::new(folder.path().join("x")).prepare().unwrap_err();
        assert!(matches!(error, JailError::NotCgroup { .. }), "{error}");
    }
}

//! The workload's cgroups: one above all of it with the limits, below it one for the namespaces'
//! holder, one for the entrypoint and one for each exec, so that each can be killed as a whole.
//!
//! ```text
//! workload      memory.max, pids.max
//!   init        the namespaces' holder
//!   main        the entrypoint
//!   exec-N      one exec and all its children
//! ```
//!
//! No cgroup here groups processes for the out-of-memory killer: it takes the largest process, as
//! container users expect, and never PID 1 or the holder.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags},
    io::Errno,
};

/// Tries at a free name: the workload may have made a cgroup of the name itself.
const NAME_TRIES_MAX: u32 = 64;

/// What the whole workload may use. A zero would kill it, so zero is never set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub memory_bytes: u64,
    pub processes: u64,
}

/// The workload's cgroup and those below it.
#[derive(Debug)]
pub struct Cgroups {
    workload: OwnedFd,
    next: AtomicU64,
    /// Names of cgroups whose exec ended but which still hold background children: removed when
    /// those are gone. Each holds a process, so their number is bounded by the process limit.
    left: Arc<Mutex<Vec<String>>>,
}

/// One cgroup below the workload's. Dropping removes it, or notes it for later while processes
/// live in it.
#[derive(Debug)]
#[must_use = "dropping the guard removes the cgroup"]
pub struct Cgroup {
    parent: OwnedFd,
    folder: OwnedFd,
    name: String,
    left: Arc<Mutex<Vec<String>>>,
}

impl Cgroups {
    /// Makes the workload's cgroup below `base`, a folder of a cgroup2 mount. Limits whose
    /// controller `base` does not offer are left out: our kernel has all.
    pub fn create(base: &Path, limits: Limits) -> io::Result<Self> {
        // Refused where a controller is missing; each is asked for alone so that the rest are on.
        for controller in ["+memory", "+pids", "+cpu"] {
            let control = base.join("cgroup.subtree_control");
            let _ = fs_err::write(control, controller);
        }
        let base = open_folder(CWD, base)?;
        let workload = make(base.as_fd(), "workload")?;
        write_optional(workload.as_fd(), "memory.max", &limits.memory_bytes.to_string())?;
        write_optional(workload.as_fd(), "pids.max", &limits.processes.to_string())?;
        Ok(Self { workload, next: AtomicU64::new(0), left: Arc::default() })
    }

    pub fn workload(&self) -> BorrowedFd<'_> {
        self.workload.as_fd()
    }

    /// A cgroup with this very name.
    pub fn named(&self, name: &str) -> io::Result<Cgroup> {
        let folder = make(self.workload.as_fd(), name)?;
        self.guard(folder, name.to_owned())
    }

    /// A new cgroup for one exec.
    pub fn for_exec(&self) -> io::Result<Cgroup> {
        self.sweep();
        for _ in 0..NAME_TRIES_MAX {
            let name = format!("exec-{}", self.next.fetch_add(1, Ordering::Relaxed));
            match make_new(self.workload.as_fd(), &name) {
                Ok(folder) => return self.guard(folder, name),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    /// Kills every process of the workload, the holder too.
    pub fn kill_all(&self) -> io::Result<()> {
        write(self.workload.as_fd(), "cgroup.kill", "1")
    }

    /// Whether no process of the workload is left.
    pub fn is_empty(&self) -> io::Result<bool> {
        let events = read(self.workload.as_fd(), "cgroup.events")?;
        Ok(events.lines().any(|line| line == "populated 0"))
    }

    fn guard(&self, folder: OwnedFd, name: String) -> io::Result<Cgroup> {
        let parent = self.workload.try_clone()?;
        Ok(Cgroup { parent, folder, name, left: Arc::clone(&self.left) })
    }

    fn sweep(&self) {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        left.retain(|name| remove(self.workload.as_fd(), name) == Err(Errno::BUSY));
    }
}

impl Cgroup {
    /// Kills everything in it, whatever groups and sessions its processes made.
    pub fn kill(&self) -> io::Result<()> {
        write(self.folder.as_fd(), "cgroup.kill", "1")
    }

    /// Moves a process here.
    pub fn adopt(&self, pid: rustix::process::Pid) -> io::Result<()> {
        write(self.folder.as_fd(), "cgroup.procs", &pid.as_raw_nonzero().to_string())
    }
}

impl AsFd for Cgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if remove(self.parent.as_fd(), &self.name) == Err(Errno::BUSY) {
            let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
            left.push(std::mem::take(&mut self.name));
        }
    }
}

fn remove(parent: BorrowedFd<'_>, name: &str) -> Result<(), Errno> {
    rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)
}

fn make(parent: BorrowedFd<'_>, name: &str) -> io::Result<OwnedFd> {
    match make_new(parent, name) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => open_folder(parent, name),
        outcome => outcome,
    }
}

fn make_new(parent: BorrowedFd<'_>, name: &str) -> io::Result<OwnedFd> {
    rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755))?;
    open_folder(parent, name)
}

fn open_folder(parent: BorrowedFd<'_>, path: impl rustix::path::Arg) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(parent, path, flags, Mode::empty())?)
}

fn write(folder: BorrowedFd<'_>, file: &str, value: &str) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(folder, file, flags, Mode::empty())?;
    rustix::io::write(&file, value.as_bytes())?;
    Ok(())
}

fn write_optional(folder: BorrowedFd<'_>, file: &str, value: &str) -> io::Result<()> {
    match write(folder, file, value) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

fn read(folder: BorrowedFd<'_>, file: &str) -> io::Result<String> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(folder, file, flags, Mode::empty())?;
    let mut bytes = [0; 512];
    let count = rustix::io::read(&file, &mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes[..count]).into_owned())
}

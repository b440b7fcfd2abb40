//! One VMM process as the agent holds it: by its shim, which tells of its end.

use std::{
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::ExitStatusExt,
    },
    path::Path,
    process::ExitStatus,
    time::Duration,
};

use fs_err as fs;
use log::warn;
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    process::{Signal, pidfd_send_signal},
};

use crate::{
    Cgroup, Handover, Identity, JailError, Jailer, ProcessLimits, RunFolder,
    jailer::{is_readable_within, spawn_error},
    memory::sealed_bytes,
    record::{self, Pids},
    shim::{HANDED_MAX, OWN_FDS, Orders},
    slot::tap_of,
};

/// How long a killed VMM may take to go. Freeing gigabytes of guest memory takes most of it.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// How to start one VMM.
pub struct VmmPlan<'a> {
    pub jailer: &'a Jailer,
    pub program: &'a Path,
    /// What `ps` shows behind the program's name. A VMM itself looks at none.
    pub arguments: &'a [&'a str],
    pub run: &'a RunFolder,
    pub cgroup: &'a Cgroup,
    pub identity: Identity,
    pub limits: ProcessLimits,
    pub handover: Handover,
    /// The configuration's frame.
    pub config: &'a [u8],
    /// Its stderr. On tmpfs its pages are charged to the VMM's cgroup: what a VMM that has been
    /// taken over writes there is bounded by its own memory.
    pub log: fs::File,
}

/// One VMM process. Killed on drop.
#[must_use = "dropping the guard kills the VMM"]
#[derive(Debug)]
pub struct VmmProcess {
    shim: OwnedFd,
    /// `None`: it had ended before this agent could take hold of it.
    vmm: Option<OwnedFd>,
    vmm_pid: u32,
    /// Where the shim records its end.
    exit: fs::File,
    status: Option<ExitStatus>,
    /// Goes on without us.
    detached: bool,
}

/// What became of a VMM that an earlier agent started.
#[derive(Debug)]
pub enum Adopted {
    Running(VmmProcess),
    /// With its wait status if that was recorded. All of it is gone.
    Ended(Option<ExitStatus>),
}

impl VmmProcess {
    /// Starts it, and returns once its program runs. Blocks for some milliseconds.
    pub fn spawn(plan: VmmPlan<'_>) -> Result<Self, JailError> {
        let handed = plan.handover.given.len();
        if handed > HANDED_MAX {
            return Err(JailError::TooManyFds { fds: handed });
        }
        let name = plan.program.file_name().unwrap_or_default().to_string_lossy();
        let arguments = [&*name].into_iter().chain(plan.arguments.iter().copied());
        let orders = Orders {
            identity: plan.identity,
            limits: plan.limits,
            numbers: plan.handover.numbers(),
            arguments: arguments.map(str::to_owned).collect(),
        };
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let program = rustix::fs::open(plan.program, flags, Mode::empty())
            .map_err(|errno| spawn_error(plan.program)(errno.into()))?;
        let door = plan.cgroup.door()?;
        let pids = plan.run.record(record::PIDS)?;
        let exit = plan.run.record(record::EXIT)?;
        let config = sealed_bytes(plan.config).map_err(JailError::Handover)?;
        let log = plan.log.as_fd();
        let own: [BorrowedFd<'_>; OWN_FDS] =
            [program.as_fd(), door.as_fd(), pids.as_fd(), exit.as_fd(), config.as_fd(), log];
        let fds: Vec<_> =
            own.into_iter().chain(plan.handover.given.iter().map(AsFd::as_fd)).collect();
        let [shim, vmm] = plan.jailer.start(&orders, &fds)?;
        let unknown = |source: io::Error| JailError::Shim { step: "be held".to_owned(), source };
        let pids = Pids::read(&pids).map_err(unknown)?;
        let pids = pids.ok_or_else(|| unknown(io::ErrorKind::InvalidData.into()))?;
        Ok(Self {
            shim,
            vmm: Some(vmm),
            vmm_pid: pids.vmm.pid.unsigned_abs(),
            exit,
            status: None,
            detached: false,
        })
    }

    /// Takes over the VMM that an earlier agent started, by what its shim left in the run folder.
    /// What did not get that far, or cannot be told any more, is killed.
    pub fn adopt(run: &RunFolder, cgroup: &Cgroup) -> Result<Adopted, JailError> {
        let Some(exit) = run.read_record(record::EXIT)? else {
            return end_all(cgroup, None);
        };
        let pids = match run.read_record(record::PIDS)? {
            Some(file) => Pids::read(&file).map_err(|source| JailError::RunFolder {
                action: "read",
                path: run.path().join(record::PIDS),
                source,
            })?,
            None => None,
        };
        let Some(pids) = pids else { return end_all(cgroup, Some(&exit)) };
        let handle = |instance: record::Instance| {
            let identify = |source| JailError::Identify { pid: instance.pid, source };
            instance.handle().map_err(identify)
        };
        let (shim, vmm) = (handle(pids.shim)?, handle(pids.vmm)?);
        match shim {
            Some(shim) if !is_readable_within(&shim, Duration::ZERO) => {
                Ok(Adopted::Running(Self {
                    shim,
                    vmm,
                    vmm_pid: pids.vmm.pid.unsigned_abs(),
                    exit,
                    status: None,
                    detached: false,
                }))
            }
            _ => end_all(cgroup, Some(&exit)),
        }
    }

    /// The VMM's, as this node sees it.
    pub fn pid(&self) -> u32 {
        self.vmm_pid
    }

    /// Another handle of the tap it was handed, also by an earlier agent.
    pub fn tap(&self) -> Result<OwnedFd, JailError> {
        let gone = || JailError::Slot {
            what: "be found by its VMM",
            source: io::ErrorKind::NotFound.into(),
        };
        tap_of(self.vmm.as_ref().ok_or_else(gone)?, self.vmm_pid)
    }

    /// Becomes readable when the shim has ended, which it does once the VMM has.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.shim.as_fd()
    }

    /// How it ended. `None`: it runs.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() && is_readable_within(&self.shim, Duration::ZERO) {
            self.status = Some(self.status_at_end());
        }
        self.status
    }

    /// Ends it at once. Harmless when it has ended.
    pub fn kill(&self) {
        if self.status.is_none()
            && let Some(vmm) = &self.vmm
        {
            kill(vmm, self.vmm_pid);
        }
    }

    /// Lets it go on without this guard, for the next agent to adopt.
    pub fn detach(mut self) {
        self.detached = true;
    }

    /// The shim has ended.
    fn status_at_end(&self) -> ExitStatus {
        let recorded = record::read_exit(&self.exit).unwrap_or_else(|error| {
            warn!(vmm_pid = self.vmm_pid, error:%; "end of a VMM cannot be read");
            None
        });
        recorded.unwrap_or_else(|| {
            // The shim was killed, and the kernel kills the VMM with it: by this signal.
            self.kill();
            if let Some(vmm) = &self.vmm
                && !is_readable_within(vmm, END_PATIENCE)
            {
                warn!(vmm_pid = self.vmm_pid; "VMM does not end");
            }
            ExitStatus::from_raw(Signal::KILL.as_raw())
        })
    }
}

impl Drop for VmmProcess {
    fn drop(&mut self) {
        if self.detached || self.status.is_some() {
            return;
        }
        self.kill();
        if !is_readable_within(&self.shim, END_PATIENCE) {
            warn!(vmm_pid = self.vmm_pid; "shim does not end by itself");
            kill(&self.shim, self.vmm_pid);
        }
        self.status_at_end();
    }
}

/// Kills what is left in the cgroup, and tells the end if it was recorded.
fn end_all(cgroup: &Cgroup, exit: Option<&fs::File>) -> Result<Adopted, JailError> {
    cgroup.kill()?;
    let status = match exit {
        Some(exit) => record::read_exit(exit).map_err(|source| JailError::RunFolder {
            action: "read",
            path: exit.path().to_owned(),
            source,
        })?,
        None => None,
    };
    Ok(Adopted::Ended(status))
}

fn kill(process: &OwnedFd, vmm_pid: u32) {
    if let Err(errno) = pidfd_send_signal(process, Signal::KILL)
        && errno != Errno::SRCH
    {
        warn!(vmm_pid, error:% = errno; "VMM not killed");
    }
}

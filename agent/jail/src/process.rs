//! Starting a process that has only what it was handed, and ending it.

use std::{
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::process::{CommandExt, ExitStatusExt},
    },
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
};

use fs_err as fs;
use log::warn;
use rustix::{
    io::fcntl_dupfd_cloexec,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

use crate::{Cgroup, JailError, memory::sealed_bytes, sys};

/// Descriptors are handed over at or above this number: below it are stdin, stdout, stderr and the
/// configuration's fixed one.
const HANDOVER_FD_MIN: RawFd = 10;

/// Number at which a VMM finds its configuration.
pub(crate) const CONFIG_FD: RawFd = 3;

/// The descriptors a child will have besides the standard three. A child sees each at the number
/// that [`Handover::give`] said.
#[derive(Debug, Default)]
pub struct Handover {
    pub(crate) given: Vec<OwnedFd>,
}

impl Handover {
    /// Gives the child its own duplicate. The caller may close the original.
    pub fn give(&mut self, fd: impl AsFd) -> Result<i32, JailError> {
        let given = fcntl_dupfd_cloexec(fd, HANDOVER_FD_MIN)
            .map_err(|errno| JailError::Handover(errno.into()))?;
        let number = given.as_raw_fd();
        self.given.push(given);
        Ok(number)
    }
}

/// Who a child runs as. No supplementary groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    pub uid: u32,
    pub gid: u32,
}

/// What holds one child.
#[derive(Debug)]
pub struct Confinement {
    pub(crate) handover: Handover,
    /// `None`: the parent's.
    pub(crate) identity: Option<Identity>,
    /// Its cgroup's `cgroup.procs`. `None`: the parent's cgroup.
    pub(crate) door: Option<OwnedFd>,
    /// Appears at [`CONFIG_FD`].
    pub(crate) config: Option<OwnedFd>,
}

impl Confinement {
    pub fn new(handover: Handover, identity: Option<Identity>) -> Self {
        Self { handover, identity, door: None, config: None }
    }

    /// The child joins this cgroup before its program runs.
    pub fn in_cgroup(mut self, cgroup: &Cgroup) -> Result<Self, JailError> {
        self.door = Some(cgroup.door()?.into_parts().0.into());
        Ok(self)
    }
}

/// Makes `command` start a child that has an empty environment, its own process group, no core
/// dumps, no way to gain rights, and no descriptor besides the standard three and those handed
/// over. Set what environment it needs afterwards.
pub fn confine(command: &mut Command, confinement: Confinement) {
    command.env_clear().process_group(0).current_dir("/");
    sys::confine_child(command, confinement);
}

/// How to start one VMM.
pub struct VmmPlan<'a> {
    pub program: &'a Path,
    pub cgroup: &'a Cgroup,
    pub identity: Identity,
    pub handover: Handover,
    /// The configuration's frame.
    pub config: &'a [u8],
    /// Its stderr. On tmpfs its pages are charged to the VMM's cgroup: what a VMM that has been
    /// taken over writes there is bounded by its own memory.
    pub log: fs::File,
}

/// One VMM process. Killed and reaped on drop.
#[must_use = "dropping the guard kills the VMM"]
#[derive(Debug)]
pub struct VmmProcess {
    child: Child,
    pidfd: OwnedFd,
    status: Option<ExitStatus>,
}

impl VmmProcess {
    pub fn spawn(plan: VmmPlan<'_>) -> Result<Self, JailError> {
        let failed =
            |source: io::Error| JailError::Spawn { program: plan.program.to_owned(), source };
        // The duplicate at CONFIG_FD must not fall on a descriptor the child needs until then, such
        // as the one by which the standard library learns of a failed exec: a number that is in use
        // here cannot be given to one made later.
        let _occupied = fcntl_dupfd_cloexec(io::stdin(), CONFIG_FD)
            .map_err(|errno| JailError::Handover(errno.into()))?;
        let config = sealed_bytes(plan.config).map_err(JailError::Handover)?;
        let config = fcntl_dupfd_cloexec(config, HANDOVER_FD_MIN)
            .map_err(|errno| JailError::Handover(errno.into()))?;
        let confinement = Confinement::new(plan.handover, Some(plan.identity));
        let confinement = Confinement { config: Some(config), ..confinement };
        let confinement = confinement.in_cgroup(plan.cgroup)?;
        let mut command = Command::new(plan.program);
        confine(&mut command, confinement);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(plan.log.into_parts().0);
        let child = command.spawn().map_err(failed)?;
        Self::own(child).map_err(failed)
    }

    fn own(mut child: Child) -> io::Result<Self> {
        let pidfd = i32::try_from(child.id())
            .ok()
            .and_then(Pid::from_raw)
            .ok_or_else(|| io::Error::other("not a process id"))
            .and_then(|pid| Ok(pidfd_open(pid, PidfdFlags::NONBLOCK)?));
        match pidfd {
            Ok(pidfd) => Ok(Self { child, pidfd, status: None }),
            Err(error) => {
                child.kill()?;
                child.wait()?;
                Err(error)
            }
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Becomes readable when the process has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// How it ended. `None`: it runs.
    pub fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self.child.try_wait()?;
        }
        Ok(self.status)
    }

    /// Ends it at once. Harmless when it has ended.
    pub fn kill(&self) {
        if self.status.is_none()
            && let Err(errno) = pidfd_send_signal(&self.pidfd, Signal::KILL)
            && errno != rustix::io::Errno::SRCH
        {
            warn!(pid = self.pid(), error:% = errno; "VMM not killed");
        }
    }
}

impl Drop for VmmProcess {
    fn drop(&mut self) {
        self.kill();
        if let Err(error) = self.child.wait() {
            warn!(pid = self.pid(), error:%; "VMM not reaped");
        }
    }
}

/// How a process ended, in words: `exit code 3`, `signal 9`.
pub fn in_words(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}

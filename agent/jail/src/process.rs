//! A process that has only what it was handed.

use std::{
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::process::{CommandExt, ExitStatusExt},
    },
    process::{Command, ExitStatus},
};

use rustix::io::fcntl_dupfd_cloexec;

use crate::{Cgroup, JailError, sys};

/// Descriptors are handed over at or above this number: below it are stdin, stdout, stderr and the
/// configuration's fixed one.
const HANDOVER_FD_MIN: RawFd = 10;

/// Input, output and errors.
const STANDARD_FDS: RawFd = 3;

/// Number at which a VMM finds its configuration.
pub(crate) const CONFIG_FD: RawFd = 3;

/// The descriptors a child will have besides the standard three. A child sees each at the number
/// that [`Handover::give`] said.
#[derive(Debug, Default)]
pub struct Handover {
    pub(crate) given: Vec<OwnedFd>,
    /// With the numbers at which the child has them.
    pub(crate) placed: Vec<(OwnedFd, RawFd)>,
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

    /// Gives the child its own duplicate at this number, below all that [`Self::give`] says. Not for
    /// a VMM.
    pub fn place(&mut self, fd: impl AsFd, number: RawFd) -> Result<(), JailError> {
        let free = (STANDARD_FDS..HANDOVER_FD_MIN).contains(&number)
            && self.placed.iter().all(|(_, taken)| *taken != number);
        if !free {
            return Err(JailError::Handover(std::io::ErrorKind::InvalidInput.into()));
        }
        let given = fcntl_dupfd_cloexec(fd, HANDOVER_FD_MIN)
            .map_err(|errno| JailError::Handover(errno.into()))?;
        self.placed.push((given, number));
        Ok(())
    }

    /// Where the child sees them, in their order.
    pub(crate) fn numbers(&self) -> Vec<RawFd> {
        self.given.iter().map(AsRawFd::as_raw_fd).collect()
    }
}

/// Who a child runs as. No supplementary groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    pub uid: u32,
    pub gid: u32,
}

/// What one process may have, whatever its cgroup allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessLimits {
    /// Open descriptors, those handed over included.
    pub descriptors: u32,
    /// Threads of its user.
    pub threads: u32,
    /// Length of a file it writes.
    pub file_bytes: u64,
}

/// What holds one child.
#[derive(Debug)]
pub struct Confinement {
    pub(crate) handover: Handover,
    /// `None`: the parent's.
    pub(crate) identity: Option<Identity>,
    /// Its cgroup's `cgroup.procs`. `None`: the parent's cgroup.
    pub(crate) door: Option<OwnedFd>,
    /// Open in the parent for as long as the child can be started: see [`hold`].
    pub(crate) held: Vec<OwnedFd>,
}

impl Confinement {
    pub fn new(handover: Handover, identity: Option<Identity>) -> Self {
        Self { handover, identity, door: None, held: Vec::new() }
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
pub fn confine(command: &mut Command, mut confinement: Confinement) {
    confinement.held = hold(&confinement.handover.placed);
    command.env_clear().process_group(0).current_dir("/");
    sys::confine_child(command, confinement);
}

/// Takes the numbers at which descriptors will be placed, where they are free in this process. The
/// standard library reports a failed exec by a descriptor of its own, which is the lowest free one:
/// placed upon, the report would be lost.
fn hold(placed: &[(OwnedFd, RawFd)]) -> Vec<OwnedFd> {
    let holder = |(fd, number): &(OwnedFd, RawFd)| {
        let holder = fcntl_dupfd_cloexec(fd, *number).ok()?;
        // Another number: this one is in use already.
        (holder.as_raw_fd() == *number).then_some(holder)
    };
    placed.iter().filter_map(holder).collect()
}

/// How a process ended, in words: `exit code 3`, `signal 9`.
pub fn in_words(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}

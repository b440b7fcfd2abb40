//! What each kind of thread may ask of the kernel; anything else kills the process. The lists are
//! in `rules.rs`, each rule with its reason.
//!
//! Device threads get their filter when they start, vCPUs when theirs start, the main thread last:
//! all before the first guest instruction. To add a kind of thread, add it to [`ThreadKind`], give
//! it a list, and let `tests/seccomp` see what it needs.

mod rules;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, env, process, sync::OnceLock};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

use crate::sys;

pub use rules::{Check, Rule};

#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    #[error("the filter of system calls for {kind:?} threads cannot be made")]
    Compile {
        kind: ThreadKind,
        #[source]
        source: seccompiler::BackendError,
    },
    #[error("a {kind:?} thread cannot be put under its filter of system calls")]
    Install {
        kind: ThreadKind,
        #[source]
        source: seccompiler::Error,
    },
}

/// Threads that need the same of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// Serves the agent, and hears of the end.
    Main,
    Vcpu,
    Disk,
    Rng,
    Vsock,
    Net,
    Balloon,
}

impl ThreadKind {
    pub const ALL: [Self; 7] =
        [Self::Main, Self::Vcpu, Self::Disk, Self::Rng, Self::Vsock, Self::Net, Self::Balloon];

    /// Its lists: what every thread may, what every device's may, what it alone may.
    pub fn rules(self) -> impl Iterator<Item = &'static Rule> {
        let lists: &[&'static [Rule]] = match self {
            Self::Main => &[rules::DEBUG, rules::EVERY, rules::WAITING, rules::MAIN],
            Self::Vcpu => &[rules::DEBUG, rules::EVERY, rules::VCPU],
            Self::Disk => &[rules::DEBUG, rules::EVERY, rules::WAITING, rules::DISK],
            Self::Rng => &[rules::DEBUG, rules::EVERY, rules::WAITING, rules::RNG],
            Self::Vsock => &[rules::DEBUG, rules::EVERY, rules::WAITING, rules::VSOCK],
            Self::Net => &[rules::DEBUG, rules::EVERY, rules::WAITING, rules::NET],
            Self::Balloon => &[rules::DEBUG, rules::EVERY, rules::WAITING, rules::BALLOON],
        };
        lists.iter().copied().flatten()
    }

    fn compile(self) -> Result<BpfProgram, SeccompError> {
        self.program().map_err(|source| SeccompError::Compile { kind: self, source })
    }

    fn program(self) -> Result<BpfProgram, seccompiler::BackendError> {
        let own_pid = u64::from(process::id());
        let mut calls: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        for rule in self.rules() {
            let conditions = calls.entry(rule.call).or_default();
            if !rule.when.is_empty() {
                let checks = rule.when.iter().map(|check| check.condition(own_pid));
                conditions.push(SeccompRule::new(checks.collect::<Result<_, _>>()?)?);
            }
        }
        let (other, listed) = (SeccompAction::KillProcess, SeccompAction::Allow);
        SeccompFilter::new(calls, other, listed, env::consts::ARCH.try_into()?)?.try_into()
    }
}

impl Check {
    fn condition(self, own_pid: u64) -> Result<SeccompCondition, seccompiler::BackendError> {
        let (argument, operator, value) = match self {
            Self::Is(argument, value) => (argument, SeccompCmpOp::Eq, value),
            Self::Lacks(argument, bits) => (argument, SeccompCmpOp::MaskedEq(bits), 0),
            Self::Masked(argument, mask, value) => (argument, SeccompCmpOp::MaskedEq(mask), value),
            Self::IsOwnPid(argument) => (argument, SeccompCmpOp::Eq, own_pid),
        };
        // The kernel takes these as 32-bit numbers, and ignores what is above.
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)
    }
}

static PROGRAMS: OnceLock<Vec<(ThreadKind, BpfProgram)>> = OnceLock::new();

/// Makes all filters, so that threads need no memory for it. Called once, before any thread is.
pub(crate) fn compile() -> Result<(), SeccompError> {
    sys::keep_one_heap();
    let programs: Result<Vec<_>, _> =
        ThreadKind::ALL.into_iter().map(|kind| Ok((kind, kind.compile()?))).collect();
    // Made before: the same.
    let _ = PROGRAMS.set(programs?);
    Ok(())
}

/// Puts the calling thread under its filter, for good. Where no filters were made there are none:
/// in unit tests, whose program is not this one.
pub(crate) fn install(kind: ThreadKind) -> Result<(), SeccompError> {
    let mut programs = PROGRAMS.get().into_iter().flatten();
    let Some((_, program)) = programs.find(|(of, _)| *of == kind) else { return Ok(()) };
    let installed = seccompiler::apply_filter(program);
    installed.map_err(|source| SeccompError::Install { kind, source })
}
